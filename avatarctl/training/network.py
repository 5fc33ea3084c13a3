"""The transformer in training: what of it moves, its average, its precision, and the files it becomes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from avatarctl.errors import UnusableWeights
from avatarctl.host import HOST
from avatarctl.models.device import dtype_of
from avatarctl.models.recompute import again
from avatarctl.parallel.sharded import is_sharded, part_like, whole
from avatarctl.training.checkpoints import Weights
from avatarctl.training.trainables import Trainables
from avatarctl.training.weights_file import trained_file
from avatarctl.weights.layout import WeightLayout

if TYPE_CHECKING:
    from avatarctl.config import RunConfig

__all__ = ["Network"]


@dataclass
class Network:
    """dit: with its trainable weights; base: what a file says of the model that is trained; data: what it
    says of the mask that it is trained with, nothing for a model that takes an image; host: where the inputs
    of checkpointed blocks may wait."""

    dit: nn.Module
    layout: WeightLayout
    trainables: Trainables
    cfg: RunConfig
    base: Mapping[str, Any]
    data: Mapping[str, str]
    device: torch.device
    host: torch.device = HOST
    is_sharded: bool = field(init=False, default=False)
    _mean: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dit: Any = self.dit
        match self.cfg.memory.activation_checkpointing:
            case "block":
                dit.enable_gradient_checkpointing()
            case "block_offload":
                dit.enable_gradient_checkpointing(functools.partial(again, host=self.host))
        if self.cfg.train.ema:
            self._mean = {name: tensor.clone() for name, tensor in self.trainables.state().items()}
        self.is_sharded = is_sharded(self.dit)

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 matrix products where the run asks for them; in float32 nothing changes."""
        dtype = dtype_of(self.cfg.runtime)
        if dtype == torch.float32:
            return nullcontext()
        # The cache holds a copy of every weight that is trained, which of a sharded network is all too much.
        return torch.autocast(self.device.type, dtype, cache_enabled=not self.is_sharded)

    @torch.no_grad()
    def average(self) -> None:
        """One more step of the moving average, mean += (1 - decay) (weight - mean)."""
        for name, mean in self._mean.items():
            mean.lerp_(self.trainables.parameters[name].detach(), 1 - self.cfg.train.ema)

    def averages(self) -> list[Tensor]:
        """Of the weights, where the run keeps them."""
        return list(self._mean.values())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the network while the block lasts, where the run keeps some. Both are then
        what they were, to the bit; one weight at a time is held twice."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, mean in self._mean.items():
            weight = self.trainables.parameters[name]
            held = weight.detach().clone()
            weight.copy_(mean)
            mean.copy_(held)

    def load(self, trained: Mapping[str, Tensor], averaged: Mapping[str, Tensor] | None) -> None:
        """Raises UnusableWeights for the weights of another model, or without the average of a run that
        keeps one."""
        self.trainables.load(trained)
        if not self._mean:
            return
        if averaged is None or averaged.keys() != self._mean.keys():
            raise UnusableWeights("holds no averaged weights, and train.ema asks for them")
        self._mean = {name: part_like(averaged[name], mean) for name, mean in self._mean.items()}

    def states(self) -> list[dict[str, Tensor]]:
        """The trained weights and, where the run keeps one, their average. Of a sharded network all processes
        call it, and the main one gets them."""
        found = (self.trainables.state(), self._mean)
        return [{name: whole(tensor) for name, tensor in state.items()} for state in found if state]

    def files(
        self, step: int, states: Sequence[Mapping[str, Tensor]] | None = None
    ) -> tuple[Weights, Weights | None]:
        """What `states` gives, as files."""
        made = [
            trained_file(self.dit, self.layout, state, self.trainables, self.cfg, self.base, self.data, step)
            for state in (self.states() if states is None else states)
        ]
        return made[0], made[1] if len(made) > 1 else None
