"""Facts about a weight file that decide which programs take it (weights/loaders.py)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from avatarctl.config import keys
from avatarctl.weights.layout import WeightLayout
from avatarctl.weights.layouts import LAYOUTS
from avatarctl.weights.weight_file import Checkpoint

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
    "sees_pictures",
    "starts_with",
    "without_alpha",
]

_COMFYUI_MODEL: Final = "model.diffusion_model."


def has_own_layers(checkpoint: Checkpoint) -> bool:
    return checkpoint.layout.family not in ("wan", "component")


def is_no_models_adapter(checkpoint: Checkpoint) -> bool:
    """Whether an adapter makes no model of a plain one, so that it has no base to be run with."""
    return checkpoint.kind == "adapter" and checkpoint.layout.bases is None


def _own_targets(checkpoint: Checkpoint) -> int:
    """LoRA pairs in layers that plain Wan has not."""
    return sum(checkpoint.layout.owns(f"{module}.weight") for module in checkpoint.low_rank)


def changes_own_layers(checkpoint: Checkpoint) -> bool:
    return _own_targets(checkpoint) > 0


def leaves_out_targets(checkpoint: Checkpoint) -> str:
    own, targets = _own_targets(checkpoint), len(checkpoint.low_rank)
    return f"{own} of {targets} targets are audio layers, which plain Wan has not"


def part(checkpoint: Checkpoint) -> str:
    """The part of `model.weights` that this encoder or decoder is, empty for none."""
    return _PARTS.get(checkpoint.layout.title, "")


_PARTS: Final = {
    "UMT5 text encoder": "text", "Wan VAE": "vae", "wav2vec 2.0 encoder": "audio",
    "CLIP vision encoder": "clip",
}  # fmt: skip


def is_incomplete(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.missing or checkpoint.unknown)


def is_pickle(checkpoint: Checkpoint) -> bool:
    return checkpoint.format != "safetensors"


def is_named(*namings: str) -> Callable[[Checkpoint], bool]:
    return lambda checkpoint: checkpoint.naming in namings


def is_named_otherwise(*namings: str) -> Callable[[Checkpoint], bool]:
    return lambda checkpoint: checkpoint.naming not in namings


def scales(checkpoint: Checkpoint) -> list[float]:
    return sorted({checkpoint.scale_of(pair) for pair in checkpoint.low_rank.values()})


def alphas(checkpoint: Checkpoint) -> int:
    return sum(name.endswith(".alpha") for name in checkpoint.names)


def loses_alpha(checkpoint: Checkpoint) -> bool:
    """Whether a reader that knows alpha from `.alpha` tensors alone would use another scale."""
    pairs = list(checkpoint.low_rank.values())
    without = [pair for pair in pairs if pair.alpha is None]
    if len(pairs) - len(without) != alphas(checkpoint):
        without = pairs if alphas(checkpoint) < len(pairs) else []  # alpha is stated elsewhere
    return any(checkpoint.scale_of(pair) != 1 for pair in without)


def loses_header_alpha(checkpoint: Checkpoint) -> bool:
    """The same for a reader that knows alpha from diffusers' entry in the header alone."""
    stated = "lora_adapter_metadata" in checkpoint.metadata
    return not stated and scales(checkpoint) not in ([], [1.0])


def without_alpha(checkpoint: Checkpoint) -> str:
    found = scales(checkpoint)
    span = " to ".join(f"{scale:g}" for scale in dict.fromkeys((found[0], found[-1])))
    return f"finds no alpha in it and applies it with scale 1 instead of {span}"


def holds_release_modules(checkpoint: Checkpoint) -> bool:
    """Whether LoRA names hold the release's names of layers, whatever stands before them."""
    layers = {module for module in checkpoint.low_rank if module.startswith("blocks.")}
    plain = {re.sub(r"^.*?(?=\bblocks\.)", "", name.partition(".lora")[0]) for name in checkpoint.names}
    return bool(layers & plain)


def leaves_out(checkpoint: Checkpoint) -> str:
    return f"{len(checkpoint.tensors)} whole tensors (audio, patch embedding) are left out"


