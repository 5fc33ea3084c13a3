"""Sizes of the networks: constructor arguments by part, see `Row.network`.

Sources: spec/omniavatar.md 0, a.1, c, d; spec/stableavatar.md a.1, b.2, f; spec/cartoon-world.md 3 to 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "CARTOON",
    "CARTOON_V2V",
    "OMNIAVATAR_1_3B",
    "OMNIAVATAR_14B",
    "STABLEAVATAR_1_3B",
    "STABLEAVATAR_TINY",
    "numbers_in",
]

Network = Mapping[str, Mapping[str, Any]]

_TINY_JUDGES: Final[Network] = {
    "syncnet": {
        "audio_encoder": {
            "in_channels": 1, "block_out_channels": (32, 32, 32, 32, 32, 64),
            "downsample_factors": ((2, 1), 2, 2, 1, 2, 2), "attn_blocks": (0, 0, 0, 1, 0, 0),
        },
        "visual_encoder": {
            "in_channels": 48, "block_out_channels": (32, 32, 32, 64, 96),
            "downsample_factors": ((1, 2), 2, 2, 2, 2), "attn_blocks": (0, 0, 0, 1, 0),
        },
        "face_size": 64,
    },
    "lpips_vgg": {"widths": (8, 16, 16, 16, 16)},
    "videomae": {
        "image_size": 56, "patch_size": 14, "frames": 16, "tubelet": 2, "width": 48, "depth": 2, "heads": 4,
        "mlp_width": 96, "classes": 8,
    },
}  # fmt: skip
"""The published judges of auxiliary losses with every width made small, for frames of 64 pixels. The towers
of the first end in several places of a map: with one, the norm over two channels of a group leaves signs."""

CARTOON: Final[Network] = {
    "dit": {
        "num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 6, "ffn_dim": 384, "freq_dim": 128,
        "text_dim": 32, "in_channels": 33, "out_channels": 16, "audio_hidden_size": 32,
        "audio_input_dim": 4 * 48,
    },
    "vae": {"base_dim": 16, "dim_mult": (1, 2, 4, 4), "num_res_blocks": 1, "z_dim": 16},
    "text": {"vocab_size": 384, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2},
    "audio": {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 144,
        "conv_dim": (32,) * 7, "feat_extract_norm": "group", "num_conv_pos_embeddings": 15,
        "num_conv_pos_embedding_groups": 4,
    },
    **_TINY_JUDGES,
}  # fmt: skip


CARTOON_V2V: Final[Network] = {**CARTOON, "dit": {**CARTOON["dit"], "in_channels": 49}}

_PUBLISHED_ENCODERS: Final[Network] = {
    "vae": {"base_dim": 96, "dim_mult": (1, 2, 4, 4), "num_res_blocks": 2, "z_dim": 16},
    "text": {
        "vocab_size": 256_384, "d_model": 4096, "d_ff": 10_240, "d_kv": 64, "num_heads": 64, "num_layers": 24,
    },
    "audio": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "conv_dim": (512,) * 7, "feat_extract_norm": "group", "num_conv_pos_embeddings": 128,
        "num_conv_pos_embedding_groups": 16,
    },
}  # fmt: skip
"""Wan 2.1's VAE and text encoder, and wav2vec 2.0 base."""


def _omniavatar(heads: int, layers: int, ffn_dim: int) -> Network:
    """The published network; only the transformer differs between the two sizes."""
    return {
        "dit": {
            "num_attention_heads": heads, "attention_head_dim": 128, "num_layers": layers, "ffn_dim": ffn_dim,
            "freq_dim": 256, "text_dim": 4096, "in_channels": 33, "out_channels": 16, "audio_hidden_size": 32,
            "audio_input_dim": 14 * 768,
        },
        **_PUBLISHED_ENCODERS,
    }  # fmt: skip


OMNIAVATAR_14B: Final = _omniavatar(heads=40, layers=40, ffn_dim=13_824)
OMNIAVATAR_1_3B: Final = _omniavatar(heads=12, layers=30, ffn_dim=8960)

STABLEAVATAR_1_3B: Final[Network] = {
    "dit": {
        "num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960,
        "freq_dim": 256, "text_dim": 4096, "in_channels": 36, "out_channels": 16, "image_dim": 1280,
        "vocal_dim": 768, "vocal_heads": 8, "vocal_layers": 2, "vocal_ffn_dim": 3072,
    },
    **_PUBLISHED_ENCODERS,
    "clip": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 31, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14,
    },
}  # fmt: skip

STABLEAVATAR_TINY: Final[Network] = {
    "dit": {
        "num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 192, "freq_dim": 64,
        "text_dim": 32, "in_channels": 36, "out_channels": 16, "image_dim": 32, "vocal_dim": 48,
        "vocal_heads": 8, "vocal_layers": 2, "vocal_ffn_dim": 192,
    },
    **{part: CARTOON[part] for part in ("vae", "text", "audio")},
    "clip": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14,
    },
}  # fmt: skip
"""The published network with every width made small."""

_NUMBERS: Final[tuple[tuple[str, Mapping[str, Any], int, int], ...]] = (
    ("text", _PUBLISHED_ENCODERS["text"], 5_680_910_336, 1_050_148_864),  # its table of words
    ("vae", _PUBLISHED_ENCODERS["vae"], 126_892_531, 3_981_696),
    ("audio", _PUBLISHED_ENCODERS["audio"], 94_371_712, 4_718_720),
    ("clip", STABLEAVATAR_1_3B["clip"], 611_086_080, 6_558_720),
    ("text", CARTOON["text"], 33_184, 12_288),
    ("vae", CARTOON["vae"], 2_577_987, 110_656),
    ("audio", CARTOON["audio"], 74_495, 8_655),
    ("clip", STABLEAVATAR_TINY["clip"], 44_224, 18_816),
)  # fmt: skip
"""Parameters of the encoders above, and of the largest of their modules: counted once from the networks, so
that a plan need not build them."""


def numbers_in(part: str, sizes: Mapping[str, Any]) -> tuple[int, int] | None:
    """Parameters of an encoder of these sizes, in all and in its largest module; None for other sizes."""
    return next((known[2:] for known in _NUMBERS if known[:2] == (part, sizes)), None)
