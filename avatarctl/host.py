"""Tensors that wait on the host while the device computes something else: the one way there, and back.

Where device and host are the same memory, as on a CPU, what waits is a copy that is marked, so that
`LiveBytes` counts it as the host's. On fake tensors the host is "meta": nothing else tells two places apart
there, since fake tensors of a machine without a card are on its CPU.
"""

from __future__ import annotations

import warnings
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["HOST", "is_of_host", "mark", "to_device", "to_host", "waits_as"]

HOST: Final = torch.device("cpu")

_MARK: Final = "waits_on_the_host"


def to_host(tensor: Tensor, host: torch.device = HOST, what: str = "activations") -> Tensor:
    """A copy on the host, of the same strides: kernels may sum in another order where these differ. From a
    card it is pinned where the system lets it, and under way when this returns. what: for whoever counts."""
    with torch.no_grad():
        if host.type == "meta":
            there = tensor.to(host)
            mark(there, what)
            return there.detach()  # an operation more: whoever counts sees the mark
        stride = torch.empty_like(tensor, device="meta").stride()
        # Empty at first: what it holds is counted when it is marked already.
        flat = _room(tensor, host)
        mark(flat, what)
        if flat.numel() < tensor.numel():
            flat.resize_(tensor.numel())
        there = flat.as_strided(tensor.shape, stride)
        there.copy_(tensor, non_blocking=True)
        return there


def to_device(there: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; from pinned memory what computes next waits for it and the program does not."""
    return there.to(device, non_blocking=True, copy=True)


def mark(tensor: Tensor, what: str) -> None:
    """What the tensor holds is the host's from now on. what: it is, for whoever counts."""
    storage: Any = tensor.untyped_storage()
    setattr(storage, _MARK, what)


def is_of_host(storage: torch.UntypedStorage) -> bool:
    """Whether somebody put it there to wait."""
    return waits_as(storage) is not None


def waits_as(storage: torch.UntypedStorage) -> str | None:
    """What it is that waits there; None for what is not the host's."""
    return getattr(storage, _MARK, None)


def _room(tensor: Tensor, host: torch.device) -> Tensor:
    if tensor.device.type == "cuda":
        try:
            return torch.empty(tensor.numel(), dtype=tensor.dtype, device=host, pin_memory=True)
        except RuntimeError:  # the limit of locked memory; Python says a warning of one line once
            slower = "the system locks no more memory: what waits on the host is copied more slowly"
            warnings.warn(slower, RuntimeWarning, stacklevel=3)
    return torch.empty(0, dtype=tensor.dtype, device=host)
