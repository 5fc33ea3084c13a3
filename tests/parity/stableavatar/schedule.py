"""Sigmas: shifted twice (spec/stableavatar.md g)."""

from __future__ import annotations

import torch

from avatarctl.families.stableavatar import StableAvatar
from avatarctl.flow_matching import timesteps_of

from ..golden import Checks, Reader
from .building import transformer
from .stand_ins import SHIFT

checks = Checks()

FILE = "schedules.json"
_SIGMA = 1e-6  # absolute, on levels up to 1
_TIMESTEP = 1e-3  # absolute, on timesteps up to 1000


def compare_levels(reader: Reader, sigmas: str, timesteps: str, steps: int, shift: float = SHIFT) -> None:
    """Levels with the final 0, and the timesteps of all but the last."""
    levels = StableAvatar().sigmas(steps, shift)
    reader.compare(sigmas, levels, atol=_SIGMA)
    reader.compare(timesteps, timesteps_of(levels)[:-1], atol=_TIMESTEP)


@checks(FILE, compares=("schedules.*.sigmas", "schedules.*.timesteps"), needs=("shift",))
def schedules(reader: Reader) -> None:
    for key in reader.keys("schedules.*.sigmas"):
        steps = int(key.split(".")[1])
        compare_levels(reader, key, f"schedules.{steps}.timesteps", steps, reader.take("shift"))


@checks("set3_guidance.safetensors", "set4_fusion.safetensors", "set6_long_pipeline.safetensors",
        compares=("sigmas", "timesteps"))  # fmt: skip
def levels_of_a_run(reader: Reader) -> None:
    compare_levels(reader, "sigmas", "timesteps", len(reader.take("timesteps")))


@checks("set2_transformer.safetensors", compares=("time.sinusoid",), needs=("time.sinusoid_t",))
@torch.no_grad()
def sinusoid(reader: Reader) -> None:
    """What the time MLP sees: [cos | sin]."""
    ours = transformer(reader).condition_embedder.timesteps_proj(reader.take("time.sinusoid_t"))
    reader.compare("time.sinusoid", ours, atol=1e-5)
