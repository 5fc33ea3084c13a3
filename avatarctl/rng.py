"""Random numbers that depend on what they are for, never on what was drawn before.

Every draw names its key: (seed, purpose, job, chunk, ...). The key is hashed to the seed of a fresh CPU
generator, so a result is the same for every order of jobs, slice of work, device and process count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["generator", "latent_noise", "stable_hash"]

Key = int | str


def stable_hash(*parts: Key | bytes) -> int:
    """A 63-bit hash of the parts, the same in every process and release of Python."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        # Length and type go in too: ("ab", "c") and ("a", "bc"), 1 and "1" must differ.
        digest.update(f"{type(part).__name__}:{len(data)}:".encode())
        digest.update(data)
    return int.from_bytes(digest.digest(), "big") >> 1


def generator(seed: int, purpose: str, *key: Key) -> torch.Generator:
    """A CPU generator that belongs to this key alone."""
    import torch

    made = torch.Generator(device="cpu")
    made.manual_seed(stable_hash(seed, purpose, *key))
    return made


def latent_noise(
    seed: int, key: Sequence[Key], first_frame: int, frames: int, shape: tuple[int, int, int]
) -> Tensor:
    """Standard normal float32 [1, C, frames, h, w]; shape is (C, h, w).

    Latent frame f of a key has a generator of its own, so that a window that starts at `first_frame` sees
    the very numbers of the whole: noise is never stored and never depends on how a video is cut.
    """
    import torch

    planes = [
        torch.randn(shape, generator=generator(seed, "noise", *key, frame), dtype=torch.float32)
        for frame in range(first_frame, first_frame + frames)
    ]
    return torch.stack(planes, dim=1).unsqueeze(0)
