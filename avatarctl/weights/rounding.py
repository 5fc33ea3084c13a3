"""Which singular values of a change rounding alone can give.

Errors of rounding that do not depend on each other, as a matrix, have singular values up to about the norm of
their largest row plus that of their largest column (Bandeira and van Handel 2016, "Sharp nonasymptotic bounds
on the norm of random matrices with independent entries", theorem 3.1). Rows differ much where a change is
large: the merged value is what is rounded, and a few rows and columns hold most of a change of rank 1.

The mean square of the error of a value w is at most (2 e w)^2 / 12, e being the largest relative error of the
dtype: errors are uniform over one unit in the last place, which is at most 2 e |w|. Rounded are

- the merged value, to the dtype of the file;
- in float32, every partial sum of up @ down. Of k partial sums the j-th has on average j / k of the square of
  the whole, together (k + 1) / 2 (Higham 2002, "Accuracy and stability of numerical algorithms", 3.1, with
  errors that do not depend on each other). From rank 6 on this is most of what a large change has;
- in float32, the difference of the two models.

So the floor of rank k is, summed over s = largest row and s = largest column,

    sqrt((e^2 |s of merged|^2 + e32^2 (k + 3) / 2 |s of change|^2) / 3)

Errors do depend on each other where base and file have one dtype and a change is simple: it has few different
values (+-0.01), or rank 1 or 2 and about the size of a unit in the last place. They repeat themselves then,
and a part of them is kept as rank: measured in bfloat16, at rank 1 from 512 x 512 on, at rank 2 from 1024.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

__all__ = ["Squares", "rounding_floor", "rounding_norm"]

Array = np.ndarray[Any, Any]

_ROUNDOFF: Final = {
    "F64": 2.0**-24, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8,
    "F8_E4M3": 2.0**-4, "F8_E5M2": 2.0**-3,
}  # fmt: skip
"""Largest relative rounding error by dtype; float64 is read as float32."""


class Squares:
    """Sums of squares of the rows [m] and the columns [n] of a matrix, in float64."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = np.zeros(rows), np.zeros(columns)

    def add(self, first: int, block: Array) -> None:
        """Whole rows of the matrix, from row `first` on."""
        squares = np.square(block, dtype=np.float64)
        self.rows[first : first + len(block)] = squares.sum(1)
        self.columns += squares.sum(0)

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return math.sqrt(self.rows.sum())


def rounding_floor(merged: Squares, change: Squares, dtype: str, limit: int) -> Array:
    """[min(limit, m, n)], by k - 1: the largest singular value that rounding alone gives a change of rank k.

    merged, change: of the model's values and of their difference from the base, m x n both.
    dtype: of the model's file.
    """
    k = np.arange(1, min(limit, len(change.rows), len(change.columns)) + 1)
    of_row = rounding_norm(merged.rows.max(), change.rows.max(), dtype, k)
    return of_row + rounding_norm(merged.columns.max(), change.columns.max(), dtype, k)


def rounding_norm(merged: float, change: float, dtype: str, rank: Any) -> Array:
    """Norm of the errors of some values, given the sums of squares of these values in the model and in the
    change, which has this rank: a number, or several as an array."""
    own, wide = _ROUNDOFF[dtype], _ROUNDOFF["F32"]
    return np.sqrt((own**2 * merged + wide**2 * (rank + 3) / 2 * change) / 3)
