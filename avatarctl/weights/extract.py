"""A full model minus its base: an adapter that turns the base into the model again.

Linear weights become LoRA pairs, other changed tensors (biases, norms, modulation) differences, and what
an adapter of the family carries whole (patch embedding, audio) whole tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from avatarctl.errors import UnusableWeights
from avatarctl.events import Emit, Notice, Stage
from avatarctl.files.tensors import BLOCK_BYTES, DTYPES, ArrayTensor, StoredTensor, block_ranges, to_float32
from avatarctl.weights.metadata import without_history
from avatarctl.weights.recognise import require_complete
from avatarctl.weights.rounding import Squares, rounding_floor, rounding_norm
from avatarctl.weights.sizes import variant_of
from avatarctl.weights.svd import Factors, factorise
from avatarctl.weights.weight_file import LoraPair, WeightFile

__all__ = ["PUBLISHED_RANK", "extract_adapter"]

Array = np.ndarray[Any, Any]

PUBLISHED_RANK: Final = 128
"""Rank of the published adapters."""

_SHARED_SIZES: Final = ("width", "ffn", "layers", "out_channels", "text_dim", "freq_dim", "image_dim")


@dataclass(frozen=True)
class _Change:
    """values: model - base of one tensor, float32; squares: of these; weight: of the model's values. Both as
    of a matrix with the rows of the tensor."""

    values: Array
    squares: Squares
    weight: Squares


@dataclass
class _LeftOut:
    """What the floor of rounding took from the targets. lowest, highest: the floors; hidden: targets of which
    no value is above it; more: targets of which more is left out than rounding gives."""

    targets: int = 0
    lowest: float = math.inf
    highest: float = 0.0
    hidden: int = 0
    more: int = 0

    def see(self, change: _Change, dtype: str, floor: Array, factors: Factors) -> None:
        at = float(floor[factors.rank - 1])
        self.targets += 1
        self.lowest, self.highest = min(self.lowest, at), max(self.highest, at)
        self.hidden += bool(factors.values[0] <= floor[0])
        rounding = rounding_norm(change.weight.rows.sum(), change.squares.rows.sum(), dtype, factors.rank)
        self.more += bool(factors.residual > rounding)

    def line(self) -> str:
        span = " to ".join(dict.fromkeys(f"{floor:.2g}" for floor in (self.lowest, self.highest)))
        said = (
            f"changes under the floor of rounding cannot be seen: singular values up to {span} are left out"
        )
        if self.hidden:
            said += f"; {self.hidden} of {self.targets} weights have none above it and keep their largest"
        if self.more:
            said += f"; in {self.more} of {self.targets} weights more is left out than rounding gives"
        return said


def extract_adapter(
    model: WeightFile,
    base: WeightFile,
    *,
    rank: int | None = None,
    emit: Emit,
    on_differences: Callable[[Sequence[str]], None] = lambda names: None,
) -> WeightFile:
    """The adapter (kind "adapter", naming "original") whose merge into `base` gives `model`.

    Every 2-D weight that differs is a target: up @ down is the best approximation of the difference. alpha
    is the rank of each pair: scale 1.

    rank: that many singular values. None: as many as stand out of rounding (rounding.py), at most 128 (the
    published rank). A change of rank <= `rank` that was merged in float32 comes back exactly up to that
    rounding.

    The remainder is measured for every target and the worst is reported through `emit`, with the values up to
    which rounding hides a change; nothing is dropped in silence. Same inputs, same adapter: the randomised
    part is seeded by tensor names.

    on_differences: gets the names of the tensors that become differences before the first pair is computed,
    to refuse what the result could not be written as.

    Memory: the difference of one weight in float32, a few matrices of its longer side x (rank + 16), and the
    adapter itself in float32. Time: minutes for 14B (svd.py).

    Raises UnusableWeights where one side is no full model, where sizes differ in more than input channels and
    the family's own tensors, where values are not finite, and where nothing differs.
    """
    _check(model, base)
    emit(Stage("comparing with the base"))
    differences = _differences(model, base)
    on_differences(list(differences))
    pairs = _pairs(model, base, rank, emit)
    whole = _whole(model, base)
    if not (pairs or differences or whole):
        raise UnusableWeights(
            f"holds the same values as {base.path}: there is nothing to extract",
            where=model.path,
            fix="give the model these weights were trained from as --base",
        )
    if differences or whole:
        kept = f"{len(differences)} biases, norms and the like as differences"
        emit(Notice(f"{kept}, {len(whole)} tensors carried whole"))
    return replace(
        model,
        kind="adapter",
        naming="original",
        variant=variant_of("adapter", model.layout, model.sizes),
        tensors=whole,
        lora_pairs=pairs,
        differences=differences,
        scale=1.0,
        scale_rule="alpha equals the rank, as extracted",
        format="",
        names=(),
        metadata=without_history(model.metadata),
        notes=(f"extracted as the difference from {base.path.name}",),
    )


def _is_linear(model: WeightFile, name: str) -> bool:
    return name.endswith(".weight") and len(model.tensors[name].info.shape) == 2


def _differences(model: WeightFile, base: WeightFile) -> dict[str, StoredTensor]:
    """By name, of everything that no pair can hold and that an adapter does not carry whole."""
    found: dict[str, StoredTensor] = {}
    for name in model.tensors:
        if _is_linear(model, name) or _is_whole(model, base, name):
            continue
        if (change := _change(model, base, name)) is not None:
            found[name] = ArrayTensor(change.values, "F32")
    return found


def _pairs(model: WeightFile, base: WeightFile, rank: int | None, emit: Emit) -> dict[str, LoraPair]:
    """By module, of every linear weight that differs and that an adapter does not carry whole."""
    pairs: dict[str, LoraPair] = {}
    left_out = _LeftOut()
    worst = (-1.0, 0.0, "")  # what is left of the change, and of the weight, and its name
    limit = PUBLISHED_RANK if rank is None else rank
    linear = [name for name in model.tensors if _is_linear(model, name) and not _is_whole(model, base, name)]
    quarter = max(len(linear) // 4, 1)
    for index, name in enumerate(linear):
        if index and index % quarter == 0:
            emit(Notice(f"{index} of {len(linear)} weights compared"))
        change = _change(model, base, name)
        if change is None:
            continue
        dtype = model.tensors[name].info.dtype
        if rank is None:
            floor = rounding_floor(change.weight, change.squares, dtype, limit)
            factors = factorise(change.values, limit, floor=floor, seed=name)
            left_out.see(change, dtype, floor, factors)
        else:
            factors = factorise(change.values, limit, seed=name)
        of_weight = factors.residual / change.weight.norm if change.weight.norm else 0.0
        found = (factors.residual / change.squares.norm, of_weight, name)
        worst = max(worst, found, key=lambda each: each[0])
        pairs[name.removesuffix(".weight")] = LoraPair(
            ArrayTensor(factors.down, "F32"), ArrayTensor(factors.up, "F32"), alpha=float(factors.rank)
        )
    if pairs:
        ranks = sorted({pair.rank for pair in pairs.values()})
        span = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
        rest = f"{worst[0]:.2g} of the change ({worst[1]:.2g} of the weight), in {worst[2]}"
        emit(Notice(f"{len(pairs)} weights as rank {span}; largest remainder {rest}"))
    if left_out.targets:
        emit(Notice(left_out.line()))
    return pairs


def _check(model: WeightFile, base: WeightFile) -> None:
    """Both full models of one network, up to input channels and the family's own tensors."""
    for side in (model, base):
        if side.kind != "model":
            raise UnusableWeights(
                f"is no full model ({side.kind}): an adapter is extracted from two full models",
                where=side.path,
                fix="merge it with --merge-lora first" if side.kind == "adapter" else None,
            )
        require_complete(side)
    for field in _SHARED_SIZES:
        ours, theirs = getattr(model.sizes, field), getattr(base.sizes, field)
        if ours != theirs:
            raise UnusableWeights(
                f"has {field} {ours}, and the base {base.path} has {theirs}",
                where=model.path,
                fix="give the base of the same size",
            )
    lacking = [name for name in base.tensors if name not in model.tensors]
    extra = [name for name in model.tensors if name not in base.tensors and not _is_own(model, name)]
    for names, side, other in ((lacking, model, base), (extra, base, model)):
        if names:
            raise UnusableWeights(
                f"lacks {names[0][:100]} ({len(names)} tensors in all), which {other.path} has",
                where=side.path,
            )
    for name in model.tensors:
        _check_tensor(model, base, name)


