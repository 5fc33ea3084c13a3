"""Every row, as data. Sources: spec/weight-sources.md for the files; an empty hub id means that nobody
confirmed one. spec/omniavatar.md c, spec/stableavatar.md e, f, k for what the models were trained for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from avatarctl.registry import defaults, networks
from avatarctl.registry.row import ENCODER_FILES, NEEDS_WEIGHTS, NOT_YET, WORKS, Row, TrainedFor, VideoShape

__all__ = ["JUDGES", "MODELS", "ROWS"]

_OMNIAVATAR_TRAINED: Final = TrainedFor(
    sizes=((720, 400), (720, 720), (400, 720), (960, 528), (528, 960), (1280, 720), (720, 1280)),
    overlap_frames=(1, 13),
)

_WAN21_ENCODERS: Final = tuple(name for part, name in ENCODER_FILES.items() if part != "clip")


def _shards(count: int) -> tuple[str, ...]:
    names = (f"diffusion_pytorch_model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1))
    return (*names, "diffusion_pytorch_model.safetensors.index.json")


_WHOLE: Final = "diffusion_pytorch_model.safetensors"
_WHOLE_ADAPTER: Final = {"pytorch_model.pt": "pytorch_model.safetensors"}

_FUN: Final = "Wan2.1-Fun-V1.1-1.3B-InP/"


def _stableavatar(
    name: str, file: str, made_for: VideoShape, values: Mapping[str, Any], instead: tuple[str, ...] = ()
) -> Row:
    """The model as it is published for one shape of video."""
    path = f"StableAvatar-1.3B/{file}"
    return Row(
        name, "model", f"StableAvatar on Wan 2.1 Fun InP 1.3B, for {made_for} videos", NEEDS_WEIGHTS,
        hub_id="FrancisRing/StableAvatar",
        files=(f"{path}.pt",),
        stand_ins={f"{path}.pt": f"{path}.safetensors"},
        made_for=made_for,
        instead=instead,
        family="stableavatar",
        network=networks.STABLEAVATAR_1_3B,
        defaults=values,
        compat=defaults.STABLEAVATAR_COMPAT,
        trained_for=TrainedFor(sizes=((512, 512), (480, 832), (832, 480)), num_frames=(81,)),
        needs=("wan2.1-fun-1.3b-inp-encoders", "wav2vec2-base-960h"),
    )  # fmt: skip


_CARTOON_SHA256: Final = {
    "cartoon/dit_i2v.safetensors": "5431cb91af80c01196cc53e272e0ff0b29d357cad04861daf8af877b7a442dd9",
    "cartoon/dit_v2v.safetensors": "63e3a23ddecfda3d389b03e3c7fb8fd5e7d1806eb43b37c691a94c402a8b7c47",
    "cartoon/vae.safetensors": "88881aa222aa2465497ee2f58cbb0d6f938ff485768636a28267f31794a8fd14",
    "cartoon/config.json": "11ec7ca3d99702b704b6fce40781b19bd615d5f819898890a3a90e63f5566f70",
    "cartoon/audio.safetensors": "c4f920301b85f05a74989e8d273f99cb06e869e8e12e7f13614300c9429edbc7",
    "cartoon/text.safetensors": "8992aac626b8f75fa076b3e209a64959f57b3c82d0844c6fbcedd70bc977f460",
    "cartoon/syncnet.safetensors": "21fdbbaa0dbef5b4fb12b9eeb60cd146f40ce4ac2bc2aa99daf7d3f7d01f8e16",
}
"""`config.json` is the VAE's, whose latents have a mean and deviation of their own."""


def _cartoon(transformer: str) -> dict[str, str]:
    """Digests of one transformer and of what both share."""
    return {
        name: digest
        for name, digest in _CARTOON_SHA256.items()
        if name == transformer or not name.startswith("cartoon/dit_")
    }


_CARTOON_I2V: Final = _cartoon("cartoon/dit_i2v.safetensors")
_CARTOON_V2V: Final = _cartoon("cartoon/dit_v2v.safetensors")
_CARTOON_TRAINED: Final = TrainedFor(
    sizes=((64, 64),), num_frames=(33,), overlap_frames=(1, 5), shifts=(5.0,), guidance_scales=(1.0,)
)

