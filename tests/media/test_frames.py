"""A video as a model sees it: fitted to a size, read once, and as long as it must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from avatarctl.errors import UnusableVideo
from avatarctl.media import FittedFrames, LengthRule, video_from_array


@dataclass
class Numbered:
    """Frame j is j everywhere. ranges: what was read."""

    frames: int
    size: tuple[int, int] = (4, 4)
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.frames
        self.ranges.append((start, stop))
        return np.broadcast_to(
            np.arange(start, stop, dtype=np.uint8)[:, None, None, None], (stop - start, *self.size, 3)
        )


def numbers(frames: np.ndarray) -> list[int]:
    assert all((frame == frame[0, 0, 0]).all() for frame in frames)
    return frames[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("start", [0, 1, 5, 38])
def test_what_is_shown_behind_the_end(frames: int, start: int) -> None:
    there_and_back = [*range(frames), *range(frames - 2, 0, -1)] * 99
    held = [*range(frames), *[frames - 1] * 99]
    expected: dict[Any, list[int]] = {"pingpong": there_and_back, "hold": held, "video": held}
    for rule, shown in expected.items():
        reader = LengthRule(Numbered(frames), 60, rule)
        assert numbers(reader.read(start, start + 33)) == shown[start : start + 33]
        assert reader.frames == (min(60, frames) if rule == "video" else 60)


def test_nothing_is_read_that_is_not_shown() -> None:
    source = Numbered(100)
    reader = LengthRule(source, 300, "pingpong")
    reader.read(110, 120)
    reader.read(90, 105)
    assert source.ranges == [(79, 89), (90, 100)]


@pytest.mark.parametrize("overlap", [1, 5, 13])
@pytest.mark.parametrize("sequence", [False, True], ids=["chunks", "chunks and reference sequences"])
def test_a_walk_reads_every_frame_once(overlap: int, sequence: bool) -> None:
    source, length = Numbered(200), 17
    fitted = FittedFrames(source, (4, 4))
    for start in range(0, 150, length - overlap):
        assert numbers(fitted.read(start, start + length)) == list(range(start, start + length))
        if sequence:
            behind = start + length
            assert numbers(fitted.read(behind, behind + length)) == list(range(behind, behind + length))
    assert [frame for first, last in source.ranges for frame in range(first, last)] == list(
        range(source.ranges[-1][1])
    )


def test_a_walk_back_reads_every_frame_once() -> None:
    source = Numbered(100)
    reader = LengthRule(FittedFrames(source, (4, 4)), 300, "pingpong")
    for start in range(0, 180, 12):
        reader.read(start, start + 17)
    read = [frame for first, last in source.ranges for frame in range(first, last)]
    # There and back: what lies near the turn is still known.
    assert len(read) == len(set(read)) + len([frame for frame in set(read) if read.count(frame) == 2])
    assert max(map(read.count, read)) <= 2


def test_what_is_kept_does_not_grow() -> None:
    fitted = FittedFrames(Numbered(250), (4, 4))
    for start in range(0, 230, 12):
        fitted.read(start, start + 17)
        assert len(fitted._kept) <= 34
    for start in range(220, -1, -12):
        fitted.read(start, start + 17)
        assert len(fitted._kept) <= 34


def test_frames_of_the_size_are_not_touched() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3), np.uint8)
    assert np.array_equal(FittedFrames(video_from_array(frames, "noise"), (8, 12)).read(1, 4), frames[1:4])


@pytest.mark.parametrize(("shape", "cut"), [((40, 80), "sides"), ((80, 40), "top and bottom")])
def test_a_frame_of_another_shape_is_cropped_in_its_centre_or_stretched(
    shape: tuple[int, int], cut: str
) -> None:
    frame = np.zeros((*shape, 3), np.uint8)
    middle = slice(20, 60)  # the part that a square keeps
    place = (slice(None), middle) if cut == "sides" else (middle, slice(None))
    frame[place] = 200
    video = video_from_array(frame[None], "a light square")
    cropped = FittedFrames(video, (16, 16), "crop").read(0, 1)[0]
    assert (cropped[1:-1, 1:-1] == 200).all(), "the outermost pixels are blended with what was cut off"
    stretched = FittedFrames(video, (16, 16), "stretch").read(0, 1)[0, ..., 0]
    line = stretched[8] if cut == "sides" else stretched[:, 8]
    assert line[0] == line[-1] == 0 and line[8] == 200


def test_what_is_no_video_in_memory() -> None:
    with pytest.raises(UnusableVideo, match="nothing: has no frames"):
        video_from_array(np.zeros((0, 4, 4, 3), np.uint8), "nothing")
    with pytest.raises(TypeError):
        video_from_array(np.zeros((1, 4, 4, 3)), "floats")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[n, H, W, 3\]"):
        video_from_array(np.zeros((4, 4, 3), np.uint8), "one frame")
    video = video_from_array(np.zeros((3, 4, 4, 3), np.uint8), "black")
    with pytest.raises(ValueError, match="2 to 4 of 3"):
        video.read(2, 4)
    assert video.sha256() != video_from_array(np.zeros((4, 3, 4, 3), np.uint8), "black").sha256()
