"""What every loop over a family gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["FrameBlock"]


@dataclass(frozen=True)
class FrameBlock:
    """Finished frames: index of the span and of the first frame, pixels [3, n, H, W] in [-1, 1]."""

    span: int
    first: int
    pixels: Tensor
