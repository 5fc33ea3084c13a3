"""Facts about a weight file that decide which programs take it (weights/loaders.py)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from avatarctl.config import keys
from avatarctl.weights.layout import WeightLayout
from avatarctl.weights.layouts import LAYOUTS
from avatarctl.weights.weight_file import WeightFile

__all__ = [
    "alphas",
    "as_dit",
    "avatars_on",
    "changes_own_layers",
    "comfyui_knows_prefix",
    "comfyui_opens",
    "first_half",
    "has_channels_without_code",
    "has_foreign_prefix",
    "has_own_layers",
    "holds_release_modules",
    "holds_unmarked_tensors",
    "is_incomplete",
    "is_named",
    "is_named_otherwise",
    "is_no_models_adapter",
    "is_of",
    "is_pickle",
    "is_release",
    "is_second_half",
    "is_wrapped",
    "leaves_out",
    "leaves_out_targets",
    "loses_alpha",
    "loses_header_alpha",
    "negated",
    "part",
    "sees_images",
    "starts_with",
    "without_alpha",
]

_COMFYUI_MODEL: Final = "model.diffusion_model."


def has_own_layers(weight_file: WeightFile) -> bool:
    return weight_file.layout.family not in ("wan", "component")


def is_no_models_adapter(weight_file: WeightFile) -> bool:
    """Whether an adapter makes no model of a plain one, so that it has no base to be run with."""
    return weight_file.kind == "adapter" and weight_file.layout.bases is None


def _own_targets(weight_file: WeightFile) -> int:
    """LoRA pairs in layers that plain Wan has not."""
    return sum(weight_file.layout.owns(f"{module}.weight") for module in weight_file.lora_pairs)


def changes_own_layers(weight_file: WeightFile) -> bool:
    return _own_targets(weight_file) > 0


def leaves_out_targets(weight_file: WeightFile) -> str:
    own, targets = _own_targets(weight_file), len(weight_file.lora_pairs)
    return f"{own} of {targets} targets are audio layers, which plain Wan has not"


def part(weight_file: WeightFile) -> str:
    """The part of `model.weights` that this encoder or decoder is, empty for none."""
    return _PARTS.get(weight_file.layout.title, "")


_PARTS: Final = {
    "UMT5 text encoder": "text", "Wan VAE": "vae", "wav2vec 2.0 encoder": "audio",
    "CLIP vision encoder": "clip",
}  # fmt: skip


def is_incomplete(weight_file: WeightFile) -> bool:
    return bool(weight_file.missing or weight_file.unknown)


def is_pickle(weight_file: WeightFile) -> bool:
    return weight_file.format != "safetensors"


def is_named(*namings: str) -> Callable[[WeightFile], bool]:
    return lambda weight_file: weight_file.naming in namings


def is_named_otherwise(*namings: str) -> Callable[[WeightFile], bool]:
    return lambda weight_file: weight_file.naming not in namings


def scales(weight_file: WeightFile) -> list[float]:
    return sorted({weight_file.scale_of(pair) for pair in weight_file.lora_pairs.values()})


def alphas(weight_file: WeightFile) -> int:
    return sum(name.endswith(".alpha") for name in weight_file.names)


def loses_alpha(weight_file: WeightFile) -> bool:
    """Whether a reader that knows alpha from `.alpha` tensors alone would use another scale."""
    pairs = list(weight_file.lora_pairs.values())
    without = [pair for pair in pairs if pair.alpha is None]
    if len(pairs) - len(without) != alphas(weight_file):
        without = pairs if alphas(weight_file) < len(pairs) else []  # alpha is stated elsewhere
    return any(weight_file.scale_of(pair) != 1 for pair in without)


def loses_header_alpha(weight_file: WeightFile) -> bool:
    """The same for a reader that knows alpha from diffusers' entry in the header alone."""
    stated = "lora_adapter_metadata" in weight_file.metadata
    return not stated and scales(weight_file) not in ([], [1.0])


def without_alpha(weight_file: WeightFile) -> str:
    found = scales(weight_file)
    span = " to ".join(f"{scale:g}" for scale in dict.fromkeys((found[0], found[-1])))
    return f"finds no alpha in it and applies it with scale 1 instead of {span}"


