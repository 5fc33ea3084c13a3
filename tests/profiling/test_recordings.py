"""Which recordings are counted in the place of a long one, and what follows from them."""

from __future__ import annotations

from typing import Any

from avatarctl.families import family_named
from avatarctl.profiling.account import Account
from avatarctl.profiling.recordings import Recording, counted, shortest
from avatarctl.registry import configure
from tests.accounts import account

SECOND = 16_000
WINDOWS = ("model.name=stableavatar-tiny", "output.width=16", "output.height=16", "long_video.num_frames=9",
           "long_video.overlap_frames=5", "sampling.steps=50")  # fmt: skip
CHUNKS = ("model.name=cartoon-i2v", "output.width=16", "output.height=16", "long_video.num_frames=9")


def accounts(cfg: Any, samples: int, more: int = 0) -> tuple[list[tuple[int, int]], Account]:
    """(windows, steps) of what is counted, which takes `3 windows + 5 steps`; and the account."""
    family: Any = family_named("stableavatar" if "stable" in cfg.model.name else "omniavatar")
    seen: list[tuple[int, int]] = []

    def count(each: Any, recording: Recording) -> Account:
        windows = family.plan(recording.samples, each).count
        seen.append((windows, recording.steps))
        bent = more if len(seen) == 3 else 0
        return account({"step": 3 * windows + 5 * recording.steps + bent})

    return seen, counted(family, cfg, samples, count)


def windows_of(cfg: Any, samples: int) -> int:
    return family_named("stableavatar").plan(samples, cfg).count


def test_windows_that_are_all_alive_follow_from_three_numbers_of_them() -> None:
    cfg, samples = configure(*WINDOWS, "long_video.schedule=step"), 4 * SECOND
    windows = windows_of(cfg, samples)
    assert windows > 8
    seen, account = accounts(cfg, samples)
    assert seen == [(4, 3), (6, 3), (8, 3)] and account.live_bytes == 3 * windows + 15
    seen, account = accounts(cfg, samples, more=1)
    assert seen[3:] == [(windows, 50)], "on no line: counted as it is"
    few = next(n for n in range(640, samples, 640) if windows_of(cfg, n) == 7)
    assert accounts(cfg, few)[0] == [(7, 3)]


def test_a_wavefront_follows_from_three_numbers_of_steps() -> None:
    """With overlaps of two latent frames in windows of three, two later windows overlap one."""
    cfg, samples = configure(*WINDOWS, "long_video.schedule=wavefront"), 60 * SECOND
    seen, account = accounts(cfg, samples)
    assert [steps for _, steps in seen] == [3, 4, 5]
    growth = seen[1][0] - seen[0][0]
    assert seen[2][0] - seen[1][0] == growth >= 2 and seen[0][0] == 2 * growth + 3
    assert account.live_bytes == 3 * (seen[0][0] + growth * (50 - 3)) + 5 * 50


def test_chunks_are_counted_for_two_windows_of_audio_at_most() -> None:
    cfg = configure(*CHUNKS)
    count = lambda cfg, recording: account({"step": recording.samples})  # noqa: E731
    family: Any = family_named("omniavatar")
    assert counted(family, cfg, 12 * SECOND, count).live_bytes == 12 * SECOND
    assert counted(family, cfg, 3600 * SECOND, count).live_bytes == 60 * SECOND


def test_without_a_recording_it_is_the_shortest_of_two_spans() -> None:
    cfg = configure(*CHUNKS)
    family: Any = family_named("omniavatar")
    found = shortest(family, cfg)
    assert found.steps == 2 and family.plan(found.samples, cfg).count >= 2
    assert family.plan(found.samples // 2, cfg).count < 2
