"""What every benchmark shares: the machine in one line, tables, audio files of any length, processes.

Nothing here imports torch, so that a benchmark of start-up time starts as small as it can.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Used", "machine", "print_table", "python", "timed_process", "verdict", "write_voice"]


def machine() -> str:
    """Processor, cores, memory, system, versions and how busy the machine is; no paths, no host name."""
    load = f" · load before {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", "torch's default")
    return (
        f"{_cpu_model()} · {cores} cores · {_memory_gb()} · {platform.system()} · "
        f"Python {platform.python_version()} · torch {importlib.metadata.version('torch')} · "
        f"OMP threads: {threads}{load}"
    )


def _cpu_model() -> str:
    table = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", table.read_text(), re.MULTILINE) if table.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _memory_gb() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows, some BSDs
        return "memory unknown"
    return f"{total / 1e9:.0f} GB"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]], *notes: str) -> None:
    """A markdown section: the machine, the table, one paragraph per note."""
    print(f"### {title}\n\n{machine()}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    for note in notes:
        print(f"\n{note}")
    print(flush=True)


def verdict(value: float, limit: float) -> str:
    """Whether a figure keeps its limit, as a table cell."""
    return "met" if value <= limit else "**missed**"


@dataclass(frozen=True)
class Used:
    """Of one finished child process: exit code, wall seconds, CPU seconds (user + system), and the largest
    resident set in bytes. Linux counts that from before the exec on: a caller that wants it stays small."""

    code: int
    wall: float
    cpu: float
    peak: int


def timed_process(command: Sequence[str], clock: Callable[[], float]) -> Used:
    """Run a command without output. CPU seconds are the child's own (wait4), with its reaped children."""
    started = clock()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    wall = clock() - started
    child.returncode = os.waitstatus_to_exitcode(status)  # already reaped: Popen must not wait again
    unit = 1 if sys.platform == "darwin" else 1024
    return Used(child.returncode, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def write_voice(path: Path, seconds: int, rate: int = 16_000, channels: int = 1) -> Path:
    """A WAV of voices of the cartoon world: ten-second takes one after another, each of its own seed.

    A longer file begins with the samples of a shorter one. `rate` is a multiple of 100.
    """
    import soxr

    from avatarctl.demo.clips import HELD_OUT
    from avatarctl.demo.voices import speech
    from avatarctl.media import write_audio
    from avatarctl.timeline import FPS, SAMPLE_RATE

    def takes() -> Iterator[np.ndarray]:
        for take, start in enumerate(range(0, seconds, 10)):
            length = min(10, seconds - start) * SAMPLE_RATE
            voice = speech(HELD_OUT + take, 10 * FPS).audio[:length]
            if rate != SAMPLE_RATE:
                voice = soxr.resample(voice, SAMPLE_RATE, rate)
            yield np.repeat(voice[:, None], channels, axis=1)

    write_audio(path, takes(), rate)
    return path


def python(*arguments: str) -> list[str]:
    """A command line for the interpreter that runs this."""
    return [sys.executable, *arguments]
