"""What diffusers makes of a Wan LoRA that is not in its own names.

`load_lora_weights` has a converter for each of two layouts, of which this restates what they take and what
they let fall: `_convert_non_diffusers_wan_lora_to_diffusers` (`diffusion_model.`) and
`_convert_musubi_wan_lora_to_diffusers` (`lora_unet_`) of lora_conversion_utils.py, diffusers 0.42.1. Files in
diffusers' own names pass both by.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from avatarctl.weights.weight_file import WeightFile

__all__ = ["lets_differences_fall", "what_stops_it"]

_LINEARS: Final = (
    *(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"),
    "ffn.0", "ffn.2",
)  # fmt: skip
_SEEING: Final = ("cross_attn.k_img", "cross_attn.v_img")
_EMBEDDERS: Final = ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
_IN_PAIRS: Final = ("time_projection.1", "img_emb.proj.1", "img_emb.proj.3")
"""Outside the blocks; their biases are taken beside their pairs only."""
_HEAD: Final = "head.head"


def what_stops_it(weight_file: WeightFile) -> str:
    """Why `load_lora_weights` raises for an adapter whose names begin as they should, or nothing."""
    if weight_file.naming == "diffusers":
        return "differences beside the names of diffusers are refused" if weight_file.differences else ""
    alphas = {name.removesuffix(".alpha") for name in weight_file.names if name.endswith(".alpha")}
    if weight_file.naming == "kohya":
        return _what_stops_kohya(weight_file, len(alphas))
    return _what_stops_comfyui(weight_file, alphas)


def _what_stops_kohya(weight_file: WeightFile, alphas: int) -> str:
    modules = weight_file.lora_pairs.keys()
    numbers = range(len({_number(module) for module in modules}))
    whole = {f"blocks.{i}.{name}" for i in numbers for name in (*_LINEARS, *_seeing(modules))}
    if modules == whole and alphas == len(modules) and not weight_file.differences:
        return ""
    return "of kohya's names it wants all ten linear layers of every block, each with .alpha, and no more"


def _what_stops_comfyui(weight_file: WeightFile, alphas: Collection[str]) -> str:
    modules, changed = weight_file.lora_pairs.keys(), weight_file.differences.keys()
    if not any(name.startswith("blocks.") for name in (*modules, *changed)):
        return "there is nothing in it for the blocks"
    outside = {module for module in modules if not _in_block(module, modules)}
    if other := sorted(outside - {*_EMBEDDERS, *_IN_PAIRS, _HEAD}):
        return f"{other[0]} is not converted"
    if outside and any(".blocks." not in f".{name}" for name in alphas):
        return "targets outside the blocks are not converted with .alpha"
    for name in _EMBEDDERS:
        if name not in modules and {f"{name}.weight", f"{name}.bias"} & changed:
            return f"a difference of {name} is converted beside its LoRA only"
    if f"{_HEAD}.weight" in changed and f"{_HEAD}.bias" not in changed:
        return f"a difference of {_HEAD} is converted beside that of its bias only"
    return ""


def lets_differences_fall(weight_file: WeightFile) -> bool:
    """Whether `load_lora_weights` loads an adapter without all of its differences."""
    modules = weight_file.lora_pairs.keys()
    return not all(_is_kept(name, modules) for name in weight_file.differences)


def _is_kept(difference: str, modules: Collection[str]) -> bool:
    module, _, kind = difference.rpartition(".")
    if kind != "bias":
        return difference == f"{_HEAD}.weight"
    if _in_block(module, modules) or module == _HEAD:
        return True
    return module in modules and module in (*_EMBEDDERS, *_IN_PAIRS)


def _in_block(module: str, modules: Collection[str]) -> bool:
    """Whether it is a layer of a block that is converted."""
    if not module.startswith("blocks."):
        return False
    return module.split(".", 2)[2] in (*_LINEARS, *_seeing(modules))


def _seeing(modules: Collection[str]) -> tuple[str, ...]:
    """The layers for images, which are converted where both are in the file."""
    return _SEEING if all(any(part in module for module in modules) for part in ("k_img", "v_img")) else ()


def _number(module: str) -> str:
    return module.split(".")[1] if module.startswith("blocks.") else ""
