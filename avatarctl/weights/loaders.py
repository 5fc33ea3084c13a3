"""What avatarctl and diffusers do with a weight file, and which other programs read names like its own.

A verdict is given only where a test compares it with the program itself: diffusers 0.42.1 (peft.py,
lora_pipeline.py, lora_conversion_utils.py, single_file_utils.py). What is known of others from their source
alone stands in docs/weights.md; of them only the names that they read are told here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from avatarctl.config import keys
from avatarctl.weights.diffusers_loras import lets_differences_fall, what_stops_it
from avatarctl.weights.layout import WeightLayout
from avatarctl.weights.layouts import LAYOUTS
from avatarctl.weights.weight_file import WeightFile

__all__ = ["Verdict", "avatars_on", "readers", "verdicts"]

Answer = Literal["yes", "wrong", "no", "unknown"]
Answers = Iterator[tuple[Answer, str]]
"""Of one program, with reasons; the first one counts."""


@dataclass(frozen=True)
class Verdict:
    """What one program does with one file: "yes", "wrong" (loads, with another result), "no", "unknown".

    reason: for people, lower case; beside "yes" what the file still needs.
    """

    loader: str
    answer: Answer
    reason: str


def verdicts(weight_file: WeightFile) -> tuple[Verdict, ...]:
    """What each program that takes files of this kind does with this one."""
    return tuple(
        Verdict(name, *next(answers(weight_file)))
        for name, kinds, answers in _LOADERS
        if weight_file.kind in kinds
    )


def readers(weight_file: WeightFile) -> tuple[str, ...]:
    """Programs that read names like those of this file; not whether they use all that is in it."""
    for kind, naming, prefix, programs in _READERS:
        if (kind, naming) == (weight_file.kind, weight_file.naming) and _begin(weight_file, prefix):
            return () if kind == "model" and _has_foreign_prefix(weight_file) else programs
    return ()


_FROM_SINGLE_FILE: Final = "diffusers from_single_file"
_LOAD_LORA_WEIGHTS: Final = "diffusers load_lora_weights"
_READERS: Final = (
    ("model", "original", "", (_FROM_SINGLE_FILE, "ComfyUI")),
    ("model", "comfyui", "model.diffusion_model.", (_FROM_SINGLE_FILE, "ComfyUI")),
    ("model", "diffusers", "", ("diffusers from_pretrained",)),
    ("adapter", "diffusers", "transformer.", ("diffusers load_lora_adapter", _LOAD_LORA_WEIGHTS)),
    ("adapter", "peft", "base_model.model.", ("PEFT from_pretrained",)),
    ("adapter", "comfyui", "diffusion_model.", (_LOAD_LORA_WEIGHTS, "ComfyUI")),
    # Other trainers of kohya's layout write another prefix: lora_transformer_.
    ("adapter", "kohya", "lora_unet_", (_LOAD_LORA_WEIGHTS, "ComfyUI", "kohya's scripts", "musubi-tuner")),
)
"""Kind, naming and beginning of all names -> who reads such (spec/building-blocks.md 1, spec/field.md 4a)."""


# avatarctl


def _infer_model(held: WeightFile) -> Answers:
    yield from _no_use(held)
    if held.kind == "adapter" and held.layout.bases is None:
        yield "no", "it changes a model and is none: name it by --lora, beside a --model"
    yield from _no_avatar_base(held)
    if not _has_own_layers(held):
        titles = " or ".join(layout.title for layout in avatars_on(held))
        yield "no", f"plain Wan has no audio layers; it is the base that an adapter of {titles} needs"
    yield from _incomplete(held)
    yield from _channels_without_code(held)
    if held.kind == "model" and not held.heads:
        yield "no", "the number of attention heads is not stated (num_heads in config.json)"
    yield "yes", ""


def _infer_lora(held: WeightFile) -> Answers:
    yield from _no_use(held)
    yield from _incomplete(held)
    yield from _channels_without_code(held)
    changed = (*held.lora_pairs, *held.differences, *held.tensors)
    if any(name.startswith("img_emb.") or "_img" in name for name in changed):
        yield "yes", f"it changes layers for images (k_img, v_img, img_emb), as {_SEEING} has"
    yield "yes", ""


def _infer_weights(held: WeightFile) -> Answers:
    yield from _no_use(held)
    yield from _no_avatar_base(held)
    yield from _incomplete(held)
    if not _has_own_layers(held):  # an adapter brings its own patch embedding, for whatever channels
        titles = " or ".join(layout.title for layout in avatars_on(held))
        yield "yes", f"as dit=PATH, the base of an adapter of {titles}"
    yield from _channels_without_code(held)
    yield "yes", "as dit=PATH, with its adapter in it" if held.layout.bases else "as dit=PATH"


def _infer_part(held: WeightFile) -> Answers:
    part = _PARTS.get(held.layout.title)
    yield ("yes", f"as {part}=PATH") if part else ("no", "no part of a supported model")


def _convert_base(held: WeightFile) -> Answers:
    yield from _no_use(held)
    yield from _incomplete(held)
    yield "yes", ""


_BASES: Final = " and ".join(layout.bases.title for layout in LAYOUTS if layout.bases)
_SEEING: Final = ", ".join(
    layout.title for layout in LAYOUTS if "image_dim" in layout.arguments and layout.own
)
_PARTS: Final = {
    "UMT5 text encoder": "text", "Wan VAE": "vae", "wav2vec 2.0 encoder": "audio",
    "CLIP vision encoder": "clip",
}  # fmt: skip
"""Titles of encoders and decoders -> their part of `model.weights`."""


def avatars_on(weight_file: WeightFile) -> list[WeightLayout]:
    """The families whose adapter `merge_adapter` would merge into this plain model."""
    return [
        layout
        for layout in LAYOUTS
        if layout.bases and layout.supported and layout.bases.allow(weight_file.sizes, weight_file.config)
    ]


def _no_use(held: WeightFile) -> Answers:
    if not held.layout.supported:
        yield "no", f"{held.layout.title} files are recognised but not loaded by this version"
    if first := held.metadata.get("avatarctl.companion_of"):
        yield "no", f"the second half of an adapter: name {first[:100]}, which reads both"


def _no_avatar_base(held: WeightFile) -> Answers:
    if not (_has_own_layers(held) or avatars_on(held)):
        yield "no", f"it has no audio layers, and adapters of avatars are made for {_BASES} models only"


def _incomplete(held: WeightFile) -> Answers:
    missing, unknown = len(held.missing), len(held.unknown)
    if missing or unknown:
        yield "no", f"{missing} tensor{'' if missing == 1 else 's'} missing, {unknown} without a place"


def _channels_without_code(held: WeightFile) -> Answers:
    mark = keys()["model.channels"].not_yet("infer")
    if isinstance(mark, tuple) and held.sizes.in_channels in mark:
        yield "no", f"{held.sizes.in_channels} input channels are not yet supported"


# diffusers


def _from_single_file(held: WeightFile) -> Answers:
    yield from _not_checked(held)
    if len(held.files) > 1:
        yield "no", "reads one file, not shards"
    yield from _incomplete(held)
    if any(wrapper.name != "state_dict" for wrapper in held.wrappers):
        yield "no", "of dictionaries around tensors it opens state_dict"
    if _has_foreign_prefix(held):
        yield "no", "the prefix of its names is not known there"
    if _has_own_layers(held):
        yield "wrong", "WanTransformer3DModel drops the audio layers with no more than a warning"
    yield "yes", "pass config=FOLDER, otherwise it asks the network"


def _load_lora_adapter(held: WeightFile) -> Answers:
    yield from _not_checked(held)
    yield from _no_pairs(held)
    if held.naming != "diffusers":
        yield "no", "reads the names of diffusers only; see load_lora_weights"
    yield from _read_by_us_alone(held)
    yield from _release_modules(held)
    if held.format != "safetensors":
        yield "no", "reads safetensors only"
    yield from _loses_header_alpha(held)
    if held.tensors:
        yield "wrong", f"{len(held.tensors)} whole tensors (audio, patch embedding) are left out"
    if held.differences:
        yield "wrong", "the differences are left out"
    if own := _own_targets(held):
        yield "wrong", f"{own}; {held.layout.class_name} takes them all"
    yield "yes", 'with use_safetensors=True, else alpha is lost; prefix="transformer" or None, as names begin'


def _load_lora_weights(held: WeightFile) -> Answers:
    yield from _not_checked(held)
    yield from _no_pairs(held)
    if held.wrappers:
        yield "no", "it opens no dictionary around the tensors"
    if not _begin(held, "transformer.", "diffusion_model.", "lora_unet_"):
        yield from _read_by_us_alone(held)
        yield "no", "all names must begin with transformer., diffusion_model. or lora_unet_"
    if held.tensors:
        yield "no", "whole tensors in a LoRA file are refused"
    if held.naming == "diffusers" and _alphas(held):
        yield "no", ".alpha tensors beside the names of diffusers are refused"
    yield from _release_modules(held)
    if why := what_stops_it(held):
        yield "no", why
    if lets_differences_fall(held):
        yield "wrong", "of the differences only biases of linear layers are applied"
    yield from _loses_header_alpha(held) if held.naming == "diffusers" else _loses_alpha(held)
    if own := _own_targets(held):
        yield "wrong", own
    yield "yes", ""


def _not_checked(held: WeightFile) -> Answers:
    if not held.layout.supported:
        yield "unknown", f"not checked for {held.layout.title}"


def _no_pairs(held: WeightFile) -> Answers:
    if not held.lora_pairs:
        yield "no", "there are no LoRA tensors in it"


def _release_modules(held: WeightFile) -> Answers:
    """LoRA names that hold the release's names of layers, whatever stands before them."""
    layers = {module for module in held.lora_pairs if module.startswith("blocks.")}
    plain = {re.sub(r"^.*?(?=\bblocks\.)", "", name.partition(".lora")[0]) for name in held.names}
    if held.naming == "diffusers" and layers & plain:
        yield "no", "behind the prefix of diffusers it has the release's names"


