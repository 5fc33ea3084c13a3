"""Plans that `--fit` finds run on real tensors under their own prediction; the next faster one does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

import pytest
from torch.utils._python_dispatch import _disable_current_modes

from avatarctl.config import RunConfig
from avatarctl.demo.sample import sample_audio, sample_image
from avatarctl.errors import DoesNotFit
from avatarctl.events import silent
from avatarctl.live_bytes import LiveBytes, OverLimit
from avatarctl.loading.modules import PARTS
from avatarctl.loading.placed import PlacedModules
from avatarctl.pipelines.infer import generate, load
from avatarctl.pipelines.job import Job, check_job
from avatarctl.profiling.account import Account
from avatarctl.profiling.fakes import Mode
from avatarctl.profiling.fit import Room, fastest
from avatarctl.profiling.inference import profile_inference
from avatarctl.registry import configure, find_model
from tests.accounts import account

WORDS = (
    "model.name=stableavatar-tiny", "memory.mode=full", "memory.group_blocks=1", "runtime.device=cpu",
    "sampling.steps=2", "input.negative_prompt=", "output.width=16", "output.height=16",
    "long_video.num_frames=9", "long_video.overlap_frames=5",
)  # fmt: skip
TINY = find_model("stableavatar-tiny")
ROW = replace(
    TINY, network=MappingProxyType({**TINY.network, "dit": {**TINY.network["dit"], "num_layers": 3}})
)
"""Three blocks, of which mode group has one and the next on the device."""

TENSORS: Mode = "real"
FASTER = {"model": "full", "group": "model"}


def count(cfg: RunConfig) -> Account:
    return of_mode(cfg.memory.mode)


@cache
def of_mode(mode: str) -> Account:
    """Predicted. In the loops of a profile, on real tensors: that fakes count the same, to the byte, is
    tested elsewhere, and takes many times as long (`tests/bench/plans_that_fit.py` does it by fakes)."""
    return profile_inference(ROW, configure(*WORDS, f"memory.mode={mode}"), TENSORS)


def job(cfg: RunConfig, limit: int, host_limit: int) -> None:
    """A whole run with the prompts of the settings. What is read is counted where it is put, as pages of a
    mapped file are: a network that is made from a seed is in memory first."""
    given = Job(sample_image(), sample_audio(0.4), cfg.input.prompt or "", cfg.input.negative_prompt or "")
    plan = check_job(cfg, ROW, given, silent)
    modules: Any = load(plan)
    with LiveBytes(limit=limit, host_limit=host_limit) as live:
        if isinstance(modules, PlacedModules):
            modules._read = uncounted(modules._read)
            modules.tell(lambda part, network: live.track(network))
        else:
            live.track([getattr(modules, part) for part in PARTS if hasattr(modules, part)])
        for block in generate(plan, modules=modules):
            del block


def uncounted(read: Callable[..., Any]) -> Callable[..., Any]:
    def made(*where: Any) -> Any:
        with _disable_current_modes():
            return read(*where)

    return made


def fit(cfg: RunConfig, card: int) -> RunConfig:
    return fastest("infer", ROW.name, cfg, {}, Room(card), count, silent).plan.cfg


@pytest.mark.parametrize("mode", ["full", "model", "group"])
def test_a_plan_runs_under_its_own_prediction_and_the_next_faster_one_does_not(mode: str) -> None:
    asked = configure(*WORDS)
    card = of_mode(mode).peak_bytes
    found = fit(asked, card)
    assert found.memory.mode == mode
    account = count(found)
    job(found, account.live_bytes, account.host)  # to the byte
    if account.host:
        with pytest.raises(OverLimit, match="bytes of the host"):
            job(found, account.live_bytes, account.host - 1)
    if mode in FASTER:
        faster = configure(*WORDS, f"memory.mode={FASTER[mode]}")
        with pytest.raises(OverLimit, match="bytes of the device"):
            job(faster, account.live_bytes, 1 << 40)


def test_where_nothing_fits_the_smallest_need_is_named() -> None:
    needs = {"full": 400, "model": 300, "group": 200, "sequential": 100}

    def count(cfg: RunConfig) -> Account:
        return account({"step": needs[cfg.memory.mode] << 20}, host=500 - needs[cfg.memory.mode] << 20)

    cfg = configure(*WORDS)
    room = Room(99 << 20, where="the card")
    with pytest.raises(DoesNotFit, match=r"the card: .* needs 106.0 MiB at least \(memory.mode sequential\)"):
        fastest("infer", ROW.name, cfg, {}, room, count, silent)
    # Card and host are one memory: what waits counts as well.
    one = Room(500 << 20, is_one=True, where="the machine")
    with pytest.raises(DoesNotFit, match=r"needs 506.0 MiB at least \(memory.mode sequential\)"):
        fastest("infer", ROW.name, cfg, {}, one, count, silent)
    with pytest.raises(DoesNotFit, match=r"400\.0 MiB are needed on the host, and 399\.0 MiB"):
        fastest("infer", ROW.name, cfg, {}, Room(110 << 20, 399 << 20), count, silent)
    # While a unit is packed the host holds it twice, and a run asks for that before it begins.
    packed = account({"step": 100 << 20}, host=400 << 20, packing=40 << 20)
    with pytest.raises(DoesNotFit, match=r"440\.0 MiB are needed on the host, and 439\.0 MiB"):
        fastest("infer", ROW.name, cfg, {}, Room(110 << 20, 439 << 20), lambda _: packed, silent)
