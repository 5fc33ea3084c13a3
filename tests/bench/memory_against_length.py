"""Does memory grow with the length of the sound?

    python tests/bench/memory_against_length.py

The whole run (sound file, features, chunks, encoder, MP4) of cartoon-i2v with 40 s and with 400 s of sound,
at 16x16 and one step so that it ends soon: what could grow grows with the number of frames and
samples, not with their size. Target: ten times the sound adds at most 5 % to the peak.

Live bytes are exact (avatarctl.live_bytes). The peak is counted from the moment the networks are loaded,
because building them needs more for a moment and would hide growth. Process memory is the largest resident
set of a child process of its own, whose allocator gives freed memory back at once.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from reporting import print_table, python, verdict, write_voice

if TYPE_CHECKING:
    from avatarctl.events import Emit

SECONDS = (40, 400)
LIMIT = 0.05
SETTINGS = ("output.width=16", "output.height=16", "sampling.steps=1")
# See avatarctl/live_bytes.py; one arena, since arenas are trimmed one by one.
RETURNING = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass
class LiveRun:
    """Bytes: loaded networks, peak from then on, after each chunk, after the run."""

    loaded: int = 0
    peak: int = 0
    after: int = 0
    chunks: list[int] = field(default_factory=list)


def make_video(sound: Path, out: Path, emit: Emit) -> None:
    from avatarctl.demo.sample import sample_picture
    from avatarctl.media import open_sound
    from avatarctl.pipelines.infer import write_video
    from avatarctl.pipelines.job import Job, check_job
    from avatarctl.registry import configure, find_model

    row = find_model("cartoon-i2v")
    job = Job(sample_picture(), open_sound(sound), "a person is talking", "")
    write_video(row, job, check_job(configure(*SETTINGS), row, job, emit), out, emit=emit)


def live_run(sound: Path, out: Path) -> LiveRun:
    from avatarctl.events import ChunkFinished, Event, Stage
    from avatarctl.live_bytes import LiveBytes

    run = LiveRun()

    def emit(event: Event) -> None:
        if event == Stage("sampling"):
            live.reset_peak()
            run.loaded = live.current
        elif isinstance(event, ChunkFinished):
            run.chunks.append(live.current)

    with LiveBytes() as live:
        make_video(sound, out, emit)
    gc.collect()
    run.peak, run.after = live.peak, live.current
    return run


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this kernel does not report {name}")


def resident_run(sound: Path, out: Path) -> None:
    """In a child: print resident bytes when the networks are loaded, and the largest of the whole run."""
    from avatarctl.events import Event, Stage
    from avatarctl.live_bytes import process_peak_bytes

    loaded = 0

    def emit(event: Event) -> None:
        nonlocal loaded
        if event == Stage("sampling"):
            loaded = status_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again, as the live peak does

    make_video(sound, out, emit)
    print(json.dumps({"loaded": loaded, "peak": process_peak_bytes()}))


def start_child(sound: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        python(__file__, "--child", str(sound), str(out)),
        env={**os.environ, **RETURNING}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def answer_of(child: subprocess.Popen[str]) -> dict[str, int]:
    printed, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"the run in a process of its own ended with exit code {child.returncode}")
    return json.loads(printed.splitlines()[-1])


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f}"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sounds = [write_voice(folder / f"{seconds}.wav", seconds) for seconds in SECONDS]
        # At the same time: nothing is timed here.
        children = [start_child(sound, folder / f"resident-{sound.stem}.mp4") for sound in sounds]
        live = [live_run(sound, folder / f"live-{sound.stem}.mp4") for sound in sounds]
        resident = [answer_of(child) for child in children]
    short, long = live
    edge = len(short.chunks) // 2
    flat = max(long.chunks[-edge:]) / max(long.chunks[:edge]) - 1

    def row(what: str, a: float, b: float, limit: float | None = LIMIT) -> tuple[str, ...]:
        more = b / a - 1
        return (
            what,
            megabytes(a),
            megabytes(b),
            f"{more:+.1%}",
            "" if limit is None else verdict(more, limit),
        )

    a, b = resident
    print_table(
        f"memory_against_length: MB (1e6 bytes), {SECONDS[0]} s against {SECONDS[1]} s of sound",
        ("", f"{SECONDS[0]} s", f"{SECONDS[1]} s", "more", f"≤ {LIMIT:.0%}"),
        [
            row("live bytes, networks loaded", short.loaded, long.loaded, None),
            row("live bytes, peak", short.peak, long.peak),
            row("live bytes, peak above loaded", short.peak - short.loaded, long.peak - long.loaded),
            row("live bytes, after the last chunk", short.chunks[-1], long.chunks[-1]),
            ("live bytes, after the run", megabytes(short.after), megabytes(long.after), "", ""),
            row("process memory, networks loaded", a["loaded"], b["loaded"], None),
            row("process memory, peak", a["peak"], b["peak"]),
            row("process memory, peak above loaded", a["peak"] - a["loaded"], b["peak"] - b["loaded"]),
        ],
        f"Within the long run of {len(long.chunks)} chunks: the most live bytes after one of the last {edge} "
        f"chunks are {flat:+.2%} against the most after one of the first {edge}.",
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        resident_run(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
