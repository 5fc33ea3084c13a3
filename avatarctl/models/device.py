"""Where and in which precision a run computes, as its settings say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from avatarctl.errors import EnvironmentMissing, NotYetSupported
from avatarctl.live_bytes import process_peak_bytes

if TYPE_CHECKING:
    from avatarctl.config import Runtime

__all__ = ["dtype_of", "peak_memory", "resolve_device"]


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU. Raises EnvironmentMissing for one that is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentMissing(
            f"{name} is not there; this PyTorch sees {torch.cuda.device_count()} CUDA devices",
            where="runtime.device",
            fix="use --device cpu, or install a CUDA build of torch",
        )
    return device


def dtype_of(runtime: Runtime) -> torch.dtype:
    """Of the large networks."""
    dtype: torch.dtype = getattr(torch, runtime.dtype or "float32")
    return dtype


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that were in use so far: of tensors on a CUDA device, elsewhere of the whole process.
    None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return process_peak_bytes()
    except NotYetSupported:
        return None
