"""Which programs take a weight file as it is, as a table of rules.

A program takes the files of its kinds, unless one of its objections applies; the first one that does gives
verdict and reason. "wrong" is the verdict that people need most: the file loads without an error, and
the result is not what it should be.

Sources: spec/omniavatar.md a.2, i, j 19 (published scripts); spec/building-blocks.md 1 and the loaders of
diffusers 0.42.1 (peft.py, lora_pipeline.py, lora_conversion_utils.py, single_file_utils.py);
spec/field.md 4a (ComfyUI, kohya).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from avatarctl.config import keys
from avatarctl.weights.checkpoint import Checkpoint
from avatarctl.weights.layouts import OMNIAVATAR
from avatarctl.weights.published import hash_of

__all__ = ["LOADERS", "Loader", "Verdict", "verdicts"]

Answer = Literal["yes", "wrong", "no", "unknown"]

_SCRIPT_BASES: Final = (
    "9269f8db9040a9d860eaca435be61814",
    "aafcfd9672c3a2456dc46e1cb6e52c70",
    "cb104773c6c2cb6df4f9529ad5c60d0b",
    "9c8818c2cbea55eca56c7b447df170da",
    "ccc42284ea13e1ad04693284c7a09be6",
    "1378ea763357eea97acdef78e65d6d96",
)
"""What the published scripts find by hash and can use: T2V bases, text encoder, VAE (omniavatar.md i)."""

_NOT_TEXT_TO_VIDEO: Final = ("i2v", "flf2v", "ti2v", "vace", "s2v", "animate")
"""`model_type` in Wan's config.json that `merge_adapter` refuses in the base of an avatar."""

_COMFYUI_MODEL: Final = "model.diffusion_model."


@dataclass(frozen=True)
class Objection:
    """Why a program does not take some files. reason: for people, lower case; may name what to do."""

    applies: Callable[[Checkpoint], bool]
    answer: Answer
    reason: str | Callable[[Checkpoint], str]


@dataclass(frozen=True)
class Loader:
    """name: as a person would type it; remark: what a file that it takes still needs."""

    name: str
    kinds: tuple[str, ...]
    objections: tuple[Objection, ...]
    remark: str | Callable[[Checkpoint], str] = ""


@dataclass(frozen=True)
class Verdict:
    """What one program does with one file: "yes", "wrong" (loads, with another result), "no", "unknown"."""

    loader: str
    answer: Answer
    reason: str


def verdicts(checkpoint: Checkpoint) -> tuple[Verdict, ...]:
    """What every program that takes files of this kind does with this one, in the order of the table."""
    return tuple(_verdict(loader, checkpoint) for loader in LOADERS if checkpoint.kind in loader.kinds)


def _verdict(loader: Loader, checkpoint: Checkpoint) -> Verdict:
    for objection in loader.objections:
        if objection.applies(checkpoint):
            return Verdict(loader.name, objection.answer, _told(objection.reason, checkpoint))
    return Verdict(loader.name, "yes", _told(loader.remark, checkpoint))


def _told(text: str | Callable[[Checkpoint], str], checkpoint: Checkpoint) -> str:
    return text if isinstance(text, str) else text(checkpoint)


# Facts about a file


def _has_own_layers(checkpoint: Checkpoint) -> bool:
    return checkpoint.layout.family not in ("wan", "component")


def _is_plain_lora(checkpoint: Checkpoint) -> bool:
    return checkpoint.kind == "adapter" and not _has_own_layers(checkpoint)


def _part(checkpoint: Checkpoint) -> str:
    """The part of `model.weights` that this encoder or decoder is, empty for none."""
    return _PARTS.get(checkpoint.layout.title, "")


_PARTS: Final = {"UMT5 text encoder": "text", "Wan VAE": "vae", "wav2vec 2.0 encoder": "audio"}


def _is_incomplete(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.missing or checkpoint.unknown)


def _is_pickle(checkpoint: Checkpoint) -> bool:
    return checkpoint.format != "safetensors"


def _is_named(*namings: str) -> Callable[[Checkpoint], bool]:
    return lambda checkpoint: checkpoint.naming in namings


def _is_named_otherwise(*namings: str) -> Callable[[Checkpoint], bool]:
    return lambda checkpoint: checkpoint.naming not in namings


def _scales(checkpoint: Checkpoint) -> list[float]:
    return sorted({checkpoint.scale_of(pair) for pair in checkpoint.low_rank.values()})


def _alphas(checkpoint: Checkpoint) -> int:
    return sum(name.endswith(".alpha") for name in checkpoint.names)


