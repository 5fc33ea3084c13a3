"""In which order the windows of a fused video go through the steps.

A window reads at step i + 1 what all windows that overlap it wrote at step i, and is fused with what the
window before it wrote at step i + 1. Every order that respects both gives the same numbers, bit for bit. With
at most M later windows overlapping one, S steps and W windows:

    step       window steps before the first frames are final: (S - 1) W + 1; windows alive: W
    wavefront  S + M S (S - 1) / 2; at most min(M (S - 1) + 1, W)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Literal

from avatarctl.family import Span

__all__ = ["chosen_order", "last_overlapping", "pass_order"]

Order = Literal["step", "wavefront"]


def last_overlapping(spans: Sequence[Span]) -> list[int]:
    """For each window the index of the last one that shares a frame with it; spans in order of start."""
    starts = [span.start for span in spans]
    return [bisect_left(starts, span.start + span.frames) - 1 for span in spans]


def chosen_order(spans: Sequence[Span], steps: int, schedule: Literal["auto"] | Order) -> Order:
    """auto: wavefront where there are more windows than it keeps alive."""
    if schedule != "auto":
        return schedule
    later = last_overlapping(spans)[0]  # none has more, but a last one moved back: it keeps one more alive
    return "wavefront" if len(spans) > later * (steps - 1) + 1 else "step"


def pass_order(
    spans: Sequence[Span], steps: int, schedule: Literal["auto"] | Order
) -> Iterator[tuple[int, int]]:
    """Every (window, step) once."""
    if chosen_order(spans, steps, schedule) == "wavefront":
        return _wavefront(last_overlapping(spans), steps)
    return ((window, step) for step in range(steps) for window in range(len(spans)))


def _wavefront(last: Sequence[int], steps: int) -> Iterator[tuple[int, int]]:
    """Always the latest step that can be made: it finishes the earliest window as soon as possible."""
    done = [0] * steps  # windows that have made each step
    while done[-1] < len(last):
        step = next(
            step
            for step in reversed(range(steps))
            if done[step] < len(last) and (step == 0 or done[step - 1] > last[done[step]])
        )
        yield done[step], step
        done[step] += 1
