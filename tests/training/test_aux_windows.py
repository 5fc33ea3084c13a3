"""Random windows of a clip: every frame is in one that can be drawn."""

from __future__ import annotations

import pytest

from avatarctl.training.aux_step import window_start


@pytest.mark.parametrize(
    ("clip", "frames", "starts"),
    [
        (81, 33, {0, *range(1, 46, 4), 48}),
        (81, 16, {0, *range(1, 66, 4)}),
        (33, 17, {0, 1, 5, 9, 13, 16}),
        (17, 16, {0, 1}),
        (17, 17, {0}),
    ],
)
def test_windows_reach_the_last_frame(clip: int, frames: int, starts: set[int]) -> None:
    drawn = {window_start(clip, frames, 1, step, 0) for step in range(300)}
    assert drawn == starts
    assert {frame for start in drawn for frame in range(start, start + frames)} == set(range(clip))
