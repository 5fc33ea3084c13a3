"""Tensors that stay on the disk until somebody reads a part of them. numpy only.

A `StoredTensor` knows its dtype and shape and reads any range of its elements in C order. Everything that
converts or loads weights is a chain of such readers, so that one block of one tensor is in memory
at a time, whatever the size of the file.

bfloat16 and float8 have no numpy type: their bits travel as uint16 and uint8, and `to_float32` /
`from_float32` are the only places that know what they mean (dtype names and layouts: the safetensors
format; float8: Micikevicius et al. 2022, "FP8 formats for deep learning", table 1).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from avatarctl.errors import UnusableWeights
from avatarctl.files.stamp import FileStamp
from avatarctl.files.strict_json import reading

__all__ = [
    "BLOCK_BYTES",
    "DTYPES",
    "ArrayTensor",
    "DType",
    "FileTensor",
    "StoredTensor",
    "TensorInfo",
    "block_ranges",
    "from_float32",
    "read_whole",
    "size_text",
    "to_float32",
]

Array = np.ndarray[Any, Any]

BLOCK_BYTES: Final = 8 << 20
"""How much of a tensor is read at a time."""
_CACHE_LINE: Final = 64


@dataclass(frozen=True)
class DType:
    """name: as safetensors writes it; storage: the numpy type that carries its bits, little-endian."""

    name: str
    storage: np.dtype[Any]
    floating: bool

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.storage.itemsize


_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}
_OTHERS = {
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2",
    "U8": "u1", "BOOL": "u1",
}  # fmt: skip
DTYPES: Final[Mapping[str, DType]] = {
    **{name: DType(name, np.dtype(code), True) for name, code in _FLOATS.items()},
    **{name: DType(name, np.dtype(code), False) for name, code in _OTHERS.items()},
}
"""Every dtype that a weight file may hold, by safetensors name."""


@dataclass(frozen=True)
class TensorInfo:
    """dtype: a key of `DTYPES`; shape: C order."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


class StoredTensor(Protocol):
    """A tensor that can be read in parts, more than once and from one thread at a time."""

    @property
    def info(self) -> TensorInfo:
        """Dtype and shape; known without reading."""

    def read(self, start: int, stop: int) -> Array:
        """Elements [start, stop) in C order, 1-D, in the storage type of the dtype; the caller may
        overwrite what it gets. Raises UnusableWeights where the file no longer holds them."""


@dataclass(frozen=True)
class ArrayTensor:
    """A tensor in memory; `array` holds the storage type of `dtype`."""

    array: Array
    dtype: str

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.dtype, self.array.shape)

    def read(self, start: int, stop: int) -> Array:
        return self.array.reshape(-1)[start:stop].copy()


@dataclass(frozen=True)
class FileTensor:
    """Consecutive little-endian elements of a file, from byte `offset` on.

    The file is opened for every read: a model of a thousand tensors keeps no descriptor, and no page of
    it is mapped into this process. stamp: of the file whose header said where the elements are; another file
    of that name is refused.
    """

    path: Path
    offset: int
    info: TensorInfo
    stamp: FileStamp | None = None

    def read(self, start: int, stop: int) -> Array:
        dtype = DTYPES[self.info.dtype]
        if stop <= start:
            return np.empty(0, dtype.storage)
        begin = self.offset + start * dtype.itemsize
        array = _empty_at_phase(begin, (stop - start) * dtype.itemsize, dtype.storage)
        view = array.data.cast("B")
        done = 0
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            if self.stamp is not None:
                self.stamp.refuse_change(os.fstat(file.fileno()), self.path)
            file.seek(begin)
            while done < len(view):
                if not (count := file.readinto(view[done:])):
                    raise UnusableWeights("the file got shorter while it was read", where=self.path)
                done += count
        return array


def _empty_at_phase(offset: int, nbytes: int, storage: np.dtype[Any]) -> Array:
    """An array for the `nbytes` of a file from `offset` on, as far from a cache line's start as they are.

    The pages of a file lie at multiples of a line in memory, and a processor copies out of them several times
    faster to addresses of the same phase (docs/log.md, 2026-11-21).
    """
    phase = offset - offset % storage.itemsize
    spare = np.empty(nbytes + _CACHE_LINE, np.uint8)
    address: int = spare.__array_interface__["data"][0]
    start = (phase - address) % _CACHE_LINE
    return spare[start : start + nbytes].view(storage)


def block_ranges(info: TensorInfo, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Element ranges [start, stop) that cover a tensor: where a row fits into a block, whole rows, a power of
    two of them."""
    total = info.numel
    row = max(total // info.shape[0], 1) if info.shape and info.shape[0] else 1
    size = max(block_bytes // DTYPES[info.dtype].itemsize, 1)
    if row <= size:
        size = row << ((size // row).bit_length() - 1)
    for start in range(0, total, size):
        yield start, min(start + size, total)


def read_whole(tensor: StoredTensor) -> Array:
    """All elements in their shape, in the storage type."""
    return tensor.read(0, tensor.info.numel).reshape(tensor.info.shape)


def to_float32(array: Array, dtype: str) -> Array:
    """Values of stored elements of a floating dtype as float32 (float64 is rounded)."""
    if dtype == "BF16":
        wide = array.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return _float8_values(dtype)[array]
    if not DTYPES[dtype].floating:
        raise ValueError(f"{dtype} holds no floating-point values")
    return array.astype(np.float32)


def from_float32(values: Array, dtype: str) -> Array:
    """float32 values as stored elements, rounded to nearest even; float8 is not written."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        # Rounding carries into the exponent, and from the largest finite value to infinity, as it should;
        # a NaN would be carried into infinity or zero, so it keeps its upper half and a quiet bit.
        rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
        nan = np.isnan(values)
        if nan.any():
            rounded[nan] = ((bits[nan] >> 16) | 0x40).astype(np.uint16)
        return rounded
    if dtype not in ("F64", "F32", "F16"):
        raise ValueError(f"{dtype} is not written from float32")
    with np.errstate(over="ignore"):  # too large for float16 becomes infinity, which a check finds
        return values.astype(DTYPES[dtype].storage)


@cache
def _float8_values(dtype: str) -> Array:
    """float32 value of each of the 256 patterns; e4m3 is the variant without infinities."""
    exponent_bits, mantissa_bits, bias = (4, 3, 7) if dtype == "F8_E4M3" else (5, 2, 15)
    codes = np.arange(256)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    fraction = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    values = np.ldexp(fraction + (exponent > 0), np.maximum(exponent, 1) - bias)
    if dtype == "F8_E5M2":
        values[exponent == 31] = np.where(fraction[exponent == 31] == 0, math.inf, math.nan)
    else:
        values[codes & 0x7F == 0x7F] = math.nan
    return (np.where(codes & 0x80, -1.0, 1.0) * values).astype(np.float32)


def size_text(count: int) -> str:
    """Bytes for people; GB = 1e9."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
