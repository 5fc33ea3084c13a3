"""Reading processes beside a run: what reaches them, and what they end with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from avatarctl.data.workers import run_jobs


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has other signals")
def test_a_reading_process_leaves_signals_to_its_run() -> None:
    """A machine that shuts down, or a terminal, signals all processes of a run alike."""
    jobs = [(os.getpid, ())] * 3
    outcomes = run_jobs(jobs, 1)
    first = next(outcomes).value
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(first, number)
    assert [outcome.value for outcome in outcomes] == [first, first]


def test_a_run_that_leaves_a_reading_process_behind_ends() -> None:
    """As after an error whose traceback still holds the iterator."""
    program = (
        "import os\n"
        "from avatarctl.data.workers import run_jobs\n"
        "if __name__ == '__main__':\n"
        "    held = run_jobs([(os.getpid, ())] * 3, 1)\n"
        "    print(next(held).value)\n"
        "    os.held = held\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=True, capture_output=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
