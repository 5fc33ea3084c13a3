"""One span from noise to latents: the inner loop that every outer loop shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from avatarctl.errors import Interrupted, UnusableWeights
from avatarctl.events import Emit, StepFinished, silent
from avatarctl.family import Condition, Family, Guidance, Span
from avatarctl.flow_matching import euler_step, timesteps_of

__all__ = ["Denoiser"]


@dataclass(frozen=True)
class Denoiser:
    """Steps of one job: noise levels [steps + 1], float32, and the guidance."""

    family: Family
    dit: nn.Module
    guidance: Guidance
    sigmas: Tensor
    emit: Emit = silent
    should_stop: Callable[[], bool] = lambda: False

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @torch.no_grad()
    def __call__(self, noise: Tensor, condition: Condition, span: Span, state: Any) -> Tensor:
        """noise float32 [B, C, T, h, w] -> latents of the same shape.

        Given latents are put in before every step and once more at the end. Raises Interrupted at the
        next step once `should_stop` says so, UnusableWeights when the result is not finite.
        """
        family, branches_of = self.family, self.family.branches
        union = tuple(
            dict.fromkeys(name for step in range(self.steps) for name in branches_of(self.guidance, step))
        )
        prepared = family.prepare(self.dit, condition, union, state)
        timesteps = timesteps_of(self.sigmas)
        x = noise
        for step in range(self.steps):
            if self.should_stop():
                raise Interrupted("stopped by a signal")
            x = put_clean(x, condition)
            velocities = family.predict(
                self.dit,
                x,
                timesteps[step].to(x.device).expand(x.shape[0]),
                prepared,
                branches_of(self.guidance, step),
                span=span,
                step=step,
                state=state,
            )
            velocity = family.combine(velocities, self.guidance, step)
            x = euler_step(x, velocity, float(self.sigmas[step]), float(self.sigmas[step + 1]))
            self.emit(StepFinished(span.index, step))
        if not bool(torch.isfinite(x).all()):
            raise UnusableWeights(
                f"the network gave values that are not finite in chunk {span.index + 1}",
                fix="try --dtype float32; if that does not help the weights are damaged",
            )
        return put_clean(x, condition)


def put_clean(x: Tensor, condition: Condition) -> Tensor:
    """x with the given latents in their places."""
    if condition.fixed_mask is None or condition.clean is None:
        return x
    return torch.where(condition.fixed_mask, condition.clean.to(x.dtype), x)