MODELS: Final = (
    Row(
        "cartoon-i2v", "model", "built-in cartoon model, image and voice to video", WORKS, "package",
        files=tuple(_CARTOON_I2V),
        sha256=_CARTOON_I2V,
        world="cartoon",
        family="omniavatar",
        network=networks.CARTOON,
        defaults=defaults.CARTOON,
        audio_offset_stated=True,
        trained_for=_CARTOON_TRAINED,
    ),
    Row(
        "cartoon-v2v", "model", "built-in cartoon model, video and voice to video", WORKS, "package",
        files=tuple(_CARTOON_V2V),
        sha256=_CARTOON_V2V,
        world="cartoon",
        family="omniavatar",
        network=networks.CARTOON_V2V,
        defaults=defaults.CARTOON_V2V,
        audio_offset_stated=True,
        trained_for=_CARTOON_TRAINED,
    ),
    Row(
        "omniavatar-14b", "model", "OmniAvatar on Wan 2.1 T2V 14B", NEEDS_WEIGHTS,
        family="omniavatar",
        network=networks.OMNIAVATAR_14B,
        defaults=defaults.OMNIAVATAR,
        trained_for=_OMNIAVATAR_TRAINED,
        needs=("wan2.1-t2v-14b", "omniavatar-14b-adapter", "wav2vec2-base-960h"),
    ),
    Row(
        "omniavatar-1.3b", "model", "OmniAvatar on Wan 2.1 T2V 1.3B", NEEDS_WEIGHTS,
        family="omniavatar",
        network=networks.OMNIAVATAR_1_3B,
        defaults=defaults.OMNIAVATAR,
        trained_for=_OMNIAVATAR_TRAINED,
        needs=("wan2.1-t2v-1.3b", "omniavatar-1.3b-adapter", "wav2vec2-base-960h"),
    ),
    _stableavatar(
        "stableavatar-1.3b", "transformer3d-square", "square", defaults.STABLEAVATAR,
        instead=("stableavatar-1.3b-rec-vec",),
    ),
    _stableavatar(
        "stableavatar-1.3b-rec-vec", "transformer3d-rec-vec", "landscape or portrait",
        defaults.STABLEAVATAR_OBLONG,
    ),
    Row(
        "stableavatar-tiny", "model", "untrained miniature of StableAvatar, for tests", WORKS, "package",
        family="stableavatar",
        network=networks.STABLEAVATAR_TINY,
        defaults=defaults.STABLEAVATAR_TINY,
        compat=defaults.STABLEAVATAR_COMPAT,
        trained=False,
    ),
    Row(
        "liveavatar-14b", "model", "LiveAvatar on Wan 2.2 S2V 14B", NOT_YET,
        family="liveavatar",
        needs=("wan2.2-s2v-14b", "liveavatar-adapter"),
    ),
)  # fmt: skip


def _packaged_face(name: str, title: str, file: str, digest: str) -> Row:
    """A face network of MediaPipe; source and licence are in the NOTICE."""
    return Row(
        name, "detector", title, WORKS, "package", files=(file,), sha256={file: digest}, license="Apache-2.0",
    )  # fmt: skip


