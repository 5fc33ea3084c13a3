"""Tensors made from other tensors while they are read: casts, input channels, merged LoRA pairs.

Each function gives a lazy `StoredTensor`: nothing is read until a range is asked for, and then only what that
range needs, so the memory of a chain is a few blocks whatever the size of the model. The objects hold no
numbers between reads, may be read in any order, and give the same bits for any division into ranges.

Rounding: a chain rounds once per link that ends in a narrow dtype. To add several updates, or to write a
wider dtype, cast to F32 first, add, and cast to the wanted dtype last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from avatarctl.errors import UnusableWeights
from avatarctl.files.tensors import DTYPES, StoredTensor, TensorInfo, from_float32, to_float32
from avatarctl.weights.weight_file import LoraPair

__all__ = ["cast", "padded_pair", "part_of", "plus_difference", "plus_lora", "with_channels"]

Array = np.ndarray[Any, Any]

_CAST_DTYPES: Final = ("F32", "BF16", "F16")
_PIECE: Final = 1 << 18
"""Elements converted at a time: float32 intermediates stay in the processor's cache."""
_TILE: Final = 1 << 21
"""Elements of a product up @ down computed at a time. Smaller tiles would let the threads of a BLAS wait for
each other longer than they work, thirty times longer on a busy machine."""
_QUIET: Final = np.errstate(all="ignore")
"""What is not finite is found by those who use the numbers; numpy's warnings would name no tensor."""


def cast(tensor: StoredTensor, dtype: str) -> StoredTensor:
    """`tensor` rounded to nearest even in F32, BF16 or F16; integers and equal dtypes stay as they are.

    F64 goes through float32, so a value may be rounded twice on its way to BF16 or F16. What is too large
    for the new dtype becomes infinity, which the writer refuses.
    """
    if dtype not in _CAST_DTYPES:
        raise ValueError(f"cast writes {', '.join(_CAST_DTYPES)}, not {dtype}")
    info = tensor.info
    if info.dtype == dtype or not DTYPES[info.dtype].floating:
        return tensor
    return _Cast(tensor, TensorInfo(dtype, info.shape))


def part_of(tensor: StoredTensor, first: int, shape: tuple[int, ...]) -> StoredTensor:
    """The elements of `tensor` from number `first` on, as a tensor of this shape."""
    return _Part(tensor, first, TensorInfo(tensor.info.dtype, shape))


def with_channels(tensor: StoredTensor, channels: int) -> StoredTensor:
    """A convolution weight [out, in, ...] as [out, channels, ...]: the leading input channels bit for bit,
    new ones zero, as the V2V trainer makes those of a patch embedding. Equal `channels` give `tensor` itself.

    Raises:
        UnusableWeights: not a convolution weight.
    """
    info = tensor.info
    if len(info.shape) < 3 or 0 in info.shape:
        raise UnusableWeights(f"{info} is not a convolution weight, so it has no input channels")
    return _resized(tensor, (info.shape[0], channels, *info.shape[2:]))


def padded_pair(pair: LoraPair, rank: int) -> LoraPair:
    """`pair` filled up with zeros to `rank` rows of `down` and columns of `up`: the product is the same, and
    so is its scale, alpha / rank."""
    if pair.rank == rank:
        return pair
    outputs, *inputs = pair.shape
    return replace(
        pair,
        down=_resized(pair.down, (rank, *inputs)),
        up=_resized(pair.up, (outputs, rank)),
        alpha=None if pair.alpha is None else pair.alpha / pair.rank * rank,
    )


