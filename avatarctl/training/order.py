"""Which sample has which turn: a function of seed, step and slot, so it needs no state and no iterator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from avatarctl.family import Draw
from avatarctl.rng import generator

if TYPE_CHECKING:
    from avatarctl.config import RunConfig

__all__ = ["Order", "own_slots", "samples_per_step"]


def samples_per_step(cfg: RunConfig) -> int:
    """The samples of an optimizer step, of all processes together."""
    return cfg.train.batch_size * cfg.train.gradient_accumulation * cfg.runtime.gpus


def own_slots(cfg: RunConfig, rank: int) -> range:
    """Which samples of a step a process takes: one behind the other, so that forward passes hold the samples
    that they would hold in one process with as many passes as all processes have together."""
    count = cfg.train.batch_size * cfg.train.gradient_accumulation
    return range(rank * count, (rank + 1) * count)


class Order:
    """Every epoch is a new permutation of `samples`; steps of `slots` samples go through epochs one after
    another, whatever remains of one. own: the slots that this process takes of each, all unless given."""

    def __init__(self, seed: int, samples: int, slots: int, own: range | None = None) -> None:
        self._seed, self._samples, self._slots = seed, samples, slots
        self._own = range(slots) if own is None else own
        self._epoch: tuple[int, list[int]] = (-1, [])

    def draws(self, step: int) -> list[Draw]:
        """The draws of an optimizer step."""
        return [Draw(self._seed, step, slot, self._slots) for slot in self._own]

    def places(self, step: int) -> list[int]:
        """The samples of an optimizer step, by their place."""
        return [self._place(step * self._slots + slot) for slot in self._own]

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
