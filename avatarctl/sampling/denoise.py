"""One span from noise to latents: the inner loop that every outer loop shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from avatarctl.errors import Interrupted, UnusableWeights
from avatarctl.events import Emit, StepFinished, silent
from avatarctl.family import Condition, Family, Guidance, Prepared, Span
from avatarctl.finite import is_finite
from avatarctl.flow_matching import euler_step, timesteps_of
from avatarctl.rng import latent_noise

__all__ = ["Denoiser", "NoiseSource"]


NoiseSource = Callable[[int, Sequence[int | str], int, int, tuple[int, int, int]], Tensor]
"""Called as `rng.latent_noise`: seed, key, first frame, frames, (C, h, w) -> float32 [1, C, frames, h, w]."""


@dataclass(frozen=True)
class Denoiser:
    """Steps of one job and its guidance.

    sigmas: the steps + 1 numbers of `Family.sigmas` as Python floats, which hold them exactly: a step then
    reads no tensor. unit: what people call a span (`events.Planned`).
    """

    family: Family
    dit: nn.Module
    guidance: Guidance
    sigmas: Sequence[float]
    noise: NoiseSource = latent_noise
    emit: Emit = silent
    should_stop: Callable[[], bool] = lambda: False
    unit: str = "span"

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def __call__(self, noise: Tensor, condition: Condition, span: Span, state: Any) -> Tensor:
        """noise float32 [B, C, T, h, w] -> latents of the same shape, all steps of one span.

        Given latents are put in before every step and once more at the end. Raises Interrupted at the
        next step once `should_stop` says so, UnusableWeights when the result is not finite.
        """
        prepared = self.prepare(condition, state)
        x = noise
        for step in range(self.steps):
            x = self.step(put_clean(x, condition), step, prepared, span, state)
        self.require_finite(x, span)
        return put_clean(x, condition)

    @torch.no_grad()
    def prepare(self, condition: Condition, state: Any) -> Prepared:
        """What all steps of a span share, for every branch that any of them runs."""
        names = (self.family.branches(self.guidance, step) for step in range(self.steps))
        union = tuple(dict.fromkeys(name for step in names for name in step))
        return self.family.prepare(self.dit, condition, union, state)

    @torch.no_grad()
    def step(self, x: Tensor, step: int, prepared: Prepared, span: Span, state: Any) -> Tensor:
        """One guided Euler step of a span: float32 [B, C, T, h, w] -> the same shape. Raises Interrupted."""
        if self.should_stop():
            raise Interrupted("stopped by a signal")
        sigma, sigma_next = self.sigmas[step], self.sigmas[step + 1]
        velocities = self.family.predict(
            self.dit,
            x,
            # Rounded once, as a product of float32 numbers would be.
            torch.full((x.shape[0],), timesteps_of(sigma), dtype=torch.float32, device=x.device),
            prepared,
            self.family.branches(self.guidance, step),
            span=span,
            step=step,
            state=state,
        )
        velocity = self.family.combine(velocities, self.guidance, step)
        x = euler_step(x, velocity, sigma, sigma_next)
        self.emit(StepFinished(span.index, step))
        return x

    def require_finite(self, x: Tensor, span: Span) -> None:
        """Raises UnusableWeights for finished latents that are not finite."""
        if not is_finite(x):
            raise UnusableWeights(
                f"the network gave values that are not finite in {self.unit} {span.index + 1}",
                fix="try --dtype float32; if that does not help the weights are damaged",
            )


def put_clean(x: Tensor, condition: Condition) -> Tensor:
    """x with the given latents in their places."""
    if condition.fixed_mask is None or condition.clean is None:
        return x
    return torch.where(condition.fixed_mask, condition.clean.to(x.dtype), x)
