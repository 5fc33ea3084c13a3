"""The bound of a run in mode full holds what such a run takes, and is no empty word."""

from __future__ import annotations

import pytest

from avatarctl.demo.sample import sample_audio, sample_image
from avatarctl.events import silent
from avatarctl.pipelines.at_most import at_most, weights_of
from avatarctl.pipelines.job import Job, JobPlan, check_job
from avatarctl.registry import configure, find_model

COUNTED = [  # GiB live, by the commands in docs/memory.md
    ("omniavatar-14b", "720x400", 42.8),
    ("omniavatar-1.3b", "512x512", 16.8),
    ("stableavatar-1.3b", "480x832", 21.2),
]


def planned(model: str, width: int, height: int, *more: str) -> JobPlan:
    """Without weights: their sizes are the row's."""
    cfg = configure(f"model.name={model}", f"output.width={width}", f"output.height={height}", *more)
    job = Job(sample_image(), sample_audio(12), "", "")
    return check_job(cfg, find_model(model), job, silent)


@pytest.mark.parametrize(("model", "size", "counted"), COUNTED)
def test_published_models_take_less_and_not_much_less(model: str, size: str, counted: float) -> None:
    width, height = map(int, size.split("x"))
    plan = planned(model, width, height)
    most, weights = at_most(plan), weights_of(plan)
    assert most is not None
    assert counted < most / 2**30 < 1.5 * counted
    assert weights < counted * 2**30


def test_it_grows_with_what_is_made_and_not_with_how_long() -> None:
    small, large = (at_most(planned("omniavatar-1.3b", *size)) for size in ((256, 256), (512, 512)))
    assert small and large and small < large
    longer = at_most(planned("omniavatar-1.3b", 256, 256, "output.lead_silence=30"))
    assert longer is not None and longer < 1.05 * small


def test_where_sizes_are_not_stated_nothing_is_said() -> None:
    from dataclasses import replace

    plan = planned("omniavatar-1.3b", 256, 256)
    unknown = {**plan.row.network, "text": {"d_model": 1}}
    assert at_most(replace(plan, row=replace(plan.row, network=unknown))) is None