def holds_release_modules(weight_file: WeightFile) -> bool:
    """Whether LoRA names hold the release's names of layers, whatever stands before them."""
    layers = {module for module in weight_file.lora_pairs if module.startswith("blocks.")}
    plain = {re.sub(r"^.*?(?=\bblocks\.)", "", name.partition(".lora")[0]) for name in weight_file.names}
    return bool(layers & plain)


def leaves_out(weight_file: WeightFile) -> str:
    return f"{len(weight_file.tensors)} whole tensors (audio, patch embedding) are left out"


def holds_unmarked_tensors(weight_file: WeightFile) -> bool:
    """Whether whole tensors are there that are not called `.set_weight`, as ComfyUI knows them."""
    return sum(name.endswith(".set_weight") for name in weight_file.names) < len(weight_file.tensors)


def is_release(weight_file: WeightFile) -> bool:
    """Whether every name is exactly as in the release: no prefix, `.default` in LoRA names."""
    pairs = {
        f"{module}.{part}.default.weight"
        for module in weight_file.lora_pairs
        for part in ("lora_A", "lora_B")
    }
    return set(weight_file.names) == pairs | weight_file.tensors.keys()


def is_of(layout: WeightLayout) -> Callable[[WeightFile], bool]:
    return lambda weight_file: weight_file.layout is layout


def is_wrapped(*opened: str) -> Callable[[WeightFile], bool]:
    """Whether another dictionary is around the tensors than those of the names in `opened`."""
    return lambda weight_file: any(wrapper.name not in opened for wrapper in weight_file.wrappers)


def comfyui_opens(weight_file: WeightFile) -> bool:
    """ComfyUI opens one dictionary: `state_dict`, or whatever stands alone."""
    if len(weight_file.wrappers) > 1:
        return False
    return all(wrapper.name == "state_dict" or wrapper.alone for wrapper in weight_file.wrappers)


def comfyui_knows_prefix(weight_file: WeightFile) -> bool:
    """Whether the names of a model are the release's, or behind a prefix that ComfyUI takes off."""
    return any(
        {name.removeprefix(prefix) for name in weight_file.names} == weight_file.tensors.keys()
        for prefix in (_COMFYUI_MODEL, "model.")
    )


def has_foreign_prefix(weight_file: WeightFile) -> bool:
    """Whether names stand behind something else than nothing or ComfyUI's prefix."""
    names = {name.removeprefix(_COMFYUI_MODEL) for name in weight_file.names}
    known = set(weight_file.tensors)
    if weight_file.naming == "diffusers":
        known = {weight_file.layout.key_map.to_internal(name) or name for name in known}
    return not names <= known | set(weight_file.unknown)


def is_second_half(weight_file: WeightFile) -> bool:
    return bool(weight_file.metadata.get("avatarctl.companion_of"))


def first_half(weight_file: WeightFile) -> str:
    return (
        f"the second half of an adapter: name {weight_file.metadata['avatarctl.companion_of'][:100]}, which "
        "reads both"
    )


def has_channels_without_code(weight_file: WeightFile) -> bool:
    mark = keys()["model.channels"].not_yet("infer")
    return isinstance(mark, tuple) and weight_file.sizes.in_channels in mark


def avatars_on(weight_file: WeightFile) -> list[WeightLayout]:
    """The families whose adapter `merge_adapter` would merge into this plain model."""
    return [
        layout
        for layout in LAYOUTS
        if layout.bases and layout.supported and layout.bases.allow(weight_file.sizes, weight_file.config)
    ]


def as_dit(weight_file: WeightFile) -> str:
    """What it is as `dit` of `model.weights`."""
    if has_own_layers(weight_file):
        return "as dit=PATH, with its adapter in it" if weight_file.layout.bases else "as dit=PATH"
    titles = " or ".join(layout.title for layout in avatars_on(weight_file))
    return f"as dit=PATH, the base of an adapter of {titles}"


def sees_images(weight_file: WeightFile) -> bool:
    """Whether a LoRA changes layers that only models with an image encoder have."""
    changed = (*weight_file.lora_pairs, *weight_file.differences, *weight_file.tensors)
    return any(name.startswith("img_emb.") or "_img" in name for name in changed)


def starts_with(*prefixes: str) -> Callable[[WeightFile], bool]:
    return lambda weight_file: all(name.startswith(prefixes) for name in weight_file.names)


def negated(fact: Callable[[WeightFile], bool]) -> Callable[[WeightFile], bool]:
    return lambda weight_file: not fact(weight_file)
