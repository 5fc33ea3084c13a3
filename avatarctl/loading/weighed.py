"""Bytes of a run's networks from headers and rows: nothing is built, and torch is not imported."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from avatarctl.config import RunConfig
from avatarctl.placement.seats import Part
from avatarctl.registry import Row
from avatarctl.registry.networks import numbers_in
from avatarctl.weights.layout import Sizes, WeightLayout
from avatarctl.weights.layouts import LAYOUTS
from avatarctl.weights.weight_file import WeightFile

__all__ = ["weighed"]

_ENCODERS: Final = {"text": "text", "vae": "vae", "audio": "audio", "image": "clip"}
"""Parts in the order of loading, and their names in `Row.network`."""

_BLOCK: Final = re.compile(r"blocks\.(\d+)\.")
_FULL: Final = 4
"""Bytes of a float32."""

Shapes = Mapping[str, tuple[int, ...]]


def weighed(row: Row, held: WeightFile | None, cfg: RunConfig) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """The parts of a run as it loads them, and those whose sizes nothing states.

    held: the transformer's files; None where they are missing or built in: then as the row says. Encoders are
    those that the row names. The VAE is counted as a GPU has it: a CPU computes it in float32.
    """
    half = 2 if cfg.runtime.dtype == "bfloat16" else _FULL
    parts, unknown = [], []
    for part, name in _ENCODERS.items():
        sizes = row.network.get(name)
        if sizes is None:
            continue
        if (known := numbers_in(name, sizes)) is None:
            unknown.append(part)
            continue
        wide = part in ("audio", "image") or (part == "vae" and cfg.runtime.device == "cpu")
        each = _FULL if wide else half
        parts.append(Part(part, known[0] * each, known[1] * each))
    layout = held.layout if held else next((each for each in LAYOUTS if each.family == row.family), None)
    shapes = _of_file(held) if held else _of_row(row, layout, cfg.model.channels)
    if layout is None or not shapes:
        return tuple(parts), (*unknown, "dit")
    in_float8 = cfg.memory.base_precision == "fp8"
    return (*parts, _transformer(layout, shapes, half, in_float8)), tuple(unknown)


def _of_file(held: WeightFile) -> Shapes:
    return {name: tensor.info.shape for name, tensor in held.tensors.items()}


def _of_row(row: Row, layout: WeightLayout | None, channels: int | None) -> Shapes:
    """Empty for a family whose files we do not know, or a row that states no sizes."""
    network = row.network.get("dit", {})
    if layout is None or not row.width or "num_layers" not in network:
        return {}
    stated = {field: network[name] for name, field in layout.arguments.items() if network.get(name)}
    sizes = Sizes(width=row.width, **stated)
    return layout.shapes(replace(sizes, in_channels=channels) if channels else sizes)


def _transformer(layout: WeightLayout, shapes: Shapes, half: int, in_float8: bool) -> Part:
    """By module, as one may come alone, and by block. Matrices in float8 have a scale for each row."""
    stored = re.compile(layout.float8 if in_float8 else r"(?!)")
    modules: dict[str, int] = defaultdict(int)
    blocks: dict[int, int] = defaultdict(int)
    for name, shape in shapes.items():
        numbers = math.prod(shape)
        size = numbers * (_FULL if layout.stays_float32(name) else half)
        if stored.fullmatch(name):
            size = numbers + shape[0] * half
        modules[name.rpartition(".")[0]] += size
        if block := _BLOCK.match(name):
            blocks[int(block[1])] += size
    ordered = tuple(blocks[index] for index in sorted(blocks))
    return Part("dit", sum(modules.values()), max(modules.values()), ordered)
