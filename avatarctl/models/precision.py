"""Casting networks without losing the parts that need float32."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["cast", "is_float32_island"]


def is_float32_island(module: nn.Module, name: str) -> bool:
    """Whether a parameter, by its dotted name, stays float32 under any run dtype.

    A plain `.to(bfloat16)` casts time embedding, norms and modulation tables too, which multiplies the error
    of a bfloat16 run by eight (spec/building-blocks.md 1).
    """
    islands = getattr(module, "_keep_in_fp32_modules", None) or ()
    return not set(islands).isdisjoint(name.split("."))


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast floating-point parameters in place, islands excepted; returns the module."""
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if is_float32_island(module, name) else dtype)
    return module
