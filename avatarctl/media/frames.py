"""A video as a model sees it: of the network's size, and as long as the audio.

What training is prepared from and what inference shows the network come out of `FittedFrames`.
"""

from __future__ import annotations

import hashlib
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from avatarctl.errors import UnusableVideo
from avatarctl.family import FrameReader

__all__ = ["ArrayVideo", "FittedFrames", "LengthRule", "Video", "fitted_matrix", "video_from_array"]


class Video(Protocol):
    """A video, open for reading: a file's reader, or frames in memory.

    width, height: in pixels, of what is seen. frames: at 25 a second. warnings: doubts that a person should
    read, without the name.
    """

    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop): uint8 [stop - start, height, width, 3] RGB. Raises ValueError outside."""

    def sha256(self) -> str:
        """Hexadecimal hash of the content."""


class ArrayVideo:
    """Frames in memory."""

    warnings: tuple[str, ...] = ()

    def __init__(self, frames: np.ndarray, name: str) -> None:
        self.name = name
        self._held = frames
        self.frames, self.height, self.width = frames.shape[:3]

    def read(self, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.frames:
            raise ValueError(f"frames {start} to {stop} of {self.frames}")
        return self._held[start:stop]

    def sha256(self) -> str:
        digest = hashlib.sha256(f"{self._held.shape} uint8 ".encode())
        digest.update(self._held.tobytes())
        return digest.hexdigest()


def video_from_array(frames: np.ndarray, name: str) -> ArrayVideo:
    """A `Video` of uint8 [n, H, W, 3] RGB frames in memory, 25 a second.

    Raises TypeError or ValueError for another type or shape, UnusableVideo for none.
    """
    if frames.dtype != np.uint8:
        raise TypeError(f"frames are {frames.dtype}, uint8 is expected")
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames have shape {frames.shape}, [n, H, W, 3] is expected")
    if not frames.size:
        raise UnusableVideo("has no frames", where=name)
    return ArrayVideo(frames, name)


class FittedFrames:
    """A video in frames of (height, width) `size`, uint8.

    crop: the largest centred part of the frame's shape, bilinear with antialias. stretch: each direction
    scaled by itself, bicubic, as images are. A frame that has the size already is not touched.

    Chunks overlap, and a reference sequence lies behind its chunk: what was read last is kept, two stretches
    of the longest length that was asked for, so that a walk through a video reads every frame once.
    """

    def __init__(
        self, reader: FrameReader, size: tuple[int, int], fit: Literal["crop", "stretch"] = "crop"
    ) -> None:
        self._reader, self._size, self._fit = reader, size, fit
        self._kept = np.zeros((0, *size, 3), np.uint8)
        self._first = 0  # index of the first kept frame
        self._longest = 0

    @property
    def frames(self) -> int:
        return self._reader.frames

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) of the video. Raises what its reader raises."""
        self._longest = max(self._longest, stop - start)
        last = self._first + len(self._kept)
        if self._first <= start <= last < stop:  # goes on where the kept ones end
            self._kept = np.concatenate([self._kept, self._fitted(last, stop)])
            self._drop_to(max(self._first, stop - 2 * self._longest))
        elif start < self._first <= stop <= last:  # the same backwards
            self._kept = np.concatenate([self._fitted(start, self._first), self._kept])
            self._kept = self._kept[: 2 * self._longest].copy()
            self._first = start
        elif not self._first <= start <= stop <= last:
            self._kept, self._first = self._fitted(start, stop), start
        return self._kept[start - self._first : stop - self._first].copy()

    def _drop_to(self, first: int) -> None:
        if first > self._first:
            self._kept = self._kept[first - self._first :].copy()
            self._first = first

    def _fitted(self, start: int, stop: int) -> np.ndarray:
        frames = self._reader.read(start, stop)
        height, width = self._size
        if frames.shape[1:3] == self._size:
            return frames
        box = _part(frames.shape[1], frames.shape[2], self._size, self._fit)
        filter = Image.Resampling.BICUBIC if self._fit == "stretch" else Image.Resampling.BILINEAR
        fitted = np.empty((len(frames), height, width, 3), np.uint8)
        for place, frame in enumerate(frames):
            fitted[place] = np.asarray(Image.fromarray(frame).resize((width, height), filter, box))
        return fitted


def fitted_matrix(
    height: int, width: int, size: tuple[int, int], fit: Literal["crop", "stretch"]
) -> np.ndarray:
    """float64 [2, 3]: x and y in a frame to x and y in what `FittedFrames` makes of it, both counting from
    their first pixel's middle."""
    left, top, right, bottom = _part(height, width, size, fit)
    x, y = size[1] / (right - left), size[0] / (bottom - top)
    return np.array([[x, 0, (0.5 - left) * x - 0.5], [0, y, (0.5 - top) * y - 0.5]])


def _part(
    height: int, width: int, size: tuple[int, int], fit: Literal["crop", "stretch"]
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is seen of a frame: all of it where it is stretched, else the
    largest centred part that has the shape of `size`."""
    if fit == "stretch":
        return 0.0, 0.0, float(width), float(height)
    scale = min(height / size[0], width / size[1])
    high, wide = size[0] * scale, size[1] * scale
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, min(left + wide, width), min(top + high, height)


class LengthRule:
    """A video that goes on behind its end.

    pingpong: backwards and forwards in turn; a frame at which it turns is not shown twice.
    hold:     the last frame stays.
    video:    the finished video ends with the source; what a last chunk reads beyond is the last frame.

    frames: of the finished video. `wanted` of them are asked for.
    """

    def __init__(self, reader: FrameReader, wanted: int, rule: Literal["pingpong", "hold", "video"]) -> None:
        self._reader, self._rule = reader, rule
        self.frames = min(wanted, reader.frames) if rule == "video" else wanted

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop) from 0 on, also behind `frames`. Reads no more of the video than it shows."""
        places = self._places(start, stop)
        first, last = int(places.min()), int(places.max())
        return self._reader.read(first, last + 1)[places - first]

    def _places(self, start: int, stop: int) -> np.ndarray:
        """Of each frame the source's frame, int64 [stop - start]."""
        end = self._reader.frames - 1
        places = np.arange(start, stop)
        if self._rule != "pingpong" or end == 0:
            return np.minimum(places, end)
        return end - np.abs(end - places % (2 * end))
