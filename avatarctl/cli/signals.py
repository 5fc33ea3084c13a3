"""SIGINT, SIGTERM and SIGHUP as a question that loops ask between steps."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

__all__ = ["HANGUP", "stop_on_signals", "stop_signals"]

HANGUP: Final = getattr(signal, "SIGHUP", None)
"""Windows has none. It comes twice when a terminal is closed, from the system and from the shell, and nobody
can send it again out of impatience: it never counts as a second signal."""


def stop_signals() -> list[int]:
    """The signals that stop a run. What was ignored at the start stays ignored: SIGHUP below `nohup`, SIGINT
    in the background of a script."""
    known = [signal.SIGINT, signal.SIGTERM, *([] if HANGUP is None else [HANGUP])]
    return [number for number in known if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether to stop. A second signal acts as if nobody listened.

    A flag and no exception: an exception out of a handler could leave a muxer or a rename half done.
    """
    asked = False
    before = {number: signal.getsignal(number) for number in stop_signals()}

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        # The write call itself: buffered output may be in the middle of a line that it cannot re-enter.
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, b"stopping at the next step; once more to stop at once\n")
        if number != HANGUP:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is note:  # a second signal may have left a handler for a third
                signal.signal(number, handler)
