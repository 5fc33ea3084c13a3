"""LoRA pairs filled up to a larger rank with zeros: the product is the same, the rank is one for all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from avatarctl.files.tensors import DTYPES, Array, StoredTensor, TensorInfo
from avatarctl.weights.weight_file import LoraPair

__all__ = ["padded_pair"]


@dataclass(frozen=True)
class _Padded:
    """A matrix with zero rows or columns behind its own. Zero is all bits zero in every dtype."""

    source: StoredTensor
    shape: tuple[int, int]

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.source.info.dtype, self.shape)

    def read(self, start: int, stop: int) -> Array:
        rows, columns = self.source.info.shape
        width = self.shape[1]
        first, last = start // width, -(-stop // width)
        block = np.zeros((last - first, width), DTYPES[self.info.dtype].storage)
        held = min(last, rows) - first
        if held > 0:
            read = self.source.read(first * columns, (first + held) * columns)
            block[:held, :columns] = read.reshape(held, columns)
        return block.reshape(-1)[start - first * width : stop - first * width]


def padded_pair(pair: LoraPair, rank: int) -> LoraPair:
    """`pair` with `rank` rows in `down` and columns in `up`; its scale, alpha / rank, stays what it was."""
    if pair.rank == rank:
        return pair
    down = _Padded(pair.down, (rank, pair.down.info.shape[1]))
    up = _Padded(pair.up, (pair.up.info.shape[0], rank))
    return replace(
        pair, down=down, up=up, alpha=None if pair.alpha is None else pair.alpha / pair.rank * rank
    )
