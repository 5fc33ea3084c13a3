"""Where a video jumps to another scene."""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np
from PIL import Image

__all__ = ["LOOKAHEAD", "CutFinder", "first_cut"]

LOOKAHEAD: Final = 2
"""Frames behind a stretch that `first_cut` should see, to tell a flash from a cut."""

_SIDE: Final = 16
_JUMP: Final = 14.0  # of 255, mean over a thumbnail; heads that move stay below 5 in our and public clips
_TIMES: Final = 4.0  # above what this stretch usually changes from frame to frame
_ENOUGH: Final = 180
"""Pixels of the short side that a thumbnail is made of, about."""
_REMEMBERED: Final = 81
"""Frames that say what is usual where a video is read as it comes."""


def first_cut(frames: np.ndarray, length: int) -> int | None:
    """The first of the frames 1 .. length - 1 that begins another scene; None where all are one scene.

    frames: uint8 [n, H, W, 3], `length` of them and up to `LOOKAHEAD` more. A cut is a jump that stays: where
    a frame soon looks again as one before it, there was a flash. Fades are not found.
    """
    small = np.stack([_thumbnail(frame) for frame in frames])
    jumps = np.abs(np.diff(small, axis=0)).mean(axis=(1, 2, 3))
    limit = _limit(jumps)
    for frame in range(1, length):
        if jumps[frame - 1] > limit and _stays(small, frame, limit):
            return frame
    return None


class CutFinder:
    """Cuts of a video that is read as it comes: a jump that stays, as for `first_cut`.

    What is usual is told by the last `_REMEMBERED` jumps, where `first_cut` knows a whole stretch, and
    thumbnails of large frames are made of every few pixels. So the two may differ where a jump is close to
    the limit.
    """

    def __init__(self) -> None:
        self._small: deque[np.ndarray] = deque(maxlen=2 * LOOKAHEAD + 2)
        self._jumps: deque[float] = deque(maxlen=_REMEMBERED)

    def look(self, frame: np.ndarray) -> bool:
        """Takes the next frame, uint8 [H, W, 3]; whether the one `LOOKAHEAD` before it begins a scene."""
        # A part of the pixels says as much: a thumbnail of all of them takes longer than the face's mesh.
        step = max(1, min(frame.shape[:2]) // _ENOUGH)
        small = _thumbnail(np.ascontiguousarray(frame[::step, ::step]))
        if self._small:
            self._jumps.append(float(np.abs(small - self._small[-1]).mean()))
        self._small.append(small)
        return self._begins(len(self._small) - 1 - LOOKAHEAD)

    def rest(self) -> list[bool]:
        """At the end, of the last `LOOKAHEAD` frames, or of all where there are fewer."""
        count = len(self._small)
        return [self._begins(frame) for frame in range(max(0, count - LOOKAHEAD), count)]

    def _begins(self, frame: int) -> bool:
        if frame < 1:
            return False
        small = np.stack(self._small)
        limit = _limit(np.array(self._jumps))
        jump = float(np.abs(small[frame] - small[frame - 1]).mean())
        return jump > limit and _stays(small, frame, limit)


def _limit(jumps: np.ndarray) -> float:
    return max(_JUMP, _TIMES * float(np.median(jumps))) if len(jumps) else _JUMP


def _stays(small: np.ndarray, frame: int, limit: float) -> bool:
    """Whether no frame soon behind a jump looks as one shortly before it."""
    before = small[max(0, frame - LOOKAHEAD - 1) : frame]
    after = small[frame : frame + LOOKAHEAD + 1]
    apart = np.abs(after[:, None] - before[None]).mean(axis=(2, 3, 4))
    return bool(apart.min() > limit / 2)


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    image = Image.fromarray(frame).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32)