def _check_tensor(model: WeightFile, base: WeightFile, name: str) -> None:
    ours, theirs = model.tensors[name].info, base.tensors[name].info if name in base.tensors else None
    for path, info in ((model.path, ours), (base.path, theirs)):
        if info and not DTYPES[info.dtype].floating:
            raise UnusableWeights(f"{name[:100]} is {info}: not a floating-point tensor", where=path)
    if theirs and ours.shape != theirs.shape and not _is_own(model, name):
        raise UnusableWeights(
            f"{name[:100]} is {ours}, and in the base {base.path} it is {theirs}", where=model.path
        )


def _is_own(model: WeightFile, name: str) -> bool:
    """Whether a base may lack this tensor or have it with other input channels."""
    return model.layout.is_replaced(name) or name == "patch_embedding.weight"


def _is_whole(model: WeightFile, base: WeightFile, name: str) -> bool:
    """Whether the adapter would carry this tensor whole if it differs."""
    if model.layout.is_replaced(name) or name not in base.tensors:
        return True
    return model.tensors[name].info.shape != base.tensors[name].info.shape


def _whole(model: WeightFile, base: WeightFile) -> dict[str, StoredTensor]:
    """All tensors that adapters of the family carry whole, if any of them differs: an adapter with some of
    them would be refused as incomplete."""
    names = [name for name in model.tensors if _is_whole(model, base, name)]
    for name in names:
        theirs = base.tensors.get(name)
        ours = model.tensors[name]
        if theirs is None or theirs.info.shape != ours.info.shape or _change(model, base, name) is not None:
            return {name: model.tensors[name] for name in names}
    return {}


