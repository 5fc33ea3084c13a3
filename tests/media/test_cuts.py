"""Cuts of a video that is read as it comes: the same as of one that is there as a whole."""

from __future__ import annotations

import numpy as np
import pytest

from avatarctl.media.cuts import CutFinder, first_cut


def scene(seed: int, count: int, height: int = 72) -> np.ndarray:
    """Blocks of colour that become lighter by a level a frame."""
    cells = np.random.default_rng(seed).integers(0, 230, (9, 16, 3), np.uint8)
    still = cells.repeat(height // 9, 0).repeat(height // 9, 1)
    return np.stack([still + np.uint8(number) for number in range(count)])


def found(frames: np.ndarray) -> list[int]:
    finder = CutFinder()
    begins = [finder.look(frame) for frame in frames]
    assert not any(begins[:2])
    return [n for n, each in enumerate([*begins[2:], *finder.rest()]) if each]


@pytest.mark.parametrize("height", [72, 720])
@pytest.mark.parametrize("at", [1, 2, 7, 8, 9])
def test_a_cut_is_found_in_its_frame(at: int, height: int) -> None:
    frames = np.concatenate([scene(1, at, height), scene(2, 10 - at, height)])
    assert found(frames) == [at] == [first_cut(frames, len(frames))]


def test_a_flash_is_none() -> None:
    frames = scene(1, 12)
    frames[6] = 255
    assert found(frames) == [] and first_cut(frames, 12) is None


def test_two_cuts_and_short_videos() -> None:
    assert found(np.concatenate([scene(1, 5), scene(2, 5), scene(3, 5)])) == [5, 10]
    for count in (1, 2, 3):
        assert found(scene(1, count)) == []
    assert CutFinder().rest() == []
