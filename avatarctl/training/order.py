"""Which sample has which turn: a function of seed, step and slot, so it needs no state and no iterator."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from avatarctl.family import Draw
from avatarctl.rng import generator

__all__ = ["Order"]


class Order:
    """Every epoch is a new permutation of `samples`; steps of `slots` samples go through epochs one after
    another, whatever remains of one."""

    def __init__(self, seed: int, samples: int, slots: int) -> None:
        self._seed, self._samples, self._slots = seed, samples, slots
        self._epoch: tuple[int, list[int]] = (-1, [])

    def draws(self, step: int) -> list[Draw]:
        """The draws of an optimizer step."""
        return [Draw(self._seed, step, slot, self._slots) for slot in range(self._slots)]

    def places(self, step: int) -> list[int]:
        """The samples of an optimizer step, by their place."""
        return [self._place(step * self._slots + slot) for slot in range(self._slots)]

    def from_step(self, step: int, steps: int) -> Iterator[int]:
        """The samples of all steps from `step` on, one after another."""
        for each in range(step, steps):
            yield from self.places(each)

    def _place(self, turn: int) -> int:
        epoch, within = divmod(turn, self._samples)
        if self._epoch[0] != epoch:
            drawn = torch.randperm(self._samples, generator=generator(self._seed, "order", epoch))
            self._epoch = (epoch, drawn.tolist())
        return self._epoch[1][within]
