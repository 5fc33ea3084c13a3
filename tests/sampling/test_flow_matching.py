"""Sigma may be one number, one per sample or one per latent frame; every latent meets its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from avatarctl.flow_matching import (
    add_noise,
    clean_estimate,
    double_shifted_sigmas,
    euler_step,
    shifted_sigmas,
    timesteps_of,
)

# (B, C, T, h, w). In the first all sizes coincide: nothing raises where sigma meets a wrong axis.
SHAPES = [(3, 3, 3, 3, 3), (2, 4, 5, 3, 6), (1, 2, 4, 1, 1), (4, 1, 1, 2, 2)]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn_sigmas(*shape: int, seed: int = 9) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(function, tensors: tuple[Tensor, ...], *sigmas: Tensor) -> Tensor:
    """Each latent frame by itself, with a scalar sigma; sigmas [B, T]."""
    samples, _, frames, *_ = tensors[0].shape
    rows = []
    for b in range(samples):
        own = [
            function(
                *(tensor[b : b + 1, :, t : t + 1] for tensor in tensors), *(sigma[b, t] for sigma in sigmas)
            )
            for t in range(frames)
        ]
        rows.append(torch.cat(own, dim=2))
    return torch.cat(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [add_noise, clean_estimate])
def test_every_latent_frame_has_its_own_sigma(function, shape: tuple[int, ...]) -> None:
    first, second, sigma = drawn(*shape, seed=1), drawn(*shape, seed=2), drawn_sigmas(shape[0], shape[2])
    assert torch.equal(function(first, second, sigma), by_hand(function, (first, second), sigma))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_takes_every_latent_frame_to_its_own_sigma(shape: tuple[int, ...]) -> None:
    x, velocity = drawn(*shape, seed=1), drawn(*shape, seed=2)
    before, after = drawn_sigmas(shape[0], shape[2]), drawn_sigmas(shape[0], shape[2], seed=10)
    expected = by_hand(euler_step, (x, velocity), before, after)
    assert torch.equal(euler_step(x, velocity, before, after), expected)
    # A block that is finished at once goes from many levels to one; a sample may have one level of its own.
    finished = by_hand(euler_step, (x, velocity), before, torch.zeros_like(before))
    assert torch.equal(euler_step(x, velocity, before, 0.0), finished)
    own = after[:, :1]
    expected = by_hand(euler_step, (x, velocity), before, own.expand_as(before))
    assert torch.equal(euler_step(x, velocity, before, own[:, 0]), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_sigma_per_sample_or_for_all_is_as_before(shape: tuple[int, ...]) -> None:
    clean, noise, sigma = drawn(*shape, seed=1), drawn(*shape, seed=2), drawn_sigmas(shape[0])
    per_sample = by_hand(add_noise, (clean, noise), sigma[:, None].expand(shape[0], shape[2]))
    assert torch.equal(add_noise(clean, noise, sigma), per_sample)
    assert torch.equal(add_noise(clean, noise, 0.25), add_noise(clean, noise, torch.full(shape[:1], 0.25)))


def test_a_clean_estimate_undoes_the_noise() -> None:
    clean, noise, sigma = drawn(2, 4, 5, 3, 6, seed=1), drawn(2, 4, 5, 3, 6, seed=2), drawn_sigmas(2, 5)
    restored = clean_estimate(add_noise(clean, noise, sigma), noise - clean, sigma)
    torch.testing.assert_close(restored, clean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(5,), (2, 4), (5, 2), (1, 5), (2, 1), (2, 5, 1), (2, 1, 5, 1, 1)])
@pytest.mark.parametrize("function", [add_noise, clean_estimate])
def test_a_sigma_of_another_shape_is_refused(function, shape: tuple[int, ...]) -> None:
    """Rather than broadcast: (5, 2) has its axes in the wrong order, and fits none of these latents."""
    latents = drawn(2, 4, 5, 3, 6, seed=1)
    with pytest.raises(ValueError, match="neither one per sample nor one per frame"):
        function(latents, latents, drawn_sigmas(*shape))


@pytest.mark.parametrize("schedule", [shifted_sigmas, double_shifted_sigmas])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_python_floats_give_the_bits_of_float32_tensors(schedule, shift: float, steps: int) -> None:
    """Times of a step and its Euler sum, from the numbers of a schedule as a run takes them."""
    sigmas = schedule(steps, shift)
    numbers = sigmas.tolist()
    x, velocity = drawn(1, 2, 3, 4, 5, seed=1), drawn(1, 2, 3, 4, 5, seed=2)
    for step in range(steps):
        assert torch.full((1,), timesteps_of(numbers[step])).equal(timesteps_of(sigmas)[step : step + 1])
        assert torch.equal(
            euler_step(x, velocity, numbers[step], numbers[step + 1]),
            euler_step(x, velocity, sigmas[step], sigmas[step + 1]),
        )