def _resized(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    return tensor if tensor.info.shape == shape else _Resized(tensor, TensorInfo(tensor.info.dtype, shape))


def plus_lora(tensor: StoredTensor, pair: LoraPair, scale: float) -> StoredTensor:
    """`W + scale * up @ down` (Hu et al. 2021, "LoRA", 4.1), added in float32, rounded once to W's dtype.

    W: [out, in], or a convolution [out, in, k...] whose `down` is [rank, in, k...]; trailing dimensions
    of 1 may be there or not. An F64 weight keeps float32 precision.

    Raises:
        UnusableWeights: shapes disagree, or a dtype cannot be added to.
    """
    info, down, up = tensor.info, pair.down.info, pair.up.info
    weight, factor = _split(info), _split(down)
    if weight is None or factor is None or up.numel == 0:
        fits = False
    else:
        fits = weight[1] == factor[1] and _trimmed(up.shape) == _trimmed((weight[0], factor[0]))
    if not fits:
        raise UnusableWeights(f"LoRA pair {down}, {up} does not fit weight {info}")
    _require_summable(info, down, up)
    return _PlusLora(tensor, pair, scale)


def plus_difference(tensor: StoredTensor, diff: StoredTensor, scale: float = 1.0) -> StoredTensor:
    """`W + scale * diff`, added in float32, rounded once to W's dtype.

    Raises:
        UnusableWeights: shapes disagree, or a dtype cannot be added to.
    """
    if tensor.info.shape != diff.info.shape:
        raise UnusableWeights(f"difference {diff.info} does not fit weight {tensor.info}")
    _require_summable(tensor.info, diff.info)
    return _PlusDifference(tensor, diff, scale)


@dataclass(frozen=True)
class _Cast:
    source: StoredTensor
    info: TensorInfo

    @_QUIET
    def read(self, start: int, stop: int) -> Array:
        stored = self.source.read(start, stop)
        result = np.empty(stop - start, DTYPES[self.info.dtype].storage)
        for i, j in _pieces(len(result)):
            result[i:j] = from_float32(to_float32(stored[i:j], self.source.info.dtype), self.info.dtype)
        return result


@dataclass(frozen=True)
class _Resized:
    """The leading rows and columns of `source`, zeros where it has none; a row of a convolution is all that
    one output takes, input channels first."""

    source: StoredTensor
    info: TensorInfo

    def read(self, start: int, stop: int) -> Array:
        rows, *rest = self.source.info.shape
        old, new = math.prod(rest), math.prod(self.info.shape[1:])
        first, last = _rows(start, stop, new)
        held, kept = max(min(last, rows) - first, 0), min(old, new)
        result = np.zeros((last - first, new), DTYPES[self.info.dtype].storage)  # 0.0 in every dtype
        if held:
            stored = self.source.read(first * old, (first + held) * old)
            result[:held, :kept] = stored.reshape(held, old)[:, :kept]
        return result.reshape(-1)[start - first * new : stop - first * new]


@dataclass(frozen=True)
class _Part:
    source: StoredTensor
    first: int
    info: TensorInfo

    def read(self, start: int, stop: int) -> Array:
        return self.source.read(self.first + start, self.first + stop)


@dataclass(frozen=True)
class _PlusLora:
    """Factors are read again for every range: `down` is small beside a block of the weight (1.3 MB beside
    8 MB at width 5120, rank 128), and thousands of targets that each kept theirs would be the whole adapter.

    Matrix products are computed in tiles of whole rows at fixed places, because a BLAS may add in
    another order for another number of rows: merging at load and merging into a file give equal bits.
    """

    source: StoredTensor
    pair: LoraPair
    scale: float

    @property
    def info(self) -> TensorInfo:
        return self.source.info

    @_QUIET
    def read(self, start: int, stop: int) -> Array:
        stored = self.source.read(start, stop)
        if start == stop:
            return stored
        info, rank = self.source.info, self.pair.rank
        width = info.numel // info.shape[0]
        down = _values(self.pair.down, 0, rank * width).reshape(rank, width)
        first, last = _rows(start, stop, width)
        tile = _tile_rows(width)
        for row in range(first - first % tile, last, tile):
            end = min(row + tile, info.shape[0])
            up = _values(self.pair.up, row * rank, end * rank).reshape(end - row, rank)
            # Range of the weight that this tile covers.
            low, high = max(start, row * width), min(stop, end * width)
            update = ((self.scale * up) @ down).reshape(-1)[low - row * width : high - row * width]
            for i, j in _pieces(high - low):
                _add(stored[low - start + i : low - start + j], info.dtype, update[i:j])
        return stored


@dataclass(frozen=True)
class _PlusDifference:
    source: StoredTensor
    diff: StoredTensor
    scale: float

    @property
    def info(self) -> TensorInfo:
        return self.source.info

    @_QUIET
    def read(self, start: int, stop: int) -> Array:
        stored = self.source.read(start, stop)
        added = self.diff.read(start, stop)
        for i, j in _pieces(stop - start):
            update = self.scale * to_float32(added[i:j], self.diff.info.dtype)
            _add(stored[i:j], self.source.info.dtype, update)
        return stored


def _tile_rows(width: int) -> int:
    """Rows of a tile: a power of two, as the rows of a block are (`block_ranges`), so that no tile is
    computed for two blocks."""
    return 1 << max((_TILE // width).bit_length() - 1, 0)


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, _PIECE):
        yield start, min(start + _PIECE, count)


def _rows(start: int, stop: int, width: int) -> tuple[int, int]:
    """Rows [first, last) that hold the elements [start, stop) of a matrix of this width."""
    return (start // width, -(-stop // width)) if start < stop else (0, 0)


def _values(tensor: StoredTensor, start: int, stop: int) -> Array:
    return to_float32(tensor.read(start, stop), tensor.info.dtype)


def _add(stored: Array, dtype: str, update: Array) -> None:
    """Adds float32 values to stored elements in place, rounding once."""
    update += to_float32(stored, dtype)
    stored[:] = from_float32(update, dtype)


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without trailing dimensions of 1."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _split(info: TensorInfo) -> tuple[int, tuple[int, ...]] | None:
    """Rows and the trimmed rest of a shape; None with fewer than two dimensions or without elements."""
    if len(info.shape) < 2 or 0 in info.shape:
        return None
    return info.shape[0], _trimmed(info.shape[1:])


def _require_summable(target: TensorInfo, *others: TensorInfo) -> None:
    for info in (target, *others):
        if not DTYPES[info.dtype].floating:
            raise UnusableWeights(f"{info} holds integers, so nothing can be added")
    if target.dtype.startswith("F8"):
        raise UnusableWeights(
            f"a change is not added to {target}: float8 would round it away",
            fix="choose --dtype bf16",
        )