def _loses_alpha(checkpoint: Checkpoint) -> bool:
    """Whether a reader that knows alpha from `.alpha` tensors alone would use another scale."""
    return _alphas(checkpoint) < len(checkpoint.low_rank) and _scales(checkpoint) not in ([], [1.0])


def _loses_header_alpha(checkpoint: Checkpoint) -> bool:
    """The same for a reader that knows alpha from diffusers' entry in the header alone."""
    stated = "lora_adapter_metadata" in checkpoint.metadata
    return not stated and _scales(checkpoint) not in ([], [1.0])


def _without_alpha(checkpoint: Checkpoint) -> str:
    scales = " to ".join(f"{scale:g}" for scale in {_scales(checkpoint)[0], _scales(checkpoint)[-1]})
    return f"finds no alpha in it and applies it with scale 1 instead of {scales}"


def _leaves_out(checkpoint: Checkpoint) -> str:
    return f"{len(checkpoint.tensors)} whole tensors (audio, patch embedding) are left out"


def _holds_unmarked_tensors(checkpoint: Checkpoint) -> bool:
    """Whether whole tensors are there that are not called `.set_weight`, as ComfyUI knows them."""
    return sum(name.endswith(".set_weight") for name in checkpoint.names) < len(checkpoint.tensors)


def _cannot_be_converted(checkpoint: Checkpoint) -> bool:
    """Whether diffusers' converters would stop at targets that are in no block."""
    outside = any(not module.startswith("blocks.") for module in checkpoint.low_rank)
    return outside and (checkpoint.naming == "kohya" or _alphas(checkpoint) > 0)


def _is_release(checkpoint: Checkpoint) -> bool:
    """Whether every name is exactly as in the release: no prefix, `.default` in LoRA names."""
    pairs = {
        f"{module}.{part}.default.weight" for module in checkpoint.low_rank for part in ("lora_A", "lora_B")
    }
    return set(checkpoint.names) == pairs | checkpoint.tensors.keys()


def _is_scripts_base(checkpoint: Checkpoint) -> bool:
    return hash_of(checkpoint) in _SCRIPT_BASES


def _has_foreign_prefix(checkpoint: Checkpoint) -> bool:
    """Whether names stand behind something else than nothing or ComfyUI's prefix."""
    names = {name.removeprefix(_COMFYUI_MODEL) for name in checkpoint.names}
    known = set(checkpoint.tensors)
    if checkpoint.naming == "diffusers":
        known = {checkpoint.layout.key_map.to_internal(name) or name for name in known}
    return not names <= known | set(checkpoint.unknown)


def _is_second_half(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.metadata.get("avatarctl.companion_of"))


def _first_half(checkpoint: Checkpoint) -> str:
    return (
        f"the second half of an adapter: name {checkpoint.metadata['avatarctl.companion_of'][:100]}, which "
        "reads both"
    )


def _has_channels_without_code(checkpoint: Checkpoint) -> bool:
    mark = keys()["model.channels"].key.not_yet
    return isinstance(mark, tuple) and checkpoint.sizes.in_channels in mark


def _is_avatar_base(checkpoint: Checkpoint) -> bool:
    """Whether `merge_adapter` would make an avatar of this plain model (spec/omniavatar.md a.2, g.4)."""
    return (
        checkpoint.sizes.in_channels in (16, *OMNIAVATAR.channels)
        and not checkpoint.sizes.image_dim
        and checkpoint.config.get("model_type") not in _NOT_TEXT_TO_VIDEO
    )


def _sees_pictures(checkpoint: Checkpoint) -> bool:
    """Whether a LoRA changes layers that only models with a picture encoder have."""
    changed = (*checkpoint.low_rank, *checkpoint.differences, *checkpoint.tensors)
    return any(name.startswith("img_emb.") or "_img" in name for name in changed)


def _starts_with(*prefixes: str) -> Callable[[Checkpoint], bool]:
    return lambda checkpoint: all(name.startswith(prefixes) for name in checkpoint.names)


def _not(fact: Callable[[Checkpoint], bool]) -> Callable[[Checkpoint], bool]:
    return lambda checkpoint: not fact(checkpoint)


# The table

