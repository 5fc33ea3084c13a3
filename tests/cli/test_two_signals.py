"""A second signal while a command that was interrupted removes what it began."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from avatarctl.cli.signals import stop_on_signals, stop_signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")

INTERRUPTED = """
import os, signal, sys
from pathlib import Path
import click
from avatarctl.cli import main
from avatarctl.cli.signals import stop_on_signals

def work(*words, **how):
    begun = Path("begun")
    begun.write_text("half")
    try:
        {work}
    finally:
        for number in [{later}]:
            os.kill(os.getpid(), number)
        begun.unlink()

echo, once = click.echo, [work]
click.echo = lambda *words, **how: (once.pop() if once else echo)(*words, **how)
sys.argv[1:] = ["models", "list"]
main()
"""
FIRST = "os.kill(os.getpid(), signal.SIGINT)"
A_JOB = f"""
        with stop_on_signals():
            {FIRST}
            {FIRST}
"""


def interrupted(folder: Path, work: str, later: str) -> subprocess.CompletedProcess[str]:
    script = INTERRUPTED.format(work=work, later=later)
    words = [sys.executable, "-c", script]
    return subprocess.run(words, cwd=folder, text=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("work", [FIRST, A_JOB], ids=["command", "job"])
@pytest.mark.parametrize("second", ["signal.SIGINT", "signal.SIGTERM"])
def test_one_more_signal_lets_the_removal_end(tmp_path: Path, work: str, second: str) -> None:
    found = interrupted(tmp_path, work, second)
    assert (found.returncode, found.stdout) == (6, ""), found.stderr
    assert found.stderr.splitlines()[-2:] == ["cleaning up; once more to stop at once", "error: interrupted"]
    assert list(tmp_path.iterdir()) == []


def test_a_third_signal_ends_the_process(tmp_path: Path) -> None:
    """Or a removal that hangs could not be left."""
    found = interrupted(tmp_path, FIRST, "signal.SIGINT, signal.SIGINT")
    assert found.returncode == -signal.SIGINT
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def test_a_terminal_that_is_closed_counts_once() -> None:
    """The system and the shell both say so; the step that runs may end."""
    before = signal.getsignal(signal.SIGHUP)
    with stop_on_signals() as stop:
        assert not stop()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop()
    assert signal.getsignal(signal.SIGHUP) == before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_what_was_ignored_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert number not in stop_signals() and len(stop_signals()) == 2
        with stop_on_signals() as stop:
            os.kill(os.getpid(), number)
            assert not stop() and signal.getsignal(number) == signal.SIG_IGN
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
