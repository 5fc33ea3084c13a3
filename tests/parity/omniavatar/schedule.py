"""Sigmas, one step, training noise and weights (spec/omniavatar.md e)."""

from __future__ import annotations

import re

import pytest
from torch import Tensor

from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.flow_matching import (
    TRAIN_TIMESTEPS,
    add_noise,
    euler_step,
    shifted_sigmas,
    timesteps_of,
    training_weights,
    velocity_target,
)

from ..golden import Checks, Reader

checks = Checks()

FILE = "scheduler.safetensors"
_SHIFT = 5.0  # of training and of the recorded single steps; the format does not vary it
_TOLERANCE = {"atol": 1e-6, "rtol": 1e-6}


def _grids(reader: Reader, what: str) -> list[tuple[str, int, float]]:
    """Keys stepsN_shiftS.<what> with N and S."""
    found = (re.fullmatch(rf"steps(\d+)_shift([\d.]+)\.{what}", key) for key in reader.keys("steps*"))
    return [(match[0], int(match[1]), float(match[2])) for match in found if match]


@checks(FILE, compares=("steps*_shift*.sigmas",))
def sigmas(reader: Reader) -> None:
    """Ours end with the final 0, the recorded ones do not."""
    for key, steps, shift in _grids(reader, "sigmas"):
        ours = OmniAvatar().sigmas(steps, shift)
        assert ours[-1] == 0
        reader.compare(key, ours[:-1], **_TOLERANCE)


@checks(FILE, compares=("steps*_shift*.timesteps",))
def timesteps(reader: Reader) -> None:
    for key, steps, shift in _grids(reader, "timesteps"):
        reader.compare(key, timesteps_of(OmniAvatar().sigmas(steps, shift))[:-1], **_TOLERANCE)


@checks(FILE, compares=("step.index*.prev_sample",), needs=("step.sample", "step.model_output"))
def single_steps(reader: Reader) -> None:
    grid = shifted_sigmas(_recorded_steps(reader), _SHIFT)
    sample, velocity = reader.take("step.sample"), reader.take("step.model_output")
    for key in reader.keys("step.index*.prev_sample"):
        index = int(re.fullmatch(r"step\.index(\d+)\.prev_sample", key)[1])
        after = euler_step(sample, velocity, float(grid[index]), float(grid[index + 1]))
        reader.compare(key, after, **_TOLERANCE)


def _recorded_steps(reader: Reader) -> int:
    """Steps of the grid that the single steps were taken on: stated, or of the only grid there is."""
    if stated := reader.metadata.get("step_num_steps"):
        return int(stated)
    grids = _grids(reader, "sigmas")
    if len(grids) != 1:
        pytest.skip(f"{FILE} has {len(grids)} grids and does not state step_num_steps")
    return grids[0][1]


def _training_sigmas() -> Tensor:
    return shifted_sigmas(TRAIN_TIMESTEPS, _SHIFT)[:-1]


@checks(FILE, compares=("train1000.sigmas", "train1000.timesteps"))
def training_grid(reader: Reader) -> None:
    reader.compare("train1000.sigmas", _training_sigmas(), **_TOLERANCE)
    reader.compare("train1000.timesteps", timesteps_of(_training_sigmas()), **_TOLERANCE)


@checks(FILE, compares=("train1000.weights",))
def weights(reader: Reader) -> None:
    reader.compare("train1000.weights", training_weights(_SHIFT), **_TOLERANCE)


@checks(FILE, compares=("noise.weights_batch", "noise.weight_single0"), needs=("noise.ids",))
def weights_of_draws(reader: Reader) -> None:
    drawn = training_weights(_SHIFT)[reader.take("noise.ids")]
    reader.compare("noise.weights_batch", drawn, **_TOLERANCE)
    reader.compare("noise.weight_single0", drawn[:1], **_TOLERANCE)


@checks(FILE, compares=("noise.timesteps", "noise.ids"))
def drawn_timesteps(reader: Reader) -> None:
    """Ids are places in the training grid: exactly those whose timestep is nearest to the recorded one."""
    grid = timesteps_of(_training_sigmas())
    reader.compare("noise.timesteps", grid[reader.take("noise.ids")], **_TOLERANCE)
    nearest = (grid[None] - reader.take("noise.timesteps")[:, None]).abs().argmin(dim=1)
    reader.compare("noise.ids", nearest)


@checks(
    FILE,
    compares=("noise.noisy_batch", "noise.noisy_single0"),
    needs=("noise.ids", "noise.sample", "noise.noise"),
)
def noisy_latents(reader: Reader) -> None:
    levels = _training_sigmas()[reader.take("noise.ids")]
    clean, noise = reader.take("noise.sample"), reader.take("noise.noise")
    reader.compare("noise.noisy_batch", add_noise(clean, noise, levels), **_TOLERANCE)
    single = add_noise(clean[:1], noise[:1], float(levels[0]))
    reader.compare("noise.noisy_single0", single, **_TOLERANCE)


@checks(FILE, compares=("noise.target",), needs=("noise.sample", "noise.noise"))
def target(reader: Reader) -> None:
    ours = velocity_target(reader.take("noise.sample"), reader.take("noise.noise"))
    reader.compare("noise.target", ours, **_TOLERANCE)