def holds_unmarked_tensors(checkpoint: Checkpoint) -> bool:
    """Whether whole tensors are there that are not called `.set_weight`, as ComfyUI knows them."""
    return sum(name.endswith(".set_weight") for name in checkpoint.names) < len(checkpoint.tensors)


def is_release(checkpoint: Checkpoint) -> bool:
    """Whether every name is exactly as in the release: no prefix, `.default` in LoRA names."""
    pairs = {
        f"{module}.{part}.default.weight" for module in checkpoint.low_rank for part in ("lora_A", "lora_B")
    }
    return set(checkpoint.names) == pairs | checkpoint.tensors.keys()


def is_of(layout: WeightLayout) -> Callable[[Checkpoint], bool]:
    return lambda checkpoint: checkpoint.layout is layout


def is_wrapped(*opened: str) -> Callable[[Checkpoint], bool]:
    """Whether another dictionary is around the tensors than those of the names in `opened`."""
    return lambda checkpoint: any(wrapper.name not in opened for wrapper in checkpoint.wrappers)


def comfyui_opens(checkpoint: Checkpoint) -> bool:
    """ComfyUI opens one dictionary: `state_dict`, or whatever stands alone."""
    if len(checkpoint.wrappers) > 1:
        return False
    return all(wrapper.name == "state_dict" or wrapper.alone for wrapper in checkpoint.wrappers)


def comfyui_knows_prefix(checkpoint: Checkpoint) -> bool:
    """Whether the names of a model are the release's, or behind a prefix that ComfyUI takes off."""
    return any(
        {name.removeprefix(prefix) for name in checkpoint.names} == checkpoint.tensors.keys()
        for prefix in (_COMFYUI_MODEL, "model.")
    )


def has_foreign_prefix(checkpoint: Checkpoint) -> bool:
    """Whether names stand behind something else than nothing or ComfyUI's prefix."""
    names = {name.removeprefix(_COMFYUI_MODEL) for name in checkpoint.names}
    known = set(checkpoint.tensors)
    if checkpoint.naming == "diffusers":
        known = {checkpoint.layout.key_map.to_internal(name) or name for name in known}
    return not names <= known | set(checkpoint.unknown)


def is_second_half(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.metadata.get("avatarctl.companion_of"))


def first_half(checkpoint: Checkpoint) -> str:
    return (
        f"the second half of an adapter: name {checkpoint.metadata['avatarctl.companion_of'][:100]}, which "
        "reads both"
    )


def has_channels_without_code(checkpoint: Checkpoint) -> bool:
    mark = keys()["model.channels"].key.not_yet
    return isinstance(mark, tuple) and checkpoint.sizes.in_channels in mark


def avatars_on(checkpoint: Checkpoint) -> list[WeightLayout]:
    """The families whose adapter `merge_adapter` would merge into this plain model."""
    return [
        layout
        for layout in LAYOUTS
        if layout.bases and layout.supported and layout.bases.allow(checkpoint.sizes, checkpoint.config)
    ]


def as_dit(checkpoint: Checkpoint) -> str:
    """What it is as `dit` of `model.weights`."""
    if has_own_layers(checkpoint):
        return "as dit=PATH, with its adapter in it" if checkpoint.layout.bases else "as dit=PATH"
    titles = " or ".join(layout.title for layout in avatars_on(checkpoint))
    return f"as dit=PATH, the base of an adapter of {titles}"


def sees_pictures(checkpoint: Checkpoint) -> bool:
    """Whether a LoRA changes layers that only models with a picture encoder have."""
    changed = (*checkpoint.low_rank, *checkpoint.differences, *checkpoint.tensors)
    return any(name.startswith("img_emb.") or "_img" in name for name in changed)


def starts_with(*prefixes: str) -> Callable[[Checkpoint], bool]:
    return lambda checkpoint: all(name.startswith(prefixes) for name in checkpoint.names)


def negated(fact: Callable[[Checkpoint], bool]) -> Callable[[Checkpoint], bool]:
    return lambda checkpoint: not fact(checkpoint)