_NOT_CHECKED = Objection(
    lambda checkpoint: checkpoint.kind != "component" and not checkpoint.layout.supported,
    "unknown",
    lambda checkpoint: f"not checked for {checkpoint.layout.title}",
)
_UNSUPPORTED = Objection(
    lambda checkpoint: not checkpoint.layout.supported,
    "no",
    lambda checkpoint: f"{checkpoint.layout.title} files are recognised but not loaded by this version",
)
_INCOMPLETE = Objection(
    _is_incomplete,
    "no",
    lambda checkpoint: (
        f"{len(checkpoint.missing)} tensor{'' if len(checkpoint.missing) == 1 else 's'} missing, "
        f"{len(checkpoint.unknown)} without a place"
    ),
)
_SECOND_HALF = Objection(_is_second_half, "no", _first_half)
_CHANNELS_WITHOUT_CODE = Objection(
    _has_channels_without_code,
    "no",
    lambda checkpoint: f"{checkpoint.sizes.in_channels} input channels are not yet supported",
)
_CHANNELS_OF_AVATAR = Objection(
    # Those of a plain base do not count: the adapter brings its own patch embedding.
    lambda checkpoint: _has_own_layers(checkpoint) and _has_channels_without_code(checkpoint),
    "no",
    _CHANNELS_WITHOUT_CODE.reason,
)
_NO_AVATAR_BASE = Objection(
    lambda checkpoint: not (_has_own_layers(checkpoint) or _is_avatar_base(checkpoint)),
    "no",
    "it has no audio layers, and avatars are made of text-to-video models only",
)
_SHARDED = Objection(lambda checkpoint: len(checkpoint.files) > 1, "no", "reads one file, not shards")
_WHOLE_TENSORS = Objection(lambda checkpoint: bool(checkpoint.tensors), "wrong", _leaves_out)
_NO_PAIRS = Objection(lambda checkpoint: not checkpoint.low_rank, "no", "there are no LoRA tensors in it")

