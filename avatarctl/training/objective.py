"""One batch of one step: noise, a velocity, its error. Everything that differs between families is asked of
the family (`TrainableFamily`); nothing here knows a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from avatarctl.flow_matching import add_noise, velocity_target
from avatarctl.rng import latent_noise

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.family import Condition, Draw, Timesteps, TrainableFamily

__all__ = ["FlowStep", "flow_step", "noisy_latents", "training_noise"]


@dataclass(frozen=True)
class FlowStep:
    """What a batch came to.

    loss: of each sample, float32 [B], with gradient; parts: numbers to be shown, each [B]; noisy and velocity
    [B, C, T, h, w], the latter with gradient.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    noisy: Tensor
    velocity: Tensor


def training_noise(draws: Sequence[Draw], shape: torch.Size) -> Tensor:
    """Standard normal float32 [B, C, T, h, w], on the CPU; each sample's by its own key."""
    _, channels, frames, height, width = shape
    planes = [
        latent_noise(draw.seed, ("training", draw.step, draw.slot), 0, frames, (channels, height, width))
        for draw in draws
    ]
    return torch.cat(planes)


def noisy_latents(condition: Condition, noise: Tensor, timesteps: Timesteps) -> Tensor:
    """The latents at their sigmas; frames that are given stay clean, as in sampling."""
    assert condition.clean is not None
    noisy = add_noise(condition.clean, noise, timesteps.sigma)
    if condition.fixed_mask is None:
        return noisy
    return torch.where(condition.fixed_mask, condition.clean, noisy)


def flow_step(
    family: TrainableFamily,
    dit: nn.Module,
    condition: Condition,
    timesteps: Timesteps,
    noise: Tensor,
    cfg: RunConfig,
) -> FlowStep:
    """The error of the predicted velocity; all tensors on one device."""
    assert condition.clean is not None
    noisy = noisy_latents(condition, noise, timesteps)
    velocity = family.training_forward(dit, noisy, timesteps.t, condition)
    target = velocity_target(condition.clean, noise)
    loss, parts = family.loss(velocity, target, condition, timesteps, cfg)
    return FlowStep(loss, parts, noisy, velocity)
