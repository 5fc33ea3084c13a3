"""Whether stored numbers are finite, told from their bits.

A float is infinite or NaN exactly when all bits of its exponent are set (IEEE 754-2019, 3.4), and then its
bits, read as an integer, are at least that pattern. Read as signed integers the largest element tells
about the positive half; read as unsigned ones the largest tells about the negative half. Two maxima need
no array of booleans, work where numpy has no type (bfloat16, float8) and run at the speed of memory.

float8 e4m3 has no infinity and one NaN per sign, all bits set (Micikevicius et al. 2022, "FP8 formats for
deep learning", table 1): there the pattern is the NaN itself.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from avatarctl.files.tensors import DTYPES, FileTensor, block_ranges

__all__ = ["nonfinite", "nonfinite_file"]

_LEAST: Final = {
    "F64": 0x7FF0_0000_0000_0000,
    "F32": 0x7F80_0000,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F8_E5M2": 0x7C,
    "F8_E4M3": 0x7F,
}
"""The smallest positive bit pattern that is not a finite number, by dtype."""


def nonfinite(array: np.ndarray[Any, Any], dtype: str) -> bool:
    """Whether any element, in the storage type of `dtype`, is NaN or infinite; integers never are."""
    least = _LEAST.get(dtype)
    if least is None or array.size == 0:
        return False
    size = DTYPES[dtype].itemsize
    sign = 1 << (8 * size - 1)
    return bool(array.view(f"<i{size}").max() >= least or array.view(f"<u{size}").max() >= sign | least)


def nonfinite_file(tensor: object) -> Path | None:
    """The file to blame for a tensor that is not finite: the first of those it is read and computed from that
    holds NaN or infinity itself; None where only the computation does, or no file is left."""
    if isinstance(tensor, FileTensor):
        blocks = (tensor.read(start, stop) for start, stop in block_ranges(tensor.info))
        return tensor.path if any(nonfinite(block, tensor.info.dtype) for block in blocks) else None
    if not is_dataclass(tensor):
        return None
    parts = (nonfinite_file(getattr(tensor, part.name)) for part in fields(tensor))
    return next((path for path in parts if path is not None), None)