LOADERS: Final = (
    Loader(
        "avatarctl infer --model",
        ("model", "adapter"),
        (
            _UNSUPPORTED,
            _SECOND_HALF,
            Objection(
                _is_plain_lora, "no", "it changes a model and is none: name it by --lora, beside a --model"
            ),
            _NO_AVATAR_BASE,
            Objection(
                _not(_has_own_layers),
                "no",
                "plain Wan has no audio layers; it is the base that an OmniAvatar adapter needs",
            ),
            _INCOMPLETE,
            _CHANNELS_WITHOUT_CODE,
            Objection(
                lambda checkpoint: checkpoint.kind == "model" and not checkpoint.heads,
                "no",
                "the number of attention heads is not stated (num_heads in config.json)",
            ),
        ),
    ),
    Loader(
        "avatarctl infer --lora",
        ("adapter",),
        (
            _UNSUPPORTED,
            _SECOND_HALF,
            _INCOMPLETE,
            Objection(
                _sees_pictures,
                "no",
                "it changes layers of image-to-video models (k_img, v_img, img_emb), which no avatar has",
            ),
            _CHANNELS_WITHOUT_CODE,
        ),
    ),
    Loader(
        "avatarctl infer -o model.weights",
        ("model",),
        (_UNSUPPORTED, _NO_AVATAR_BASE, _INCOMPLETE, _CHANNELS_OF_AVATAR),
        remark=lambda checkpoint: (
            "as dit=PATH, with its adapter in it"
            if _has_own_layers(checkpoint)
            else "as dit=PATH, the base of an OmniAvatar adapter"
        ),
    ),
    Loader("avatarctl convert-ckpt --base", ("model",), (_UNSUPPORTED, _INCOMPLETE)),
    Loader(
        "avatarctl infer -o model.weights",
        ("component",),
        (Objection(lambda checkpoint: not _part(checkpoint), "no", "no part of a supported model"),),
        remark=lambda checkpoint: f"as {_part(checkpoint)}=PATH",
    ),
    Loader(
        "OmniAvatar scripts, as base",
        ("model", "component"),
        (
            _NOT_CHECKED,
            Objection(_not(_is_scripts_base), "no", "they know base files by their published hash"),
        ),
    ),
    Loader(
        "OmniAvatar scripts, as exp_path",
        ("model", "adapter"),
        (
            _NOT_CHECKED,
            Objection(_not(_has_own_layers), "no", "no audio layers in it"),
            _INCOMPLETE,
            Objection(
                _not(_is_release),
                "no",
                "they know the release's own names (.lora_A.default.weight) and pass over others in silence",
            ),
            Objection(
                lambda checkpoint: [file.name for file in checkpoint.files] != ["pytorch_model.pt"],
                "no",
                "they read pytorch_model.pt in a folder",
            ),
            Objection(
                lambda checkpoint: "train_architecture" not in checkpoint.config,
                "no",
                "they need config.json with train_architecture beside it",
            ),
            Objection(
                lambda checkpoint: checkpoint.sizes.in_channels != 33,
                "no",
                "they prepare 33 channels; video to video needs the training fork",
            ),
        ),
        remark="with the same base model",
    ),
    Loader(
        "diffusers from_single_file",
        ("model",),
        (
            _NOT_CHECKED,
            _SHARDED,
            _INCOMPLETE,
            Objection(_has_foreign_prefix, "no", "the prefix of its names is not known there"),
            Objection(
                _has_own_layers,
                "wrong",
                "WanTransformer3DModel drops the audio layers with no more than a warning",
            ),
        ),
        remark="pass config=FOLDER, otherwise it asks the network",
    ),
    Loader(
        "diffusers from_pretrained",
        ("model",),
        (
            _NOT_CHECKED,
            _INCOMPLETE,
            Objection(_is_named_otherwise("diffusers"), "no", "reads the names of diffusers only"),
            Objection(
                lambda checkpoint: "_class_name" not in checkpoint.config,
                "no",
                "needs a folder with diffusers' config.json",
            ),
            Objection(_has_own_layers, "wrong", "WanTransformer3DModel drops the audio layers"),
        ),
    ),
    Loader(
        "diffusers load_lora_adapter",
        ("adapter",),
        (
            _NOT_CHECKED,
            _NO_PAIRS,
            Objection(
                _is_named_otherwise("diffusers"),
                "no",
                "reads the names of diffusers only; see load_lora_weights",
            ),
            Objection(_is_pickle, "no", "reads safetensors only"),
            Objection(_loses_header_alpha, "wrong", _without_alpha),
            _WHOLE_TENSORS,
        ),
        remark='with use_safetensors=True, else alpha is lost; prefix="transformer" or None, as names begin',
    ),
    Loader(
        "diffusers load_lora_weights",
        ("adapter",),
        (
            _NOT_CHECKED,
            _NO_PAIRS,
            Objection(
                _not(_starts_with("transformer.", "diffusion_model.", "lora_unet_")),
                "no",
                "all names must begin with transformer., diffusion_model. or lora_unet_",
            ),
            Objection(
                lambda checkpoint: bool(checkpoint.tensors), "no", "whole tensors in a LoRA file are refused"
            ),
            Objection(
                lambda checkpoint: checkpoint.naming == "diffusers" and _alphas(checkpoint) > 0,
                "no",
                ".alpha tensors beside the names of diffusers are refused",
            ),
            Objection(
                _cannot_be_converted,
                "no",
                "targets outside the blocks are not converted from kohya's names, nor with .alpha",
            ),
            Objection(
                lambda checkpoint: bool(checkpoint.differences),
                "wrong",
                "of the differences only biases of linear layers are applied",
            ),
            Objection(
                lambda checkpoint: (
                    _loses_header_alpha(checkpoint)
                    if checkpoint.naming == "diffusers"
                    else _loses_alpha(checkpoint)
                ),
                "wrong",
                _without_alpha,
            ),
        ),
    ),
    Loader(
        "PEFT from_pretrained",
        ("adapter",),
        (
            _NOT_CHECKED,
            Objection(_is_named_otherwise("peft"), "no", "names must begin with base_model.model."),
            Objection(
                lambda checkpoint: "peft_type" not in checkpoint.config,
                "no",
                "needs a folder with adapter_config.json",
            ),
        ),
        remark="on a network whose modules have the same names",
    ),
    Loader(
        "ComfyUI diffusion model",
        ("model",),
        (
            _NOT_CHECKED,
            _SHARDED,
            _INCOMPLETE,
            Objection(
                _is_named("diffusers", "peft", "kohya"), "no", "Wan is known there by its original names"
            ),
            Objection(_has_own_layers, "wrong", "its Wan loader leaves out the audio layers"),
        ),
    ),
    Loader(
        "ComfyUI LoRA",
        ("adapter",),
        (
            _NOT_CHECKED,
            Objection(
                _is_named_otherwise("comfyui", "kohya"),
                "no",
                "none of its names is known there: it would warn and change nothing",
            ),
            Objection(_loses_alpha, "wrong", _without_alpha),
            Objection(_holds_unmarked_tensors, "wrong", _leaves_out),
        ),
    ),
    Loader(
        "kohya's scripts (musubi-tuner) LoRA",
        ("adapter",),
        (
            _NOT_CHECKED,
            Objection(_is_named_otherwise("kohya"), "no", "names must begin with lora_unet_"),
            Objection(_loses_alpha, "wrong", _without_alpha),
        ),
    ),
)
