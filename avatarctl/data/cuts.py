"""Where a video jumps to another scene."""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image

__all__ = ["LOOKAHEAD", "first_cut"]

LOOKAHEAD: Final = 2
"""Frames behind a stretch that `first_cut` should see, to tell a flash from a cut."""

_SIDE: Final = 16
_JUMP: Final = 14.0  # of 255, mean over a thumbnail; heads that move stay below 5 in our and public clips
_TIMES: Final = 4.0  # above what this stretch usually changes from frame to frame


def first_cut(frames: np.ndarray, length: int) -> int | None:
    """The first of the frames 1 .. length - 1 that begins another scene; None where all are one scene.

    frames: uint8 [n, H, W, 3], `length` of them and up to `LOOKAHEAD` more. A cut is a jump that stays: where
    a frame soon looks again as one before it, there was a flash. Fades are not found.
    """
    small = np.stack([_thumbnail(frame) for frame in frames])
    jumps = np.abs(np.diff(small, axis=0)).mean(axis=(1, 2, 3))
    limit = max(_JUMP, _TIMES * float(np.median(jumps))) if len(jumps) else _JUMP
    for frame in range(1, length):
        if jumps[frame - 1] > limit:
            before = small[max(0, frame - LOOKAHEAD - 1) : frame]
            after = small[frame : frame + LOOKAHEAD + 1]
            apart = np.abs(after[:, None] - before[None]).mean(axis=(2, 3, 4))
            if apart.min() > limit / 2:
                return frame
    return None


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    image = Image.fromarray(frame).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32)
