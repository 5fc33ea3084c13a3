"""Of a recording of any length, those that are counted in its place, and how its account follows from theirs.

    chunks     nothing grows behind the second window of audio: at most two of them are counted
    step       every window is alive until the last step: three numbers of windows, in three steps
    wavefront  windows alive and latents kept grow with the steps: three numbers of steps, each with as many
               windows as are alive at once, and two more

Where numbers lie on no line the recording itself is counted, in all its steps (`extend`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from avatarctl.config import RunConfig
from avatarctl.family import VideoPlan
from avatarctl.profiling.account import Account
from avatarctl.profiling.extend import Depths, extend
from avatarctl.sampling.window_order import chosen_order, last_overlapping
from avatarctl.timeline import SAMPLE_RATE, SAMPLES_PER_FRAME

__all__ = ["STEPS", "Recording", "counted", "shortest"]

STEPS: Final = 2
"""Of a loop in which every step is like the second."""
_SPANS: Final = 2
_AUDIO_WINDOWS: Final = 2
_OF_WINDOWS: Final = (4, 6, 8)
_OF_STEPS: Final = (3, 4, 5)
_FRAMES: Final = 4  # pixel frames of a latent one


@dataclass(frozen=True)
class Recording:
    """samples: at 16 kHz; steps: of each of its spans."""

    samples: int
    steps: int = STEPS


Count = Callable[[RunConfig, Recording], Account]


def shortest(family: Any, cfg: RunConfig) -> Recording:
    """The shortest one of two spans, by doubling."""
    samples = SAMPLES_PER_FRAME
    while family.plan(samples, cfg).count < _SPANS:
        samples *= 2
    return Recording(samples)


def counted(family: Any, cfg: RunConfig, samples: int, count: Count) -> Account:
    """The account of a recording of so many samples."""
    plan: VideoPlan = family.plan(samples, cfg)
    if plan.kind != "fused":
        most = round(_AUDIO_WINDOWS * cfg.long_video.audio_window * SAMPLE_RATE)
        return count(cfg, Recording(min(samples, most)))
    assert cfg.sampling.steps is not None
    spans, steps = list(plan.spans()), cfg.sampling.steps
    if len(spans) < _SPANS:
        return count(cfg, Recording(samples))
    order = chosen_order(spans, steps, cfg.long_video.schedule)
    cfg = replace(cfg, long_video=replace(cfg.long_video, schedule=order))
    window = (spans[1].start - spans[0].start) * _FRAMES * SAMPLES_PER_FRAME

    def of(windows: int, steps: int) -> Recording:
        """The same with windows left out: its last one ends as before."""
        return Recording(samples - max(0, len(spans) - windows) * window, steps)

    whole = Recording(samples, steps)
    if order == "step":
        steps = min(steps, _OF_STEPS[0])
        small = [of(windows, steps) for windows in _OF_WINDOWS]
        along, there = _OF_WINDOWS, len(spans)
    else:
        later = last_overlapping(spans)[0] + 1  # one more where the last window was moved back
        small = [of(later * (each - 1) + 3, each) for each in _OF_STEPS]
        along, there = _OF_STEPS, steps
    if there <= along[-1]:
        return count(cfg, of(len(spans), steps))
    extended = extend([count(cfg, each) for each in small], Depths((), along, there))
    return count(cfg, whole) if extended is None else extended
