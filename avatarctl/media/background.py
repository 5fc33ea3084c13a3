"""Encoding on a thread of its own, so that the networks of the next chunk need not wait for it."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import numpy as np

from avatarctl.media.video import VideoWriter

__all__ = ["BackgroundWriter"]


class BackgroundWriter:
    """Gives blocks of frames to a `VideoWriter` in order, at most one block behind.

    FFmpeg's coders work outside Python's lock, so encoding overlaps with sampling. A failure of the writer
    is raised by the next call here, and nothing more is written after it. Every use ends with `finish` or
    `abandon`.
    """

    def __init__(self, writer: VideoWriter) -> None:
        self._writer = writer
        # One block waits while another is encoded: more would only hold memory.
        self._blocks: queue.Queue[np.ndarray | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="video writer", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what the writer met, if anything: sampling on for a file that cannot grow is waste."""
        if self._error is not None:
            raise self._error

    @property
    def frames_written(self) -> int:
        """Frames that the writer has taken; complete after `finish` or `abandon`."""
        return self._writer.frames_written

    def write(self, frames: np.ndarray) -> None:
        """uint8 [n, H, W, 3]; waits while another block waits. Raises what `VideoWriter.write` raises."""
        self.check()
        self._blocks.put(frames)

    def finish(self) -> Path:
        """Write what waits, complete the file under its final name. Raises as `VideoWriter.finish`."""
        self._join()
        self.check()
        return self._writer.finish()

    def abandon(self) -> Path | None:
        """Write what waits, keep the playable part if there is one, and return its path."""
        self._join()
        return self._writer.abandon()

    def _work(self) -> None:
        while (frames := self._blocks.get()) is not None:
            if self._error is None:
                try:
                    self._writer.write(frames)
                except BaseException as error:
                    self._error = error  # handed to the thread that owns the run; see check

    def _join(self) -> None:
        if self._thread.is_alive():
            self._blocks.put(None)
            self._thread.join()
