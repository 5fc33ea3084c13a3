"""SIGINT and SIGTERM as a question that loops ask between steps."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["stop_on_signals"]


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether to stop. A second signal acts as if nobody listened.

    A flag and no exception: an exception out of a handler could leave a muxer or a rename half done.
    """
    asked = False
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        # The write call itself: buffered output may be in the middle of a line that it cannot re-enter.
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, b"stopping at the next step; once more to stop at once\n")
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is note:  # a second signal may have left a handler for a third
                signal.signal(number, handler)
