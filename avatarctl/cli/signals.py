"""SIGINT, SIGTERM and SIGHUP as a question that loops ask between steps."""

from __future__ import annotations

import contextlib
import os
import signal
import time
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


_ONE_WISH: Final = 2.0
"""Seconds. A terminal signals a program that starts others and those others, and the program passes it on."""


@contextlib.contextmanager
def stop_on_signals(*, one_of_many: bool = False, quiet: bool = False) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether to stop. A second signal acts as if nobody listened.

    one_of_many: this process has a starter that may pass on what reached it as well: what comes soon after
    the first signal is the same one. quiet: somebody else tells the person.

    A flag and no exception: an exception out of a handler could leave a muxer or a rename half done.
    """
    asked = False
    first = 0.0
    before = {number: signal.getsignal(number) for number in stop_signals()}

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked, first
        now = time.monotonic()
        if asked and one_of_many:
            if now - first > _ONE_WISH and number != HANGUP:
                signal.signal(number, before[number])
                os.kill(os.getpid(), number)
            return
        asked, first = True, now
        # The write call itself: buffered output may be in the middle of a line that it cannot re-enter.
        with contextlib.suppress(OSError):  # nobody reads it
            if not quiet:
                os.write(2, b"stopping at the next step; once more to stop at once\n")
        if number != HANGUP and not one_of_many:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is note:  # a second signal may have left a handler for a third
                signal.signal(number, handler)
