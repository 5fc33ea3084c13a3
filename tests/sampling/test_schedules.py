"""Sigmas against an independent scheduler, to the bit."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from avatarctl.flow_matching import double_shifted_sigmas, timesteps_of


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 20, 30, 40, 50, 1000])
def test_levels_shifted_twice_are_those_of_the_scheduler_that_does_it(steps: int, shift: float) -> None:
    """A rounding more would be one bit of some timestep, which the network sees as another phase."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(steps)
    ours = double_shifted_sigmas(steps, shift)
    assert ours.dtype == torch.float32
    assert ours.tolist() == scheduler.sigmas.tolist()
    assert timesteps_of(ours)[:-1].tolist() == scheduler.timesteps.tolist()
