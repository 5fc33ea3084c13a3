"""How far a long copy, download or check is: a line per tenth in a log, nothing for what is over at once."""

from __future__ import annotations

import errno
import io

import pytest

from avatarctl.cli.screen import LONG_MOVE, LONG_WORK, Screen
from avatarctl.events import BytesMoved, Notice, PartDone


@pytest.mark.parametrize(
    ("total", "lines"),
    [
        (LONG_MOVE, [f"a: {tenth}0 %" for tenth in range(1, 11)]),
        (LONG_MOVE - 1, []),
        (0, []),  # nobody knows how much it is
    ],
)
def test_a_log(total: int, lines: list[str]) -> None:
    stream = io.StringIO()
    with Screen("info", stream) as screen:
        for done in range(0, LONG_MOVE + 1, LONG_MOVE // 100):
            screen(BytesMoved("a", min(done, total) if total else done, total))
        screen(Notice("end"))
    assert stream.getvalue().splitlines() == [*lines, "end"]


@pytest.mark.parametrize(("seconds", "lines"), [(LONG_WORK, 9), (LONG_WORK - 0.1, 0)])
def test_parts_of_a_long_work(seconds: float, lines: int) -> None:
    """With the time that is left; of what is over at once nothing."""
    stream = io.StringIO()
    with Screen("info", stream) as screen:
        for hundredth in range(1, 100):
            left = seconds * (1 - hundredth / 100) + 1e-9
            screen(PartDone("2 of 3: b\x1b[31m", hundredth / 100, left))
    said = stream.getvalue().splitlines()
    assert len(said) == lines
    if said:
        assert said[4] == "2 of 3: b\\x1b[31m: 50 %, 5 s left"


def test_one_after_the_other() -> None:
    stream = io.StringIO()
    with Screen("info", stream) as screen:
        for what in ("a", "b\x1b[31m"):
            screen(BytesMoved(what, LONG_MOVE // 2, LONG_MOVE))
    assert stream.getvalue().splitlines() == ["a: 50 %", "b\\x1b[31m: 50 %"]


def test_quiet() -> None:
    stream = io.StringIO()
    with Screen("warning", stream) as screen:
        screen(BytesMoved("a", LONG_MOVE, LONG_MOVE))
    assert stream.getvalue() == ""


def test_nobody_reads() -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "full")

    class ClosedTerminal(Full):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "gone")

        def isatty(self) -> bool:
            return True

    for stream in (Full(), ClosedTerminal()):
        with Screen("info", stream) as screen:
            for done in (0, LONG_MOVE // 2, LONG_MOVE):
                screen(BytesMoved("a", done, LONG_MOVE))
                screen(Notice("still here"))
