"""A complete StableAvatar release with tiny random tensors, in the published layout and names.

Written from the tables of spec/stableavatar.md (a.2, b.2, k) and, for CLIP, from the names in Wan 2.1's
modules/clip.py. Nothing here asks the product for a name.

    ROOT/StableAvatar/StableAvatar-1.3B/             transformer3d-square.pt, transformer3d-rec-vec.pt
    ROOT/StableAvatar/Wan2.1-Fun-V1.1-1.3B-InP/      config.json, the .pth encoders, google/umt5-xxl/
    ROOT/StableAvatar/wav2vec2-base-960h/
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.pipelines import tiny_release as tiny
from tests.pipelines.tiny_release import Shapes, State, linear, norm

DIMS = tiny.Dims(width=128, heads=1, ffn=96, layers=2)
VOCAL_HEADS, VOCAL_LAYERS = 8, 2
CLIP_WIDTH, CLIP_FFN, CLIP_LAYERS = 32, 48, 3
FOLDER = Path("StableAvatar")
TRANSFORMERS = FOLDER / "StableAvatar-1.3B"
BASE = FOLDER / "Wan2.1-Fun-V1.1-1.3B-InP"


def shapes(dims: tiny.Dims = DIMS) -> Shapes:
    """The transformer (spec/stableavatar.md a.2, b.2)."""
    d = dims.width
    named = tiny.wan_shapes(dims, channels=36)
    named |= norm("img_emb.proj.0", CLIP_WIDTH) | linear("img_emb.proj.1", CLIP_WIDTH, CLIP_WIDTH)
    named |= linear("img_emb.proj.3", d, CLIP_WIDTH) | norm("img_emb.proj.4", d)
    for i in range(dims.layers):
        for projection in ("k_img", "v_img", "k_vocal", "v_vocal"):
            named |= linear(f"blocks.{i}.cross_attn.{projection}", d, d)
        named[f"blocks.{i}.cross_attn.norm_k_img.weight"] = (d,)
    named["vocal_projector.proj_model.proj.weight"] = (d, dims.wav2vec_width)
    named |= norm("vocal_projector.proj_model.norm", d)
    for j in range(VOCAL_LAYERS):
        block = f"vocal_projector.blocks.{j}"
        named |= {f"{block}.modulation": (1, 6, d)} | norm(f"{block}.norm3", d)
        for letter in "qkvo":
            named |= linear(f"{block}.cross_attn.{letter}", d, d)
        named |= {f"{block}.cross_attn.norm_{letter}.weight": (d,) for letter in "qk"}
        named |= linear(f"{block}.ffn.0", 2 * d, d) | linear(f"{block}.ffn.2", d, 2 * d)
    named |= {"vocal_projector.final_head.modulation": (1, 2, d)}
    return named | linear("vocal_projector.final_head.final_proj", d, d)


def clip_shapes() -> Shapes:
    """The image tower, and a little of the text tower, which nobody reads."""
    d = CLIP_WIDTH
    named: Shapes = {
        "visual.patch_embedding.weight": (d, 3, 14, 14),
        "visual.cls_embedding": (1, 1, d),
        "visual.pos_embedding": (1, 257, d),
        "visual.head": (d, 16),
        "log_scale": (),
        "textual.token_embedding.weight": (9, 4),
    }
    named |= norm("visual.pre_norm", d) | norm("visual.post_norm", d)
    for i in range(CLIP_LAYERS):
        layer = f"visual.transformer.{i}"
        named |= norm(f"{layer}.norm1", d) | norm(f"{layer}.norm2", d)
        named |= linear(f"{layer}.attn.to_qkv", 3 * d, d) | linear(f"{layer}.attn.proj", d, d)
        named |= linear(f"{layer}.mlp.0", CLIP_FFN, d) | linear(f"{layer}.mlp.2", d, CLIP_FFN)
    return named


@dataclass
class StableRelease:
    """The tensors, by the names in the files; `write` puts them on the disk."""

    square: State
    rec_vec: State
    text: State
    vae: State
    clip: State
    audio: State

    def write(self, root: Path) -> None:
        (root / TRANSFORMERS).mkdir(parents=True)
        torch.save(self.square, root / TRANSFORMERS / "transformer3d-square.pt")
        torch.save({"state_dict": self.rec_vec}, root / TRANSFORMERS / "transformer3d-rec-vec.pt")
        base = root / BASE
        base.mkdir()
        config = tiny.base_config(DIMS) | {"in_dim": 36, "model_type": "i2v"}
        tiny.write_json(base / "config.json", config)
        torch.save(self.text, base / "models_t5_umt5-xxl-enc-bf16.pth")
        torch.save(self.vae, base / "Wan2.1_VAE.pth")
        torch.save(self.clip, base / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
        tiny.write_tokenizer(base / "google" / "umt5-xxl")
        audio = root / FOLDER / "wav2vec2-base-960h"
        audio.mkdir()
        save_file(self.audio, audio / "model.safetensors", {"format": "pt"})
        tiny.write_json(audio / "config.json", tiny.audio_config(DIMS))
        tiny.write_json(audio / "preprocessor_config.json", {"do_normalize": True, "sampling_rate": 16000})


def tiny_stable_release() -> StableRelease:
    """Random tensors, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    return StableRelease(
        square=tiny.random_state(shapes(), generator),
        rec_vec=tiny.random_state(shapes(), generator),
        text=tiny.random_state(tiny.text_shapes(DIMS), generator, torch.bfloat16),
        vae=tiny.random_state(tiny.vae_shapes(DIMS.vae_base), generator),
        clip=tiny.random_state(clip_shapes(), generator, torch.float16),
        audio=tiny.random_state(tiny.wav2vec_shapes(DIMS), generator),
    )
