"""Which programs take a weight file as it is, as a table of rules.

A program takes the files of its kinds, unless one of its objections applies; the first one that does gives
verdict and reason. "wrong" is the verdict that people need most: the file loads without an error, and
the result is not what it should be.

Sources: the layouts of the families for their published scripts (`Scripts`); spec/building-blocks.md 1 and
the loaders of diffusers 0.42.1 (peft.py, lora_pipeline.py, lora_conversion_utils.py, single_file_utils.py);
spec/field.md 4a (ComfyUI, kohya).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from avatarctl.weights.diffusers_loras import lets_differences_fall, what_stops_it
from avatarctl.weights.file_facts import (
    alphas,
    as_dit,
    avatars_on,
    changes_own_layers,
    comfyui_knows_prefix,
    comfyui_opens,
    first_half,
    has_channels_without_code,
    has_foreign_prefix,
    has_own_layers,
    holds_release_modules,
    holds_unmarked_tensors,
    is_incomplete,
    is_named,
    is_named_otherwise,
    is_no_models_adapter,
    is_of,
    is_pickle,
    is_release,
    is_second_half,
    is_wrapped,
    leaves_out,
    leaves_out_targets,
    loses_alpha,
    loses_header_alpha,
    negated,
    part,
    sees_images,
    starts_with,
    without_alpha,
)
from avatarctl.weights.layout import Scripts, WeightLayout
from avatarctl.weights.layouts import LAYOUTS
from avatarctl.weights.published import hash_of
from avatarctl.weights.weight_file import WeightFile

__all__ = ["LOADERS", "Loader", "Verdict", "verdicts"]

Answer = Literal["yes", "wrong", "no", "unknown"]


@dataclass(frozen=True)
class Objection:
    """Why a program does not take some files. reason: for people, lower case; may name what to do."""

    applies: Callable[[WeightFile], bool]
    answer: Answer
    reason: str | Callable[[WeightFile], str]


@dataclass(frozen=True)
class Loader:
    """name: as a person would type it; remark: what a file that it takes still needs."""

    name: str
    kinds: tuple[str, ...]
    objections: tuple[Objection, ...]
    remark: str | Callable[[WeightFile], str] = ""


@dataclass(frozen=True)
class Verdict:
    """What one program does with one file: "yes", "wrong" (loads, with another result), "no", "unknown"."""

    loader: str
    answer: Answer
    reason: str


def verdicts(weight_file: WeightFile) -> tuple[Verdict, ...]:
    """What every program that takes files of this kind does with this one, in the order of the table."""
    return tuple(_verdict(loader, weight_file) for loader in LOADERS if weight_file.kind in loader.kinds)


def _verdict(loader: Loader, weight_file: WeightFile) -> Verdict:
    for objection in loader.objections:
        if objection.applies(weight_file):
            return Verdict(loader.name, objection.answer, _told(objection.reason, weight_file))
    return Verdict(loader.name, "yes", _told(loader.remark, weight_file))


def _told(text: str | Callable[[WeightFile], str], weight_file: WeightFile) -> str:
    return text if isinstance(text, str) else text(weight_file)


_BASES: Final = " and ".join(layout.bases.title for layout in LAYOUTS if layout.bases)
_NOT_CHECKED = Objection(
    lambda weight_file: weight_file.kind != "component" and not weight_file.layout.supported,
    "unknown",
    lambda weight_file: f"not checked for {weight_file.layout.title}",
)
_UNSUPPORTED = Objection(
    lambda weight_file: not weight_file.layout.supported,
    "no",
    lambda weight_file: f"{weight_file.layout.title} files are recognised but not loaded by this version",
)
_INCOMPLETE = Objection(
    is_incomplete,
    "no",
    lambda weight_file: (
        f"{len(weight_file.missing)} tensor{'' if len(weight_file.missing) == 1 else 's'} missing, "
        f"{len(weight_file.unknown)} without a place"
    ),
)
_SECOND_HALF = Objection(is_second_half, "no", first_half)
_CHANNELS_WITHOUT_CODE = Objection(
    has_channels_without_code,
    "no",
    lambda weight_file: f"{weight_file.sizes.in_channels} input channels are not yet supported",
)
_CHANNELS_OF_AVATAR = Objection(
    # Those of a plain base do not count: the adapter brings its own patch embedding.
    lambda weight_file: has_own_layers(weight_file) and has_channels_without_code(weight_file),
    "no",
    _CHANNELS_WITHOUT_CODE.reason,
)
_NO_AVATAR_BASE = Objection(
    lambda weight_file: not (has_own_layers(weight_file) or avatars_on(weight_file)),
    "no",
    f"it has no audio layers, and adapters of avatars are made for {_BASES} models only",
)
_HAS_KOHYA_PREFIX: Final = starts_with("lora_unet_")
"""Other trainers of kohya's layout write another: lora_transformer_."""
_WRAPPED = Objection(is_wrapped(), "no", "it opens no dictionary around the tensors")
_WRAPPED_FOR_COMFYUI = Objection(
    negated(comfyui_opens),
    "no",
    "of dictionaries around tensors it opens state_dict, or one that is alone",
)
_COMFYUI_PREFIXES: Final = ("diffusion_model.", "lora_unet_")
_RELEASE_MODULES = Objection(
    lambda weight_file: weight_file.naming == "diffusers" and holds_release_modules(weight_file),
    "no",
    "behind the prefix of diffusers it has the release's names",
)
_SHARDED = Objection(lambda weight_file: len(weight_file.files) > 1, "no", "reads one file, not shards")
_WHOLE_TENSORS = Objection(lambda weight_file: bool(weight_file.tensors), "wrong", leaves_out)
_OWN_TARGETS = Objection(changes_own_layers, "wrong", leaves_out_targets)
_NO_PAIRS = Objection(lambda weight_file: not weight_file.lora_pairs, "no", "there are no LoRA tensors in it")

