"""Video in: frames of 25 per second by time, out of whatever people call a video."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from avatarctl.errors import UnusableVideo
from avatarctl.media.files import check_regular_file, file_sha256
from avatarctl.media.video_pixels import Seen
from avatarctl.media.video_track import Playback, is_cover, measure
from avatarctl.timeline import FPS

__all__ = ["VideoReader", "open_video"]


def open_video(path: str | Path) -> VideoReader:
    """The video of a file, recognised by content: MP4, MOV, MKV, WebM, AVI, MPEG, FLV, ...

    All packets are read once for the length, one frame is decoded. Damage further in comes to light while
    reading. Of several video tracks it is the default one.

    Raises PathNotFound when nothing is there, UnusableVideo when it is not a video that can be read:
    playlists, scripts and anything else that names other files is refused without opening those.
    """
    return VideoReader(check_regular_file(path, UnusableVideo))


class VideoReader:
    """Frames by number, 25 for a second of the video, streamed: memory does not depend on its length.

    Frame j is what is on the screen j/25 s after the first time stamp: the last frame that came until
    then, however many the source has in between. What stays less than half a frame at the end is left out.

    name:            for messages
    width, height:   of what is seen: rotation and sample aspect applied
    frames:          at 25 frames per second, at least 1
    warnings:        doubts that a person should read, one line each, without the file's name
    first_timestamp: seconds; the zero of video and audio alike
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._sha256: str | None = None
        self._playback = Playback(path)
        try:
            seen = Seen(self._playback.first, self._playback.stream.sample_aspect_ratio, path)
            extent = measure(path, self._playback.zero)
        except BaseException:
            self._playback.close()
            raise
        self._seen = seen
        self._latest: tuple[int, npt.NDArray[np.uint8]] | None = None
        self.width, self.height = seen.width, seen.height
        self.first_timestamp = self._playback.zero * self._playback.tick
        seconds = (extent.end - self._playback.zero) * self._playback.tick
        self.frames = max(1, int(seconds * FPS + Fraction(1, 2)))
        self.warnings = (*_tracks(self._playback), *seen.doubts, *extent.doubts)

    def read(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Frames `start` to `stop` - 1 as uint8 RGB `[n, height, width, 3]`, C-contiguous.

        The same bytes in whatever order and slices. A read that goes on where the last one ended does
        not seek; another one decodes from the key frame before it.

        Raises ValueError outside 0 to `frames` or after `close`, UnusableVideo for damage and for a change
        of resolution.
        """
        if not 0 <= start <= stop <= self.frames:
            raise ValueError(f"{self.name}: frames {start} to {stop} of {self.frames}")
        frames = np.empty((stop - start, self.height, self.width, 3), np.uint8)
        playback = self._playback
        for row, number in enumerate(range(start, stop)):
            tick = playback.zero + int(number / (FPS * playback.tick))
            shown = playback.at(tick)
            assert shown.pts is not None
            if self._latest is None or self._latest[0] != shown.pts:
                self._latest = (shown.pts, self._seen.rgb(shown))
            frames[row] = self._latest[1]
        return frames

    def sha256(self) -> str:
        """Hexadecimal hash of the file's bytes, computed once; raises UnusableVideo if it has changed."""
        self._playback.check_unchanged()
        if self._sha256 is None:
            self._sha256 = file_sha256(self._path)
        return self._sha256

    def close(self) -> None:
        """Closes the file; reading afterwards is an error."""
        self._playback.close()
        self._latest = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _tracks(playback: Playback) -> tuple[str, ...]:
    tracks = [] if playback.container is None else list(playback.container.streams.video)
    shown = [track for track in tracks if not is_cover(track)]
    if len(shown) < 2:
        return ()
    context = playback.stream.codec_context
    what = f"{context.name}, {context.width}x{context.height}"
    number = shown.index(playback.stream) + 1
    return (f"has {len(shown)} video tracks; number {number} ({what}) is used",)