def _loses_alpha(held: WeightFile) -> Answers:
    """For a reader that knows alpha from `.alpha` tensors alone."""
    pairs = list(held.lora_pairs.values())
    without = [pair for pair in pairs if pair.alpha is None]
    if len(pairs) - len(without) != _alphas(held):
        without = pairs if _alphas(held) < len(pairs) else []  # alpha is stated elsewhere
    if any(held.scale_of(pair) != 1 for pair in without):
        yield "wrong", _without_alpha(held)


def _loses_header_alpha(held: WeightFile) -> Answers:
    """The same for a reader that knows alpha from diffusers' entry in the header alone."""
    if "lora_adapter_metadata" not in held.metadata and _scales(held) not in ([], [1.0]):
        yield "wrong", _without_alpha(held)


def _without_alpha(held: WeightFile) -> str:
    found = _scales(held)
    span = " to ".join(f"{scale:g}" for scale in dict.fromkeys((found[0], found[-1])))
    return f"finds no alpha in it and applies it with scale 1 instead of {span}"


def _scales(held: WeightFile) -> list[float]:
    return sorted({held.scale_of(pair) for pair in held.lora_pairs.values()})


def _alphas(held: WeightFile) -> int:
    return sum(name.endswith(".alpha") for name in held.names)


def _own_targets(held: WeightFile) -> str:
    """What to say of LoRA pairs in layers that plain Wan has not; empty for none."""
    own = sum(held.layout.owns(f"{module}.weight") for module in held.lora_pairs)
    return f"{own} of {len(held.lora_pairs)} targets are audio layers, which plain Wan has not" if own else ""