_SEEING: Final = ", ".join(
    layout.title for layout in LAYOUTS if "image_dim" in layout.arguments and layout.own
)


def _scripts(layout: WeightLayout, scripts: Scripts) -> tuple[Loader, ...]:
    """What the published scripts of a family take."""
    own: list[Objection] = [
        _NOT_CHECKED,
        Objection(negated(has_own_layers), "no", "no audio layers in it"),
        Objection(negated(is_of(layout)), "no", "it is of another family"),
        _INCOMPLETE,
        Objection(
            is_wrapped(*scripts.opens), "no", "they pass over tensors inside of other dictionaries in silence"
        ),
        Objection(
            negated(is_release),
            "no",
            "they know the release's own names (.lora_A.default.weight) and pass over others in silence",
        ),
    ]
    if scripts.file:
        wrong = Objection(
            lambda weight_file: [file.name for file in weight_file.files] != [scripts.file],
            "no",
            f"they read {scripts.file} in a folder",
        )
    else:
        wrong = Objection(
            lambda weight_file: not is_pickle(weight_file) or len(weight_file.files) > 1,
            "no",
            "they read one torch file (.pt)",
        )
    own.append(wrong)
    if scripts.config_field:
        own.append(
            Objection(
                lambda weight_file: scripts.config_field not in weight_file.config,
                "no",
                f"they need config.json with {scripts.config_field} beside it",
            )
        )
    if scripts.channels:
        own.append(
            Objection(
                lambda weight_file: weight_file.sizes.in_channels != scripts.channels,
                "no",
                f"they prepare {scripts.channels} channels; video to video needs the training fork",
            )
        )
    model = Loader(f"{scripts.name}, as {scripts.argument}", scripts.kinds, tuple(own), remark=scripts.remark)
    if not scripts.bases:
        return (model,)
    unknown = Objection(
        lambda weight_file: hash_of(weight_file) not in scripts.bases,
        "no",
        "they know base files by their published hash",
    )
    wrapped = Objection(
        # The published VAE is one.
        lambda weight_file: weight_file.kind == "model" and bool(weight_file.wrappers),
        "no",
        "inside of another dictionary its hash is another",
    )
    return Loader(f"{scripts.name}, as base", ("model", "component"), (_NOT_CHECKED, wrapped, unknown)), model


