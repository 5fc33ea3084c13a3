"""The networks whose files we know, as data. Sources: spec/omniavatar.md a.1, a.2, spec/stableavatar.md a.2,
spec/liveavatar.md a and b.7, spec/building-blocks.md 1 and 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from avatarctl.timeline import FPS
from avatarctl.weights.key_map import KeyMap
from avatarctl.weights.layout import Bases, OffsetRule, Sizes, WeightLayout
from avatarctl.weights.wan import UMT5_ENCODER, WAN_IMAGE, WAN_TRANSFORMER

__all__ = [
    "CLIP_WIDTH",
    "COMPONENTS",
    "LAYOUTS",
    "OMNIAVATAR",
    "PATCHED_ADAPTERS",
    "STABLEAVATAR",
    "WAN",
    "unstated_scale",
]

Shapes = dict[str, tuple[int, ...]]

_PATCH: Final = 4  # values per channel in a (1, 2, 2) patch
_FRAMES_PER_LATENT: Final = 4
CLIP_WIDTH: Final = 1280
"""Width of the CLIP features of every published image-to-video model; an adapter does not tell."""

_FLOAT32: Final = ("time_embedding", "modulation", "norm3")
"""Original names of what stays float32 under any run dtype (spec/building-blocks.md 1, trap d)."""


_FLOAT8: Final = r"blocks\.\d+\.((self|cross)_attn\.([qkvo]|[kv]_img)|ffn\.[02])\.weight"
"""Original names of the matrices of a Wan block; those that read audio are not among them."""


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def wan_shapes(sizes: Sizes) -> Shapes:
    """Every tensor of a Wan 2.1 transformer (spec/omniavatar.md a.2)."""
    d = sizes.width
    shapes: Shapes = {
        "patch_embedding.weight": (d, sizes.in_channels, 1, 2, 2),
        "patch_embedding.bias": (d,),
        **_linear("text_embedding.0", d, sizes.text_dim),
        **_linear("text_embedding.2", d, d),
        **_linear("time_embedding.0", d, sizes.freq_dim),
        **_linear("time_embedding.2", d, d),
        **_linear("time_projection.1", 6 * d, d),
        **_linear("head.head", sizes.out_channels * _PATCH, d),
        "head.modulation": (1, 2, d),
    }
    if sizes.image_dim:
        shapes |= {
            **_norm("img_emb.proj.0", sizes.image_dim),
            **_linear("img_emb.proj.1", sizes.image_dim, sizes.image_dim),
            **_linear("img_emb.proj.3", d, sizes.image_dim),
            **_norm("img_emb.proj.4", d),
        }
    for index in range(sizes.layers):
        shapes |= _block(f"blocks.{index}", ("self_attn", "cross_attn"), d, sizes.ffn)
        if sizes.image_dim:
            for projection in ("k_img", "v_img"):
                shapes |= _linear(f"blocks.{index}.cross_attn.{projection}", d, d)
            shapes[f"blocks.{index}.cross_attn.norm_k_img.weight"] = (d,)
    return shapes


def _block(block: str, attentions: tuple[str, ...], d: int, ffn: int) -> Shapes:
    shapes: Shapes = {f"{block}.modulation": (1, 6, d), **_norm(f"{block}.norm3", d)}
    for attention in attentions:
        for projection in "qkvo":
            shapes |= _linear(f"{block}.{attention}.{projection}", d, d)
        for norm in ("norm_q", "norm_k"):
            shapes[f"{block}.{attention}.{norm}.weight"] = (d,)
    return shapes | _linear(f"{block}.ffn.0", ffn, d) | _linear(f"{block}.ffn.2", d, ffn)


def omniavatar_shapes(sizes: Sizes) -> Shapes:
    """A Wan transformer with AudioPack and one projection for each layer that takes audio
    (spec/omniavatar.md a.4)."""
    hidden = sizes.audio_hidden_size
    # No image encoder: the avatar's image comes as input channels (spec/omniavatar.md a.2).
    shapes = wan_shapes(replace(sizes, image_dim=0)) | _linear(
        "audio_proj.proj", hidden, _FRAMES_PER_LATENT * sizes.audio_input_dim
    )
    shapes |= _norm("audio_proj.norm_out", hidden)
    for index in range(sizes.layers // 2 - 1):
        shapes |= _linear(f"audio_cond_projs.{index}", sizes.width, hidden)
    return shapes


def stableavatar_shapes(sizes: Sizes) -> Shapes:
    """An image-to-video Wan transformer with keys and values of audio tokens in every block, and the
    projector that makes these tokens (spec/stableavatar.md a.2, b.2; b.3 if `vocal_hidden_dim` is not 0)."""
    d = sizes.width
    shapes = wan_shapes(replace(sizes, image_dim=sizes.image_dim or CLIP_WIDTH))
    for index in range(sizes.layers):
        for projection in ("k_vocal", "v_vocal"):
            shapes |= _linear(f"blocks.{index}.cross_attn.{projection}", d, d)
    inner = "vocal_projector.proj_model"
    if hidden := sizes.vocal_hidden_dim:
        shapes |= {f"{inner}.proj_1.weight": (hidden, sizes.vocal_dim), f"{inner}.proj_2.weight": (d, hidden)}
        shapes |= _norm(f"{inner}.norm_1", hidden) | _norm(f"{inner}.norm_2", d)
    else:
        shapes |= {f"{inner}.proj.weight": (d, sizes.vocal_dim), **_norm(f"{inner}.norm", d)}
    for index in range(sizes.vocal_layers):
        shapes |= _block(f"vocal_projector.blocks.{index}", ("cross_attn",), d, sizes.vocal_ffn)
    head = "vocal_projector.final_head"
    return shapes | {f"{head}.modulation": (1, 2, d), **_linear(f"{head}.final_proj", d, d)}


_AUDIO = ("audio_proj", "audio_cond_projs")

_WAN_ARGUMENTS: Final = {
    "in_channels": "in_channels", "out_channels": "out_channels", "text_dim": "text_dim",
    "freq_dim": "freq_dim", "ffn_dim": "ffn", "num_layers": "layers",
}  # fmt: skip

OMNIAVATAR: Final = WeightLayout(
    family="omniavatar",
    title="OmniAvatar",
    key_map=WAN_TRANSFORMER + KeyMap(tuple((f"{name}.{{rest}}", f"{name}.{{rest}}") for name in _AUDIO)),
    own=(r"audio_proj\.(proj|norm_out)\.\w+", r"audio_cond_projs\.\d+\.\w+"),
    replaced=("patch_embedding.", "audio_proj.", "audio_cond_projs."),
    channels=(33, 49, 65),
    class_name="OmniAvatarTransformer",
    conventions={"mask_keep": 0, "hole": 0.0, "fps": FPS, "sigma_shift": 5.0},
    # Published image-to-video weights have offset 1, those of the trainer and of video to video 0. The
    # names of tensors are the same, so that only file names tell them apart (spec/omniavatar.md g.6).
    offsets=(
        OffsetRule(0, "a model of the cartoon world", config=("world", None)),
        OffsetRule(0, "video to video", channels=(49, 65)),
        OffsetRule(0, "video to video", config=("v2v", True)),
        OffsetRule(0, "a trainer's file, by its name", file=r"step-\w+(-\d+)?\.pt|trainable_weights\.pt"),
        OffsetRule(
            1,
            "a published release, by its file names",
            config=("train_architecture", None),
            file=r"pytorch_model\.pt",
        ),
        OffsetRule(1, "taken as published image-to-video weights", assumed=True),
    ),
    # A text-to-video model, or one whose patch embedding was widened (spec/omniavatar.md a.2, g.4).
    bases=Bases(
        "text-to-video",
        (16, 33, 49, 65),
        sees=False,
        others=("i2v", "flf2v", "ti2v", "vace", "s2v", "animate"),
    ),
    configured=True,
    repository="https://github.com/Omni-Avatar/OmniAvatar",
    shapes=omniavatar_shapes,
    arguments=_WAN_ARGUMENTS
    | {"audio_input_dim": "audio_input_dim", "audio_hidden_size": "audio_hidden_size"},
    float32=_FLOAT32,
    float8=_FLOAT8,
)

WAN: Final = WeightLayout(
    family="wan",
    title="Wan",
    key_map=WAN_TRANSFORMER + WAN_IMAGE,
    own=(),
    replaced=(),
    channels=(16, 33, 36, 48, 49, 65),
    shapes=wan_shapes,
    arguments=_WAN_ARGUMENTS | {"image_dim": "image_dim"},
    float32=_FLOAT32,
)

_VOCAL: Final = KeyMap(
    (
        ("blocks.{n}.cross_attn.k_vocal.{rest}", "blocks.{n}.attn2.vocal_k.{rest}"),
        ("blocks.{n}.cross_attn.v_vocal.{rest}", "blocks.{n}.attn2.vocal_v.{rest}"),
        ("vocal_projector.{rest}", "vocal_projector.{rest}"),
    )
)

STABLEAVATAR: Final = WeightLayout(
    family="stableavatar",
    title="StableAvatar",
    key_map=WAN_TRANSFORMER + WAN_IMAGE + _VOCAL,
    own=(
        r"vocal_projector\..+", r"blocks\.\d+\.cross_attn\.[kv]_vocal\.\w+",
    ),
    replaced=(),
    channels=(36,),
    class_name="StableAvatarTransformer",
    conventions={"mask_keep": 1, "hole": 0.0, "fps": FPS, "sigma_shift": 5.0},
    offsets=(OffsetRule(0, "that of every published file of this family"),),
    repository="https://github.com/Francis-Rings/StableAvatar",
    shapes=stableavatar_shapes,
    arguments=_WAN_ARGUMENTS | {
        "image_dim": "image_dim", "vocal_dim": "vocal_dim", "vocal_hidden_dim": "vocal_hidden_dim",
        "vocal_layers": "vocal_layers", "vocal_heads": "vocal_heads", "vocal_ffn_dim": "vocal_ffn",
    },
    # Of the projector of audio tokens (spec/stableavatar.md b.2): without its last block the
    # others would look complete.
    assumed={"vocal_layers": 2, "vocal_heads": 8},
    float32=(*_FLOAT32, "time_projection", "norm", "norm_1", "norm_2", "img_emb.proj.0", "img_emb.proj.4"),
    float8=_FLOAT8,
)  # fmt: skip


def _only_named(family: str, title: str, key_map: KeyMap, *own: str) -> WeightLayout:
    """Of files that this version tells apart and does not load."""
    return WeightLayout(family, title, key_map, own, (), (), lambda sizes: {}, supported=False)


_LIVEAVATAR: Final = _only_named(
    "liveavatar", "LiveAvatar or Wan 2.2 S2V", WAN_TRANSFORMER,
    r"audio_injector\..+", r"casual_audio_encoder\..+", r"frame_packer\..+", r"cond_encoder\..+",
    r"trainable_cond_mask\.weight",
)  # fmt: skip

_VACE: Final = _only_named(
    "vace", "Wan VACE", WAN_TRANSFORMER, r"vace_blocks\.\d+\..+", r"vace_patch_embedding\.\w+"
)

LAYOUTS: Final = (OMNIAVATAR, STABLEAVATAR, _LIVEAVATAR, _VACE, WAN)
"""Transformers, plain Wan last: it is what remains when nobody owns a tensor."""


PATCHED_ADAPTERS: Final = OMNIAVATAR
"""Whose adapter a LoRA with a patch embedding is: nothing else widens it (spec/omniavatar.md i)."""

_PUBLISHED_SCALES: Final[Mapping[str, float]] = {OMNIAVATAR.family: 0.5, _LIVEAVATAR.family: 0.5}
"""alpha / rank of the published adapters of a family (spec/omniavatar.md g.4, spec/liveavatar.md b.7)."""


def unstated_scale(layout: WeightLayout, naming: str) -> tuple[float, str]:
    """alpha / rank of a LoRA whose alpha nothing states, and why: the published ratio for tensors that only
    its family has, under the release's names, else 1 (spec/field.md 4a). DiffSynth writes these names too.
    """
    if naming != "original":
        return 1.0, f"1, by {naming} names"
    if scale := _PUBLISHED_SCALES.get(layout.family):
        return scale, f"{scale:g}, the published ratio, as tensors of {layout.title}'s own are in it"
    ratio = _PUBLISHED_SCALES[OMNIAVATAR.family]
    return 1.0, f"1, as nothing in it is {OMNIAVATAR.title}'s own, whose published ratio is {ratio:g}"


_NO_NAMES: Final = KeyMap(())
COMPONENTS: Final = (
    _only_named(
        "component", "UMT5 text encoder", UMT5_ENCODER,
        r"token_embedding\.weight", r"blocks\.\d+\.attn\.[qkvo]\.weight",
        r"blocks\.\d+\.ffn\.gate\.0\.weight", r"shared\.weight", r"encoder\.block\.\d+\.layer\.[01]\..+",
    ),
    _only_named(
        "component", "Wan VAE", _NO_NAMES,
        r"(encoder|decoder)\.(conv1|conv_in|middle\..+|mid_block\..+|(down|up)samples\..+|(down|up)_blocks\..+)"
        r"(\.\w+)?",
    ),
    _only_named(
        "component", "wav2vec 2.0 encoder", _NO_NAMES, r"(wav2vec2\.)?feature_extractor\.conv_layers\..+"
    ),
    _only_named(
        "component", "CLIP vision encoder", _NO_NAMES,
        r"visual\..+", r"(vision_model\.)?embeddings\.patch_embedding\.weight",
    ),
)  # fmt: skip
"""Encoders and decoders around the transformer: recognised, so that a person knows what a file is."""
