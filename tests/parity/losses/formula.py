"""Weights by a formula from name, shape and seed, in place of stored ones.

For element i of a tensor in row-major order u = h / 2^32, where h is the finaliser of murmur3 (Austin
Appleby, public domain) of i * 2654435761 + salt, and salt the CRC-32 of the name plus seed * 0x9E3779B9, all
modulo 2^32.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

_MODULUS = np.uint64(2**32 - 1)


def _uniform(name: str, elements: int, seed: int) -> np.ndarray:
    """float64 in [0, 1)."""
    salt = np.uint64((zlib.crc32(name.encode()) + seed * 0x9E3779B9) % 2**32)
    h = (np.arange(elements, dtype=np.uint64) * np.uint64(2654435761) + salt) & _MODULUS
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h ^= h >> np.uint64(shift)
        h = (h * np.uint64(factor)) & _MODULUS
    return h / 2**32


def formula_tensor(name: str, shape: Sequence[int], seed: int, gain: float = 1.0) -> Tensor:
    """One tensor, float32."""
    u = _uniform(name, math.prod(shape), seed)
    if "running_var" in name:
        u = 0.5 + u
    elif "running_mean" in name or "bias" in name:
        u = 0.2 * (u - 0.5)
    elif len(shape) == 1:
        u = 0.75 + 0.5 * u
    else:
        u = (2 * u - 1) * gain * math.sqrt(6 / math.prod(shape[1:]))
    return torch.from_numpy(u.astype(np.float32)).reshape(tuple(shape))


def formula_state(network: nn.Module, seed: int, gain: float = 1.0) -> dict[str, Tensor]:
    """A state dict of the network's own names and shapes."""
    state: Mapping[str, Tensor] = network.state_dict()
    return {name: formula_tensor(name, tensor.shape, seed, gain) for name, tensor in state.items()}
