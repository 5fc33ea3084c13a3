"""Latents that are given have no noise to be taken off: auxiliary losses see them as the network got them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from avatarctl.flow_matching import velocity_target
from avatarctl.training.aux_step import implied_latents
from avatarctl.training.objective import FlowStep, noisy_latents
from avatarctl.training.trainer import Trainer, _aux_batch


@pytest.mark.parametrize("prefix_noise", ["0", "0.5"])
def test_a_perfect_prediction_costs_nothing_and_the_prefix_has_no_gradient(
    trainer_of: Callable[..., Trainer], prepared: Path, prefix_noise: str
) -> None:
    """v is right where it is taught, and anything on the latents that are given."""
    trainer = trainer_of(
        "aux.losses=lpips", "train.prefix_frames=5", "train.prefix_dropout=0", "data.mask_rule=first_keep",
        f"train.prefix_noise={prefix_noise}",
    )  # fmt: skip
    (sample,) = trainer.data.read([0])
    draws = trainer._order.draws(0)[:1]
    condition, timesteps, noise = trainer._prepared([sample], draws)  # type: ignore[list-item]
    given, clean = condition.fixed_mask, condition.clean
    assert given is not None and clean is not None and given.flatten().tolist() == [True, True, False]
    stored = sample.tensors["latents"][None]  # type: ignore[union-attr]
    assert torch.equal(clean, stored) == (prefix_noise == "0")
    untaught = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    velocity = torch.where(given, untaught, velocity_target(clean, noise)).requires_grad_()
    noisy = noisy_latents(condition, noise, timesteps)
    step = FlowStep(torch.zeros(1), {}, noisy, velocity)
    batch = _aux_batch(step, [sample], draws, condition, timesteps, trainer.network.device)  # type: ignore[list-item]
    assert trainer.aux is not None
    assert float(trainer.aux(batch).losses["lpips"].detach()) < 1e-8
    worse = (velocity.detach() + 3 * untaught.flip(-1)).requires_grad_()
    loss = trainer.aux(dataclasses.replace(batch, velocity=worse)).total.sum()
    (gradient,) = torch.autograd.grad(loss, worse)
    assert float(loss.detach()) > 1e-4
    assert gradient[:, :, :2].eq(0).all() and float(gradient[:, :, 2].abs().max()) > 0


def test_latents_that_are_given_are_no_part_of_the_clipped_share() -> None:
    noisy, velocity = torch.zeros(1, 2, 2, 1, 1), torch.tensor([30.0, 30, 0, 30]).view(1, 2, 2, 1, 1)
    given = torch.tensor([True, False]).view(1, 1, 2, 1, 1)
    sigma = torch.tensor([0.5])
    assert implied_latents(noisy, velocity, sigma)[1].tolist() == [0.75]
    implied, share = implied_latents(noisy, velocity, sigma, given)
    assert share.tolist() == [1.0] and implied.flatten().tolist() == [0, -10, 0, -10]
    assert implied_latents(noisy, velocity, sigma, torch.ones_like(given))[1].tolist() == [0.0]