LOADERS: Final = (
    Loader(
        "avatarctl infer --model",
        ("model", "adapter"),
        (
            _UNSUPPORTED,
            _SECOND_HALF,
            Objection(
                is_no_models_adapter,
                "no",
                "it changes a model and is none: name it by --lora, beside a --model",
            ),
            _NO_AVATAR_BASE,
            Objection(
                negated(has_own_layers),
                "no",
                lambda weight_file: (
                    "plain Wan has no audio layers; it is the base that an adapter of "
                    f"{' or '.join(layout.title for layout in avatars_on(weight_file))} needs"
                ),
            ),
            _INCOMPLETE,
            _CHANNELS_WITHOUT_CODE,
            Objection(
                lambda weight_file: weight_file.kind == "model" and not weight_file.heads,
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
            _CHANNELS_WITHOUT_CODE,
        ),
        remark=lambda weight_file: (
            f"it changes layers for images (k_img, v_img, img_emb), as {_SEEING} has"
            * sees_images(weight_file)
        ),
    ),
    Loader(
        "avatarctl infer --weights",
        ("model",),
        (_UNSUPPORTED, _NO_AVATAR_BASE, _INCOMPLETE, _CHANNELS_OF_AVATAR),
        remark=as_dit,
    ),
    Loader("avatarctl convert-ckpt --base", ("model",), (_UNSUPPORTED, _INCOMPLETE)),
    Loader(
        "avatarctl infer --weights",
        ("component",),
        (Objection(lambda weight_file: not part(weight_file), "no", "no part of a supported model"),),
        remark=lambda weight_file: f"as {part(weight_file)}=PATH",
    ),
    *(loader for layout in LAYOUTS if layout.scripts for loader in _scripts(layout, layout.scripts)),
    Loader(
        "diffusers from_single_file",
        ("model",),
        (
            _NOT_CHECKED,
            _SHARDED,
            _INCOMPLETE,
            Objection(is_wrapped("state_dict"), "no", "of dictionaries around tensors it opens state_dict"),
            Objection(has_foreign_prefix, "no", "the prefix of its names is not known there"),
            Objection(
                has_own_layers,
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
            _WRAPPED,
            Objection(is_named_otherwise("diffusers"), "no", "reads the names of diffusers only"),
            Objection(
                lambda weight_file: "_class_name" not in weight_file.config,
                "no",
                "needs a folder with diffusers' config.json",
            ),
            Objection(has_own_layers, "wrong", "WanTransformer3DModel drops the audio layers"),
        ),
    ),
    Loader(
        "diffusers load_lora_adapter",
        ("adapter",),
        (
            _NOT_CHECKED,
            _NO_PAIRS,
            Objection(
                is_named_otherwise("diffusers"),
                "no",
                "reads the names of diffusers only; see load_lora_weights",
            ),
            _RELEASE_MODULES,
            Objection(is_pickle, "no", "reads safetensors only"),
            Objection(loses_header_alpha, "wrong", without_alpha),
            _WHOLE_TENSORS,
            Objection(
                lambda weight_file: bool(weight_file.differences), "wrong", "the differences are left out"
            ),
            Objection(
                changes_own_layers,
                "wrong",
                lambda weight_file: (
                    f"{leaves_out_targets(weight_file)}; {weight_file.layout.class_name} takes them all"
                ),
            ),
        ),
        remark='with use_safetensors=True, else alpha is lost; prefix="transformer" or None, as names begin',
    ),
    Loader(
        "diffusers load_lora_weights",
        ("adapter",),
        (
            _NOT_CHECKED,
            _NO_PAIRS,
            _WRAPPED,
            Objection(
                negated(starts_with("transformer.", "diffusion_model.", "lora_unet_")),
                "no",
                "all names must begin with transformer., diffusion_model. or lora_unet_",
            ),
            Objection(
                lambda weight_file: bool(weight_file.tensors),
                "no",
                "whole tensors in a LoRA file are refused",
            ),
            Objection(
                lambda weight_file: weight_file.naming == "diffusers" and alphas(weight_file) > 0,
                "no",
                ".alpha tensors beside the names of diffusers are refused",
            ),
            _RELEASE_MODULES,
            Objection(lambda weight_file: bool(what_stops_it(weight_file)), "no", what_stops_it),
            Objection(
                lets_differences_fall,
                "wrong",
                "of the differences only biases of linear layers are applied",
            ),
            Objection(
                lambda weight_file: (
                    loses_header_alpha(weight_file)
                    if weight_file.naming == "diffusers"
                    else loses_alpha(weight_file)
                ),
                "wrong",
                without_alpha,
            ),
            _OWN_TARGETS,
        ),
    ),
    Loader(
        "PEFT from_pretrained",
        ("adapter",),
        (
            _NOT_CHECKED,
            _WRAPPED,
            Objection(is_named_otherwise("peft"), "no", "names must begin with base_model.model."),
            Objection(
                lambda weight_file: "peft_type" not in weight_file.config,
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
            _WRAPPED_FOR_COMFYUI,
            Objection(
                is_named("diffusers", "peft", "kohya"), "no", "Wan is known there by its original names"
            ),
            Objection(negated(comfyui_knows_prefix), "no", "the prefix of its names is not known there"),
            Objection(has_own_layers, "wrong", "its Wan loader leaves out the audio layers"),
        ),
    ),
    Loader(
        "ComfyUI LoRA",
        ("adapter",),
        (
            _NOT_CHECKED,
            _WRAPPED_FOR_COMFYUI,
            Objection(
                lambda weight_file: not any(name.startswith(_COMFYUI_PREFIXES) for name in weight_file.names),
                "no",
                "none of its names is known there: it would warn and change nothing",
            ),
            Objection(loses_alpha, "wrong", without_alpha),
            Objection(holds_unmarked_tensors, "wrong", leaves_out),
            _OWN_TARGETS,
        ),
    ),
    Loader(
        "kohya's scripts (musubi-tuner) LoRA",
        ("adapter",),
        (
            _NOT_CHECKED,
            Objection(negated(_HAS_KOHYA_PREFIX), "no", "names must begin with lora_unet_"),
            Objection(loses_alpha, "wrong", without_alpha),
        ),
    ),
)
