"""Does memory grow with the length of the audio?

    python tests/bench/memory_against_length.py [NAME ...]

The whole run (audio file, features, chunks or windows, encoder, MP4) with 40 s and with 400 s of audio, at
16x16 and few steps so that it ends soon: what could grow grows with the number of frames and samples, not
with their size. One model that samples by chunks, and one whose windows are blended, in wavefront order and
in step order; NAME picks among `SUBJECTS`. Target: ten times the audio adds at most 5 % to the peak, in step
order excepted, which keeps every window.

Live bytes are exact (avatarctl.live_bytes). The peak is counted from the moment the networks are loaded,
because building them needs more for a moment and would hide growth; once more from the first step on, because
opening the job (image, prompts) may need more than all that follows. Process memory is the largest resident
set of a child process of its own, whose allocator gives freed memory back at once.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from reporting import print_table, python, verdict, write_voice

if TYPE_CHECKING:
    from avatarctl.events import Emit

SECONDS = (40, 400)
LIMIT = 0.05
SIZE = ("output.width=16", "output.height=16")
_WINDOWS = (
    "model.name=stableavatar-tiny", "long_video.num_frames=81", "long_video.overlap_frames=37",
    "sampling.steps=3",
)  # fmt: skip
SUBJECTS = {
    "chunks": ("model.name=cartoon-i2v", "sampling.steps=1"),
    "wavefront": (*_WINDOWS, "long_video.schedule=wavefront"),
    "step": (*_WINDOWS, "long_video.schedule=step"),
}
# See avatarctl/live_bytes.py; one arena, since arenas are trimmed one by one.
RETURNING = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass
class LiveRun:
    """Bytes: loaded networks, peak from then on, peak from the first step on, after each chunk or window,
    after the run."""

    loaded: int = 0
    peak: int = 0
    sampling: int = 0
    after: int = 0
    chunks: list[int] = field(default_factory=list)


def make_video(subject: str, audio: Path, out: Path, emit: Emit) -> None:
    from avatarctl.demo.sample import sample_image
    from avatarctl.media import open_audio
    from avatarctl.pipelines.infer import write_video
    from avatarctl.pipelines.job import Job, check_job
    from avatarctl.registry import configure, find_model

    cfg = configure(*SIZE, *SUBJECTS[subject])
    row = find_model(cfg.model.name)
    job = Job(sample_image(), open_audio(audio), "a person is talking", "")
    write_video(check_job(cfg, row, job, emit), out, emit=emit)


def live_run(subject: str, audio: Path, out: Path) -> LiveRun:
    from avatarctl.events import Event, SpanFinished, Stage, StepFinished
    from avatarctl.live_bytes import LiveBytes

    run = LiveRun()

    def emit(event: Event) -> None:
        if event == Stage("sampling"):
            live.reset_peak()
            run.loaded = live.current
        elif event == StepFinished(0, 0):
            run.peak = live.peak
            live.reset_peak()
        elif isinstance(event, SpanFinished):
            run.chunks.append(live.current)

    with LiveBytes() as live:
        make_video(subject, audio, out, emit)
    gc.collect()
    run.sampling, run.after = live.peak, live.current
    run.peak = max(run.peak, run.sampling)
    return run


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this kernel does not report {name}")


def resident_run(subject: str, audio: Path, out: Path) -> None:
    """In a child: print resident bytes when the networks are loaded, and the largest of the whole run."""
    from avatarctl.events import Event, Stage
    from avatarctl.live_bytes import process_peak_bytes

    loaded = 0

    def emit(event: Event) -> None:
        nonlocal loaded
        if event == Stage("sampling"):
            loaded = status_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again, as the live peak does

    make_video(subject, audio, out, emit)
    print(json.dumps({"loaded": loaded, "peak": process_peak_bytes()}))


def start_child(subject: str, audio: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        python(__file__, "--child", subject, str(audio), str(out)),
        env={**os.environ, **RETURNING}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def answer_of(child: subprocess.Popen[str]) -> dict[str, int]:
    printed, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"the run in a process of its own ended with exit code {child.returncode}")
    return json.loads(printed.splitlines()[-1])


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f}"


def measure(subject: str, folder: Path) -> None:
    audios = [write_voice(folder / f"{seconds}.wav", seconds) for seconds in SECONDS]
    # At the same time: nothing is timed here.
    children = [start_child(subject, audio, folder / f"resident-{audio.stem}.mp4") for audio in audios]
    live = [live_run(subject, audio, folder / f"live-{audio.stem}.mp4") for audio in audios]
    report(subject, *live, *(answer_of(child) for child in children))


def report(subject: str, short: LiveRun, long: LiveRun, a: dict[str, int], b: dict[str, int]) -> None:
    edge = len(short.chunks) // 2
    flat = max(long.chunks[-edge:]) / max(long.chunks[:edge]) - 1
    limit = None if subject == "step" else LIMIT

    def row(what: str, a: float, b: float, limit: float | None) -> tuple[str, ...]:
        more = b / a - 1
        judged = "" if limit is None else verdict(more, limit)
        return what, megabytes(a), megabytes(b), f"{more:+.1%}", judged

    print_table(
        f"memory_against_length, {subject}: MB (1e6 bytes), {SECONDS[0]} s against {SECONDS[1]} s of audio",
        ("", f"{SECONDS[0]} s", f"{SECONDS[1]} s", "more", f"≤ {LIMIT:.0%}"),
        [
            row("live bytes, networks loaded", short.loaded, long.loaded, None),
            row("live bytes, peak", short.peak, long.peak, limit),
            row("live bytes, peak above loaded", short.peak - short.loaded, long.peak - long.loaded, limit),
            row("live bytes, peak from the first step on", short.sampling, long.sampling, limit),
            row("live bytes, after the last chunk", short.chunks[-1], long.chunks[-1], limit),
            ("live bytes, after the run", megabytes(short.after), megabytes(long.after), "", ""),
            row("process memory, networks loaded", a["loaded"], b["loaded"], None),
            row("process memory, peak", a["peak"], b["peak"], limit),
            row("process memory, peak above loaded", a["peak"] - a["loaded"], b["peak"] - b["loaded"], limit),
        ],
        f"Within the long run of {len(long.chunks)} chunks or windows: the most live bytes after one of the "
        f"last {edge} are {flat:+.2%} against the most after one of the first {edge}.",
    )


def main(subjects: Sequence[str]) -> None:
    for subject in subjects or SUBJECTS:
        with tempfile.TemporaryDirectory() as name:
            measure(subject, Path(name))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        resident_run(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main(sys.argv[1:])
