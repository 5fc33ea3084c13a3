"""Calls that are like one before are counted and not run.

That whole runs come out as they are on real tensors, to the byte, is tested in `test_counts.py`, and for
every mode in `tests/bench/counted_and_measured.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from avatarctl.live_bytes import LiveBytes
from avatarctl.profiling.fakes import tensors
from avatarctl.profiling.repeats import Repeats


def counted(function: Any, *inputs: Any, times: int = 3) -> tuple[int, int, int, Any]:
    """Peak, bytes that are alive behind it, calls that were run, and the last result."""
    with tensors("fake"), torch.no_grad(), LiveBytes() as live:
        repeats = Repeats(live)
        call = repeats.wrapped(function)
        given = [each(live) if callable(each) else each for each in inputs]
        for _ in range(times):
            result = call(*given)
        return live.peak, live.current, repeats.run, result


def numbers(count: int) -> Any:
    return lambda live: torch.zeros(count)


def test_a_call_that_is_like_one_before_adds_its_bytes() -> None:
    def work(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        large = x.repeat(10)
        return large[:5].clone(), large[5:7].double()

    peak, current, run, (first, second) = counted(work, numbers(8))
    assert run == 1
    # The result before is held as the next one is made: 32 given, 20 and 16 of a result, 320 in between.
    assert peak == 32 + 36 + 320 + 36 and current == 32 + 36
    assert first.shape == (5,) and second.dtype == torch.float64


def test_a_list_that_is_written_holds_what_was_made() -> None:
    def step(x: torch.Tensor, caches: list[Any]) -> torch.Tensor:
        caches[0] = x.clone() if caches[0] is None else torch.cat([caches[0][-2:], x])
        return x + 1

    caches: list[Any] = [None]
    _, current, run, _ = counted(step, numbers(4), lambda live: caches, times=6)
    # None; four numbers; six, and from then on six again.
    assert run == 3 and caches[0].shape == (6,)
    assert current == 4 * (4 + 6 + 4)


def test_what_a_peak_is_made_of_is_the_same_where_calls_are_not_run_again() -> None:
    """A call lets go of a cache and makes another: at its largest there is less of the one component."""

    def step(x: torch.Tensor, caches: list[Any]) -> torch.Tensor:
        caches[0] = None
        large = x.repeat(10)
        caches[0] = large[:100].clone()
        return large

    found = []
    for once in (False, True):
        with tensors("fake"), torch.no_grad(), LiveBytes() as live:
            repeats = Repeats(live)
            call = repeats.wrapped(step) if once else step
            x, caches = torch.zeros(100), [torch.zeros(100)]
            live.assign(x, "latents")
            live.assign(caches, "caches")
            for _ in range(3):
                live.reset_peak()
                call(x, caches)
                live.assign(caches, "caches")
                found.append(live.at_peak)
            assert not once or repeats.run == 1
    assert found[:3] == found[3:] == 3 * [{"made": 4400, "latents": 400}]


def test_an_input_of_another_component_is_run_again() -> None:
    with tensors("fake"), torch.no_grad(), LiveBytes() as live:
        repeats = Repeats(live)
        call = repeats.wrapped(lambda x: x + 1)
        for name in ("latents", "frames", "latents"):
            x = torch.zeros(8)
            live.assign(x, name)
            call(x)
        assert repeats.run == 2 and repeats.skipped == 1


def test_what_leaves_something_behind_is_run_each_time() -> None:
    kept = []

    def greedy(x: torch.Tensor) -> torch.Tensor:
        kept.append(x * 2)
        return x + 1

    _, current, run, _ = counted(greedy, numbers(4))
    assert run == 3 and current == 16 + 3 * 16 + 16


def test_what_cannot_be_compared_is_run_each_time() -> None:
    seen = []
    counted(lambda x, other: seen.append(other), numbers(4), object())
    assert len(seen) == 3
    given_back: list[int] = []
    counted(lambda x: (given_back.append(1), x)[1], numbers(4))
    assert len(given_back) == 3, "a result that is an input"
