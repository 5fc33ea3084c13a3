"""Rectified flow in the convention of Wan: x_sigma = (1 - sigma) x + sigma noise, v = noise - x.

Everything is float32 or wider: trainers that round timesteps to bfloat16 map 706 of the 1000 training
timesteps of shift 5 to another one. We carry the exact value and never look it up.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "TRAIN_TIMESTEPS",
    "add_noise",
    "clean_estimate",
    "double_shifted_sigmas",
    "euler_step",
    "shifted_sigmas",
    "timesteps_of",
    "training_weights",
    "velocity_target",
]

TRAIN_TIMESTEPS = 1000

Sigmas = TypeVar("Sigmas", Tensor, float)


def shifted_sigmas(steps: int, shift: float) -> Tensor:
    """Sigmas of `steps` Euler steps and the final 0: float32 [steps + 1].

    s_i = 1 - i / steps, sigma_i = shift s_i / (1 + (shift - 1) s_i); the first is 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return _shifted(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32), shift)


def double_shifted_sigmas(steps: int, shift: float) -> Tensor:
    """The same sigmas shifted twice, as schedulers do that shift at construction and again for a run: float32
    [steps + 1].

    s goes from 1 to the shifted smallest training sigma, shift 0.001 / (1 + (shift - 1) 0.001), in `steps`
    equal steps and is shifted once more; 0 is appended. That smallest sigma is float32 and all else float64,
    rounded once, as in diffusers' FlowMatchEulerDiscreteScheduler: one bit of a timestep near 1000 turns the
    fastest sinusoid by 6e-5.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    smallest = float(_shifted(torch.tensor(1 / TRAIN_TIMESTEPS), shift))
    s = torch.linspace(1.0, smallest, steps, dtype=torch.float64)
    return torch.cat([_shifted(s, shift).float(), torch.zeros(1)])


def _shifted(s: Tensor, shift: float) -> Tensor:
    return shift * s / (1 + (shift - 1) * s)


def timesteps_of(sigmas: Sigmas) -> Sigmas:
    """The network's time scale: 1000 * sigma, so in 0..1000, never 0..1."""
    return sigmas * TRAIN_TIMESTEPS


def _beside(sigma: Tensor | float, like: Tensor) -> Tensor:
    """Sigma in float32 with as many axes as `like`, or none: from a scalar, [B] or [B, T], see `add_noise`.

    Left to broadcasting, the axes of sigma would meet the last ones of the latents.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=like.device)
    shape = tuple(sigma.shape)
    if shape == ():
        return sigma
    if shape == like.shape[:1]:
        return sigma.reshape(-1, *[1] * (like.ndim - 1))
    if like.ndim == 5 and shape == (like.shape[0], like.shape[2]):
        return sigma[:, None, :, None, None]
    raise ValueError(f"sigma {list(shape)} is neither one per sample nor one per frame of {list(like.shape)}")


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """(1 - sigma) clean + sigma noise.

    clean and noise are [B, ...]; sigma is a scalar, [B] or, for latents [B, C, T, h, w], [B, T]: one for each
    latent frame. Raises ValueError for a sigma of another shape.
    """
    sigma = _beside(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """What the network is trained to predict: noise - clean."""
    return noise - clean


def clean_estimate(noisy: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """x0 = x_sigma - sigma v, the clean latents implied by a prediction; sigma as in `add_noise`."""
    return noisy - _beside(sigma, noisy) * velocity


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """One step of dx/dsigma = v from `sigma` down to `sigma_next`, each as in `add_noise`.

    Python floats are subtracted as such, so that no device is asked for them.
    """
    if isinstance(sigma, Tensor) or isinstance(sigma_next, Tensor):
        return x + velocity * (_beside(sigma_next, x) - _beside(sigma, x))
    return x + velocity * (sigma_next - sigma)


def training_weights(shift: float) -> Tensor:
    """Loss weight of every training timestep, float32 [1000], mean 1.

    A Gaussian bell over the timestep, lowered so that its smallest value is 0, as the flow-match scheduler
    of DiffSynth-Studio has it.
    """
    timesteps = timesteps_of(shifted_sigmas(TRAIN_TIMESTEPS, shift)[:-1])
    bell = torch.exp(-2 * ((timesteps - TRAIN_TIMESTEPS / 2) / TRAIN_TIMESTEPS) ** 2)
    weights = bell - bell.min()
    return weights * (TRAIN_TIMESTEPS / weights.sum())
