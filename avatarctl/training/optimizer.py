"""AdamW on the weights that are trained, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from avatarctl.errors import UnusableWeights

if TYPE_CHECKING:
    from avatarctl.config.sections import Train

__all__ = ["Optimizer", "learning_rate"]


def learning_rate(train: Train, step: int) -> float:
    """Of the optimizer step with `step` steps before it: a function of the configuration and that number
    alone, so a resumed run cannot go astray."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    after = train.max_steps - train.warmup_steps
    held = train.hold * after
    falling = max(after - held, 1.0)
    progress = min(max(step - train.warmup_steps - held, 0.0) / falling, 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return train.final_learning_rate + (train.learning_rate - train.final_learning_rate) * share


class Optimizer:
    """AdamW by the names of what it trains; its moments are float32, as the weights are."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], train: Train) -> None:
        self._train, self._parameters = train, parameters
        each = list(parameters.values())
        on_cpu = all(parameter.device.type == "cpu" for parameter in each)
        self._adamw = torch.optim.AdamW(
            each,
            lr=train.learning_rate,
            betas=train.betas,
            weight_decay=train.weight_decay,
            fused=on_cpu or None,  # there the default is a dozen operations for each tensor
        )

    def clip(self) -> Tensor:
        """Scales gradients down to `train.clip_norm`; the norm before, a scalar."""
        return nn.utils.clip_grad_norm_(self._parameters.values(), self._train.clip_norm)

    def step(self, step: int) -> float:
        """One step at the rate of `step`, which is returned; gradients are dropped."""
        rate = learning_rate(self._train, step)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self.drop_gradients()
        return rate

    def drop_gradients(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name; empty before the first step."""
        held = self._adamw.state
        return {
            f"{name}.{key}": value
            for name, parameter in self._parameters.items()
            for key, value in held.get(parameter, {}).items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave. Raises UnusableWeights for the moments of other weights."""
        held: dict[Tensor, dict[str, Any]] = {}
        for name, tensor in state.items():
            parameter_name, _, key = name.rpartition(".")
            parameter = self._parameters.get(parameter_name)
            if parameter is None or (key != "step" and tensor.shape != parameter.shape):
                raise UnusableWeights(f"holds the moments of other weights: {parameter_name[:100]}")
            place = torch.device("cpu") if key == "step" else parameter.device
            held.setdefault(parameter, {})[key] = tensor.to(place)
        if state and len(held) != len(self._parameters):
            raise UnusableWeights(f"holds moments of {len(held)} of {len(self._parameters)} weights")
        self._adamw.state.clear()
        self._adamw.state.update(held)