def _change(model: WeightFile, base: WeightFile, name: str) -> _Change | None:
    """model - base of one tensor of equal shapes, None where they are equal.

    Raises UnusableWeights for values that are not finite.
    """
    ours, theirs = model.tensors[name], base.tensors[name]
    rows = ours.info.shape[0] if ours.info.shape else 1
    values = np.empty((rows, ours.info.numel // max(rows, 1)), np.float32)
    squares, weight = Squares(*values.shape), Squares(*values.shape)
    row_bytes = values.shape[1] * DTYPES[ours.info.dtype].itemsize
    for start, stop in block_ranges(ours.info, max(BLOCK_BYTES, row_bytes)):  # whole rows
        first = start // values.shape[1]
        block = to_float32(ours.read(start, stop), ours.info.dtype).reshape(-1, values.shape[1])
        weight.add(first, block)
        with np.errstate(invalid="ignore", over="ignore"):  # found below
            block -= to_float32(theirs.read(start, stop), theirs.info.dtype).reshape(block.shape)
        squares.add(first, block)
        values[first : first + len(block)] = block
    energy = squares.rows.sum()
    if not math.isfinite(energy):
        raise UnusableWeights(
            f"{name[:100]} has values that are not finite, here or in the base {base.path}",
            where=model.path,
        )
    if not energy:
        return None
    return _Change(values.reshape(ours.info.shape), squares, weight)
