"""Whether the numbers of a tensor are finite."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

__all__ = ["is_finite"]


def is_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite. A tensor without numbers, fake or on meta, holds neither."""
    return x.is_meta or isinstance(x, FakeTensor) or bool(torch.isfinite(x).all())
