"""LoRA pairs and the factor they are merged with.

W' = W + alpha / rank * up @ down (Hu et al. 2021, "LoRA"). A file states alpha by a tensor of its own
(`.alpha`), in its metadata, or in a config beside it. Where nothing does, the factor is 1, as ComfyUI,
kohya's scripts and diffusers have it, but for an avatar's adapter, by what it holds (`unstated_scale`).

kohya's `ss_network_alpha` counts beside kohya's names only. musubi-tuner's `convert_lora.py --target other`
multiplies alpha into the matrices, renames them and keeps the header; no other program reads that entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from avatarctl.errors import UnusableWeights, printable
from avatarctl.files.tensors import DTYPES, StoredTensor, read_whole, to_float32
from avatarctl.weights.layout import WeightLayout
from avatarctl.weights.layouts import unstated_scale
from avatarctl.weights.naming import Names
from avatarctl.weights.stated_alpha import StatedAlpha, finite_number, stated_alpha
from avatarctl.weights.weight_file import LoraPair, Naming

__all__ = ["Pairs", "read_pairs"]

_BAKED: Final = "it tells what was multiplied into the matrices"


@dataclass(frozen=True)
class Pairs:
    """lora_pairs: by original module; scale and scale_rule: see `WeightFile`; notes: what was not obeyed."""

    lora_pairs: Mapping[str, LoraPair]
    scale: float
    scale_rule: str
    notes: tuple[str, ...] = ()


def read_pairs(
    names: Names,
    layout: WeightLayout,
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> Pairs:
    """The LoRA pairs of a file, with the alpha of each as far as anything states it.

    Raises UnusableWeights for half a pair, for ranks that disagree, for an alpha that is no finite number,
    and for a header or config that lacks alpha or describes no plain LoRA.
    """
    parts: dict[str, dict[str, str]] = {}
    for name, placed in names.placed.items():
        if placed.role in ("down", "up", "alpha"):
            parts.setdefault(placed.name, {})[placed.role] = name
    if not parts:
        return Pairs({}, 1.0, "")
    lora_pairs = {module: _pair(module, part, tensors) for module, part in parts.items()}
    own = sum(pair.alpha is not None for pair in lora_pairs.values())
    stated = stated_alpha(names, config, metadata)
    in_file = {module: names.module_in_file(part["down"]) for module, part in parts.items()}
    if stated is not None:
        lora_pairs = {
            module: _with_alpha(pair, stated, in_file[module]) for module, pair in lora_pairs.items()
        }
    scale, rule = 1.0, "alpha of each target, in the file"
    notes: list[str] = []
    if own < len(lora_pairs):
        some = f"alpha in the file for {own} of {len(lora_pairs)} targets, else " if own else ""
        scale, rule = _rule(names.naming, layout, stated, in_file.values(), "ss_network_alpha" in metadata)
        rule = some + rule
        if stated is None and "ss_network_alpha" in metadata:
            alpha = printable(metadata["ss_network_alpha"])[:20]
            notes.append(f"ss_network_alpha {alpha} is not applied: beside {names.naming} names {_BAKED}")
    if stated is not None:
        notes += stated.notes
        if idle := stated.idle(in_file.values()):
            what = f"{len(idle)} patterns of {stated.source} name no target here"
            notes.append(f"{what}, the first one is {idle[0][:100]}")
    return Pairs(lora_pairs, scale, rule, tuple(notes))


def _with_alpha(pair: LoraPair, stated: StatedAlpha, module: str) -> LoraPair:
    """`pair` with the stated alpha, unless it has its own."""
    if pair.alpha is not None:
        return pair
    alpha = stated.of(module, pair.rank)
    if stated.by_root_of_rank:
        return replace(pair, alpha=alpha * math.sqrt(pair.rank), stated_alpha=alpha)
    return replace(pair, alpha=alpha)


def _rule(
    naming: Naming, layout: WeightLayout, stated: StatedAlpha | None, modules: Iterable[str], by_kohya: bool
) -> tuple[float, str]:
    """Scale of the pairs without an alpha, and why. by_kohya: the header is one of kohya's scripts."""
    if stated is not None:
        others = sum(stated.is_exception(module) for module in modules)
        return 1.0, f"{stated}" + (f"; {others} targets by its patterns" if others else "")
    if by_kohya:
        return 1.0, f"no alpha is stated: 1, by a header of kohya's scripts and {naming} names"
    scale, why = unstated_scale(layout, naming)
    return scale, f"no alpha is stated: {why}"


def _pair(module: str, part: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> LoraPair:
    for role, name in (("down", "lora_A"), ("up", "lora_B")):
        if role not in part:
            raise UnusableWeights(f"{module} lacks its {name}: half of a LoRA pair is missing")
    down, up = tensors[part["down"]], tensors[part["up"]]
    for tensor, name in ((down, part["down"]), (up, part["up"])):
        shape = tensor.info.shape
        kernel = shape[2:] if tensor is up else ()  # of a convolution, down alone has one
        if len(shape) < 2 or 0 in shape or any(side != 1 for side in kernel):
            raise UnusableWeights(f"{name[:100]}: shape {list(shape)} is no LoRA matrix")
    if down.info.shape[0] != up.info.shape[1]:
        raise UnusableWeights(
            f"{module}: LoRA ranks disagree, lora_A has shape {list(down.info.shape)} and lora_B "
            f"{list(up.info.shape)}"
        )
    return LoraPair(down, up, _alpha(part["alpha"], tensors) if "alpha" in part else None)


def _alpha(name: str, tensors: Mapping[str, StoredTensor]) -> float:
    tensor = tensors[name]
    if tensor.info.numel != 1:
        raise UnusableWeights(f"{name[:100]}: an alpha of shape {list(tensor.info.shape)}, not one number")
    array = read_whole(tensor).reshape(-1)
    dtype = tensor.info.dtype
    return finite_number(float((to_float32(array, dtype) if DTYPES[dtype].floating else array)[0]), name)