_FILES: Final = (
    Row(
        "wan2.1-t2v-14b", "base", "Wan 2.1 text to video 14B, with text encoder and VAE", NEEDS_WEIGHTS,
        hub_id="Wan-AI/Wan2.1-T2V-14B", files=(*_shards(6), *_WAN21_ENCODERS),
        stand_ins=dict.fromkeys(_shards(6), _WHOLE),
    ),
    Row(
        "wan2.1-t2v-1.3b", "base", "Wan 2.1 text to video 1.3B, with text encoder and VAE", NEEDS_WEIGHTS,
        hub_id="Wan-AI/Wan2.1-T2V-1.3B", files=(_WHOLE, *_WAN21_ENCODERS),
        stand_ins={_WHOLE: f"{_WHOLE}.index.json"},
    ),
    Row(
        "wan2.1-fun-1.3b-inp", "base", "Wan 2.1 Fun InP 1.3B, with its encoders and VAE", NEEDS_WEIGHTS,
        hub_id="FrancisRing/StableAvatar", files=(_FUN,),
    ),
    Row(
        "wan2.1-fun-1.3b-inp-encoders", "encoder", "text encoder, image encoder and VAE of Wan 2.1 Fun InP",
        NEEDS_WEIGHTS, hub_id="FrancisRing/StableAvatar",
        files=tuple(f"{_FUN}{name}" for name in ENCODER_FILES.values()),
    ),
    Row(
        "wan2.2-s2v-14b", "base", "Wan 2.2 speech to video 14B", NOT_YET,
        hub_id="Wan-AI/Wan2.2-S2V-14B",
        files=(*_shards(4), *_WAN21_ENCODERS, "wav2vec2-large-xlsr-53-english/"),
    ),
    Row(
        "omniavatar-14b-adapter", "adapter", "LoRA, audio layers and patch embedding of OmniAvatar 14B",
        NEEDS_WEIGHTS, hub_id="OmniAvatar/OmniAvatar-14B", files=("config.json", "pytorch_model.pt"),
        stand_ins=_WHOLE_ADAPTER,
    ),
    Row(
        "omniavatar-1.3b-adapter", "adapter", "LoRA, audio layers and patch embedding of OmniAvatar 1.3B",
        NEEDS_WEIGHTS, hub_id="OmniAvatar/OmniAvatar-1.3B", files=("config.json", "pytorch_model.pt"),
        stand_ins=_WHOLE_ADAPTER,
    ),
    Row(
        "liveavatar-adapter", "adapter", "LoRA of LiveAvatar", NOT_YET,
        hub_id="Quark-Vision/Live-Avatar", files=("liveavatar.safetensors",),
    ),
    Row(
        "wav2vec2-base-960h", "encoder", "wav2vec 2.0 base", NEEDS_WEIGHTS,
        hub_id="facebook/wav2vec2-base-960h",
        files=("config.json", "model.safetensors|pytorch_model.bin", "preprocessor_config.json"),
        part="audio", copies=(("FrancisRing/StableAvatar", "wav2vec2-base-960h"),),
    ),
    Row(
        "stable-syncnet", "loss", "StableSyncNet, judge of the sync loss", NEEDS_WEIGHTS,
        hub_id="ByteDance/LatentSync-1.6", files=("stable_syncnet.pt",), part="syncnet",
    ),
    Row(
        "videomae-v2-g", "loss", "VideoMAE v2 ViT-g, features of TREPA", NEEDS_WEIGHTS,
        files=("vit_g_hybrid_pt_1200e_ssv2_ft.pth",), part="videomae",
    ),
    Row(
        "lpips-vgg16", "loss", "VGG-16 trunk of LPIPS", NEEDS_WEIGHTS, "other",
        files=("vgg16-397923af.pth",), obtained="torchvision's published file", part="lpips_vgg",
    ),
    Row("syncnet-v2", "metric", "SyncNet v2, for Sync-C and Sync-D", NOT_YET, files=("syncnet_v2.model",)),
    _packaged_face("blazeface", "BlazeFace short range, finds faces", "faces/blazeface_short.safetensors",
                   "6146163a5c0ba9ad4e5606251d54053568b4e4c830cc6d314ddbbf11151cf8b6"),
    _packaged_face("face-mesh", "face mesh, 468 points of a face", "faces/face_mesh_468.safetensors",
                   "c8f6e7ba0bf7ffce7e1d7da920285d56d3db27a3b612cc38ff209db74de023d1"),
    Row("yunet", "detector", "YuNet face detector", NOT_YET, files=("face_detection_yunet_2023mar.onnx",)),
    Row(
        "buffalo-l", "detector", "insightface buffalo_l face detector", NOT_YET, "other",
        files=("models/buffalo_l/",), obtained="the insightface package", license="non-commercial",
    ),
    Row(
        "kim-vocal-2", "separator", "MDX vocal separator", NEEDS_WEIGHTS,
        hub_id="FrancisRing/StableAvatar", files=("Kim_Vocal_2.onnx",),
    ),
)  # fmt: skip

ROWS: Final[Mapping[str, Row]] = {row.name: row for row in (*MODELS, *_FILES)}
"""Every row by name, models first."""

JUDGES: Final[Mapping[str, Row]] = {row.part: row for row in _FILES if row.kind == "loss"}
"""Rows of the networks behind auxiliary losses, by their part of `model.weights`."""

_PROFILED_VIDEO: Final = (
    "model.channels=49", "model.audio_offset=0", "data.width=512", "data.height=512", "data.num_frames=81",
)  # fmt: skip

PROFILED_MODEL: Final = "omniavatar-14b"
"""Of `avatarctl vram-profile` where nobody names a model."""

PROFILED: Final[tuple[tuple[Literal["infer", "train i2v", "train v2v"], str, tuple[str, ...]], ...]] = (
    ("infer", "stableavatar-1.3b", ()),
    ("infer", "omniavatar-1.3b", ("long_video.num_frames=81",)),
    ("infer", "omniavatar-14b", ("long_video.num_frames=81",)),
    ("train v2v", "omniavatar-1.3b", _PROFILED_VIDEO),
    ("train v2v", "omniavatar-14b", _PROFILED_VIDEO),
    ("train v2v", "omniavatar-1.3b", (*_PROFILED_VIDEO, "aux.losses=sync,lpips,trepa")),
    ("train v2v", "omniavatar-14b", (*_PROFILED_VIDEO, "aux.losses=sync,lpips,trepa")),
)
"""Command, model and settings of each row of its table."""