def _has_own_layers(held: WeightFile) -> bool:
    return held.layout.family not in ("wan", "component")


def _has_foreign_prefix(held: WeightFile) -> bool:
    """Whether names stand behind something else than nothing or ComfyUI's prefix."""
    names = {name.removeprefix("model.diffusion_model.") for name in held.names}
    known = set(held.tensors)
    if held.naming == "diffusers":
        known = {held.layout.key_map.to_internal(name) or name for name in known}
    return not names <= known | set(held.unknown)


_OURS_ALONE: Final = re.compile(r"lora_unet__|.*[._](_orig_mod|(\w+_)?module)[._]")
"""Two underscores behind kohya's prefix, and what wrappers as torch.compile put inside a name."""


def _read_by_us_alone(held: WeightFile) -> Answers:
    if found := next(filter(_OURS_ALONE.match, held.names), ""):
        # Beside its own names diffusers leaves others out, with a warning.
        left_out = held.naming == "diffusers"
        yield "wrong" if left_out else "no", f"names like {found[:100]} are not known there"


def _begin(held: WeightFile, *prefixes: str) -> bool:
    return all(name.startswith(prefixes) and not _OURS_ALONE.match(name) for name in held.names)


_LOADERS: Final[tuple[tuple[str, tuple[str, ...], Callable[[WeightFile], Answers]], ...]] = (
    ("avatarctl infer --model", ("model", "adapter"), _infer_model),
    ("avatarctl infer --lora", ("adapter",), _infer_lora),
    ("avatarctl infer --weights", ("model",), _infer_weights),
    ("avatarctl convert-ckpt --base", ("model",), _convert_base),
    ("avatarctl infer --weights", ("component",), _infer_part),
    (_FROM_SINGLE_FILE, ("model",), _from_single_file),
    ("diffusers load_lora_adapter", ("adapter",), _load_lora_adapter),
    (_LOAD_LORA_WEIGHTS, ("adapter",), _load_lora_weights),
)
