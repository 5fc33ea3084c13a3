"""Which models, encoders and other published files exist: rows of data, no classes of networks.

Sources: spec/omniavatar.md 0, a.1, c, d and spec/stableavatar.md a.1, b.2, d, f, k for dimensions and
defaults, spec/cartoon-world.md 3 to 5 for the built-in model, spec/weight-sources.md for the files. An empty
hub id means that nobody confirmed one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from avatarctl.config import ModelRowDefaults, RunConfig, Setting, nearest, read_assignment, resolve
from avatarctl.errors import ConfigError

__all__ = [
    "COMPAT",
    "ENCODER_FILES",
    "ROWS",
    "Row",
    "TrainedFor",
    "VideoShape",
    "Wanted",
    "configure",
    "encoder_part",
    "find",
    "find_model",
    "outside_training",
]

Kind = Literal["model", "base", "adapter", "encoder", "loss", "metric", "detector", "separator"]
Status = Literal["works", "needs weights", "not yet supported"]
VideoShape = Literal["square", "landscape or portrait"]


@dataclass(frozen=True)
class TrainedFor:
    """What a model saw in training or is published with; other values run, with a notice.

    sizes: (width, height) in pixels; num_frames, overlap_frames: pixel frames. Empty means unknown.
    """

    sizes: tuple[tuple[int, int], ...] = ()
    num_frames: tuple[int, ...] = ()
    overlap_frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """One thing that can be named.

    source:  "package" needs no file; "hub" is a repository; "other" is described by `obtained`; "path" is a
             file or folder that a person named, see `path`; only rows of weights/model_row.py have it.
    files:   names relative to the repository; "a|b" is satisfied by either, a trailing "/" is a folder.
    stand_ins: names in `files` -> the name under which `avatarctl convert-ckpt` may have written the same.
    network: constructor arguments by part: "dit" (the family's transformer), "vae" (`AutoencoderKLWan`),
             "text" (`UMT5Config`), "audio" (`Wav2Vec2Config`), "clip" (`clip_config`), if there is one.
    defaults: RunConfig values by dotted key.
    audio_offset_stated: the weights themselves say which audio offset they were made with.
    compat:  what each `model.compat` sets for this model; None for `COMPAT`.
    needs:   names of the rows whose files it needs as well.
    part:    the part of a run that the folder of an encoder is, empty where each file is a part of its own.
    made_for: ends of file names -> the shape of the videos that these weights were trained for.
    copies:  (repository, folder in it) that hold the same files.
    path:    of the transformer's file, absolute, where the source is "path".
    """

    name: str
    kind: Kind
    title: str
    status: Status
    source: Literal["package", "hub", "other", "path"] = "hub"
    hub_id: str = ""
    files: tuple[str, ...] = ()
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    obtained: str = ""
    license: str = ""
    family: str = ""
    network: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    audio_offset_stated: bool = False
    compat: Mapping[str, Mapping[str, Any]] | None = None
    trained: bool = True
    trained_for: TrainedFor = TrainedFor()
    needs: tuple[str, ...] = ()
    part: str = ""
    made_for: Mapping[str, VideoShape] = field(default_factory=dict)
    copies: tuple[tuple[str, str], ...] = ()
    path: str = ""

    @property
    def folder(self) -> str:
        """Name of the folder that holds its files below a weights root."""
        return self.hub_id.rpartition("/")[2] or self.name

    def accepted(self, names: str) -> str:
        """A name of `files` with what may stand in for it on a disk, as "a|b"; a hub has the former only."""
        return f"{names}|{self.stand_ins[names]}" if names in self.stand_ins else names

    @property
    def width(self) -> int:
        """Width of the transformer, 0 for rows that do not state it."""
        dit = self.network.get("dit", {})
        return int(dit.get("num_attention_heads", 0)) * int(dit.get("attention_head_dim", 0))

    @property
    def for_config(self) -> ModelRowDefaults:
        """What `avatarctl.config.resolve` needs of it."""
        return ModelRowDefaults(self.name, self.defaults, self.audio_offset_stated, self.compat)


@dataclass(frozen=True)
class Wanted:
    """A file that is not there: its name in the repository, the folder it goes to, the repository."""

    file: str
    folder: str
    hub_id: str


COMPAT: Final[Mapping[str, Mapping[str, Any]]] = {
    "reference": {"output.lead_silence": 0.3, "model.audio_offset": 1},
    "fork": {"model.audio_offset": 0},
}
"""What each `model.compat` sets, above the model row and below everything that a person sets."""

WORKS: Final[Status] = "works"
NEEDS_WEIGHTS: Final[Status] = "needs weights"
NOT_YET: Final[Status] = "not yet supported"

PROMPT: Final = "a person is talking"
NEGATIVE_PROMPT: Final = (
    "Vivid color tones, background/camera moving quickly, screen switching, subtitles and special effects, "
    "mutation, overexposed, static, blurred details, subtitles, style, work, painting, image, still, "
    "overall grayish, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, "
    "poorly drawn hands, poorly drawn face, deformed, disfigured, malformed limbs, fingers merging, "
    "motionless image, chaotic background, three legs, crowded background with many people, walking backward"
)

WAN_NEGATIVE_PROMPT: Final = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Wan 2.1's own, with which its image-to-video models are used."""

_CARTOON_NETWORK: Final[Mapping[str, Mapping[str, Any]]] = {
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
}  # fmt: skip


_PUBLISHED_ENCODERS: Final[Mapping[str, Mapping[str, Any]]] = {
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


def _omniavatar_network(heads: int, layers: int, ffn_dim: int) -> dict[str, Mapping[str, Any]]:
    """The published network; only the transformer differs between the two sizes."""
    return {
        "dit": {
            "num_attention_heads": heads, "attention_head_dim": 128, "num_layers": layers, "ffn_dim": ffn_dim,
            "freq_dim": 256, "text_dim": 4096, "in_channels": 33, "out_channels": 16, "audio_hidden_size": 32,
            "audio_input_dim": 14 * 768,
        },
        **_PUBLISHED_ENCODERS,
    }  # fmt: skip


_STABLEAVATAR_NETWORK: Final[Mapping[str, Mapping[str, Any]]] = {
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

_STABLEAVATAR_TINY: Final[Mapping[str, Mapping[str, Any]]] = {
    "dit": {
        "num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 192, "freq_dim": 64,
        "text_dim": 32, "in_channels": 36, "out_channels": 16, "image_dim": 32, "vocal_dim": 48,
        "vocal_heads": 8, "vocal_layers": 2, "vocal_ffn_dim": 192,
    },
    **{part: _CARTOON_NETWORK[part] for part in ("vae", "text", "audio")},
    "clip": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 14,
    },
}  # fmt: skip
"""The published network with every width made small."""


_OMNIAVATAR_DEFAULTS: Final[Mapping[str, Any]] = {
    "model.channels": 33,
    "model.audio_offset": 1,
    "input.prompt": PROMPT,
    "input.negative_prompt": NEGATIVE_PROMPT,
    "sampling.steps": 50,
    "sampling.guidance_scale": 4.5,
    "sampling.shift": 5.0,
    "long_video.overlap_frames": 13,
    "long_video.max_tokens": 30_000,
    "long_video.max_size": 720,
    "data.num_frames": 81,
    "data.width": 512,
    "data.height": 512,
    "runtime.dtype": "bfloat16",
}

_OMNIAVATAR_TRAINED: Final = TrainedFor(
    sizes=((720, 400), (720, 720), (400, 720), (960, 528), (528, 960), (1280, 720), (720, 1280)),
    overlap_frames=(1, 13),
)

_STABLEAVATAR_COMPAT: Final[Mapping[str, Mapping[str, Any]]] = {"reference": {"input.fit": "stretch"}}
"""All other differences are in numbers. The rounding of latents is a setting of its own."""

_STABLEAVATAR_DEFAULTS: Final[Mapping[str, Any]] = {
    "model.channels": 36,
    "model.audio_offset": 0,
    "input.prompt": "The protagonist is talking",
    "input.negative_prompt": WAN_NEGATIVE_PROMPT,
    "sampling.steps": 50,
    "sampling.guidance_scale": 5.0,
    "sampling.audio_guidance_scale": 4.0,
    "sampling.shift": 5.0,
    "long_video.strategy": "fused",
    "long_video.num_frames": 81,
    "long_video.overlap_frames": 37,
    "output.width": 512,
    "output.height": 512,
    "data.num_frames": 81,
    "data.width": 512,
    "data.height": 512,
    "runtime.dtype": "bfloat16",
}

ENCODER_FILES: Final[Mapping[str, str]] = {
    "text": "models_t5_umt5-xxl-enc-bf16.pth",
    "vae": "Wan2.1_VAE.pth",
    "tokenizer": "google/umt5-xxl/",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}
"""What stands beside the transformer in Wan releases, by part; "clip" in those that look at a picture."""


def encoder_part(name: str) -> str:
    """The part of a run that a file of a release is, in whatever folder of it; empty for none."""
    return next((part for part, file in ENCODER_FILES.items() if f"/{name}".endswith(f"/{file}")), "")


_WAN21_ENCODERS: Final = tuple(name for part, name in ENCODER_FILES.items() if part != "clip")


def _shards(count: int) -> tuple[str, ...]:
    names = (f"diffusion_pytorch_model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1))
    return (*names, "diffusion_pytorch_model.safetensors.index.json")


_WHOLE: Final = "diffusion_pytorch_model.safetensors"
_WHOLE_ADAPTER: Final = {"pytorch_model.pt": "pytorch_model.safetensors"}

_STABLEAVATAR_FILE: Final = (
    "StableAvatar-1.3B/transformer3d-square.pt|StableAvatar-1.3B/transformer3d-rec-vec.pt"
)
_FUN: Final = "Wan2.1-Fun-V1.1-1.3B-InP/"

_MODELS: Final = (
    Row(
        "cartoon-i2v", "model", "built-in cartoon model, picture and voice to video", WORKS, "package",
        family="omniavatar",
        network=_CARTOON_NETWORK,
        defaults={
            "model.channels": 33,
            "model.audio_offset": 0,
            "input.prompt": PROMPT,
            "input.negative_prompt": "",
            "sampling.steps": 4,
            "sampling.guidance_scale": 1.0,
            "sampling.shift": 5.0,
            "long_video.num_frames": 33,
            "long_video.overlap_frames": 1,
            "output.width": 64,
            "output.height": 64,
            "data.num_frames": 33,
            "data.width": 64,
            "data.height": 64,
            "runtime.dtype": "float32",
        },
        audio_offset_stated=True,
        trained=False,
        trained_for=TrainedFor(sizes=((64, 64),), num_frames=(33,), overlap_frames=(1,)),
    ),
    Row(
        "omniavatar-14b", "model", "OmniAvatar on Wan 2.1 T2V 14B", NEEDS_WEIGHTS,
        family="omniavatar",
        network=_omniavatar_network(heads=40, layers=40, ffn_dim=13_824),
        defaults=_OMNIAVATAR_DEFAULTS,
        trained_for=_OMNIAVATAR_TRAINED,
        needs=("wan2.1-t2v-14b", "omniavatar-14b-adapter", "wav2vec2-base-960h"),
    ),
    Row(
        "omniavatar-1.3b", "model", "OmniAvatar on Wan 2.1 T2V 1.3B", NEEDS_WEIGHTS,
        family="omniavatar",
        network=_omniavatar_network(heads=12, layers=30, ffn_dim=8960),
        defaults=_OMNIAVATAR_DEFAULTS,
        trained_for=_OMNIAVATAR_TRAINED,
        needs=("wan2.1-t2v-1.3b", "omniavatar-1.3b-adapter", "wav2vec2-base-960h"),
    ),
    Row(
        "stableavatar-1.3b", "model", "StableAvatar on Wan 2.1 Fun InP 1.3B", NEEDS_WEIGHTS,
        hub_id="FrancisRing/StableAvatar",
        files=(_STABLEAVATAR_FILE,),
        stand_ins={_STABLEAVATAR_FILE: _STABLEAVATAR_FILE.replace(".pt", ".safetensors")},
        made_for={"transformer3d-square": "square", "transformer3d-rec-vec": "landscape or portrait"},
        family="stableavatar",
        network=_STABLEAVATAR_NETWORK,
        defaults=_STABLEAVATAR_DEFAULTS,
        compat=_STABLEAVATAR_COMPAT,
        trained_for=TrainedFor(sizes=((512, 512), (480, 832), (832, 480)), num_frames=(81,)),
        needs=("wan2.1-fun-1.3b-inp-encoders", "wav2vec2-base-960h"),
    ),
    Row(
        "stableavatar-tiny", "model", "untrained miniature of StableAvatar, for tests", WORKS, "package",
        family="stableavatar",
        network=_STABLEAVATAR_TINY,
        defaults={
            **_STABLEAVATAR_DEFAULTS,
            "sampling.steps": 4,
            "long_video.num_frames": 17,
            "long_video.overlap_frames": 5,
            "output.width": 64,
            "output.height": 64,
            "data.num_frames": 17,
            "data.width": 64,
            "data.height": 64,
            "runtime.dtype": "float32",
        },
        compat=_STABLEAVATAR_COMPAT,
        trained=False,
    ),
    Row(
        "liveavatar-14b", "model", "LiveAvatar on Wan 2.2 S2V 14B", NOT_YET,
        family="liveavatar",
        needs=("wan2.2-s2v-14b", "liveavatar-adapter"),
    ),
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
        "stable-syncnet", "loss", "StableSyncNet, judge of the sync loss", NOT_YET,
        hub_id="ByteDance/LatentSync-1.6", files=("stable_syncnet.pt",),
    ),
    Row(
        "videomae-v2-g", "loss", "VideoMAE v2 ViT-g, features of TREPA", NOT_YET,
        files=("vit_g_hybrid_pt_1200e_ssv2_ft.pth",),
    ),
    Row(
        "lpips-vgg16", "loss", "VGG-16 trunk of LPIPS", NOT_YET, "other",
        files=("vgg16-397923af.pth",), obtained="torchvision's published file",
    ),
    Row("syncnet-v2", "metric", "SyncNet v2, for Sync-C and Sync-D", NOT_YET, files=("syncnet_v2.model",)),
    Row("yunet", "detector", "YuNet face detector", NOT_YET, files=("face_detection_yunet_2023mar.onnx",)),
    Row(
        "buffalo-l", "detector", "insightface buffalo_l face detector", NOT_YET, "other",
        files=("models/buffalo_l/",), obtained="the insightface package", license="non-commercial",
    ),
    Row(
        "kim-vocal-2", "separator", "MDX vocal separator", NOT_YET,
        hub_id="FrancisRing/StableAvatar", files=("Kim_Vocal_2.onnx",),
    ),
)  # fmt: skip

ROWS: Final[Mapping[str, Row]] = {row.name: row for row in (*_MODELS, *_FILES)}
"""Every row by name, models first."""


def find(name: str) -> Row:
    """The row of this name. Raises ConfigError with the nearest name."""
    if name in ROWS:
        return ROWS[name]
    like = nearest(name, ROWS)
    raise ConfigError(
        f"there is no model {name[:100]!r}",
        fix=f"did you mean {like}?" if like else "`avatarctl models list` shows all",
    )


def find_model(name: str) -> Row:
    """The row of a registry name that can run; weights/model_row.py reads paths as well.

    Raises ConfigError for unknown names and for rows that are no models.
    """
    row = find(name)
    if row.kind != "model":
        users = [model.name for model in _MODELS if name in model.needs]
        raise ConfigError(
            f"model.name {name} is a row of kind {row.kind}, which cannot run alone",
            fix=f"did you mean {users[0]}?" if users else None,
        )
    return row


def configure(
    *assignments: str, origin: str = "configure", row_named: Callable[[str], Row] = find_model
) -> RunConfig:
    """The resolved configuration of a run from `section.key=value` texts; the library's short way.

    row_named: finds the row of `model.name`; `weights.model_row.row_named` takes files and folders as well.
    Raises ConfigError for unknown keys, wrong types and impossible values.
    """
    asked: dict[str, Setting] = {}
    for dotted, setting in (read_assignment(text, origin) for text in assignments):
        if isinstance(setting.value, Mapping) and dotted in asked:  # one part of `model.weights` at a time
            setting = Setting({**asked[dotted].value, **setting.value}, origin)
        asked[dotted] = setting
    return resolve(lambda name: row_named(name).for_config, COMPAT, None, asked).cfg


def outside_training(
    row: Row, *, width: int, height: int, num_frames: int, overlap_frames: int | None
) -> tuple[str, ...]:
    """One line for each value that the row's model was not trained for; sizes in pixels and pixel frames,
    None for an overlap that is not used."""
    known = row.trained_for
    checks = (
        (f"size {width}x{height}", (width, height), known.sizes),
        (f"{num_frames} frames at a time", num_frames, known.num_frames),
        (f"overlap {overlap_frames}", overlap_frames, known.overlap_frames),
    )
    return tuple(
        f"{row.name} was not trained for {what}"
        for what, value, seen in checks
        if seen and value is not None and value not in seen
    )
