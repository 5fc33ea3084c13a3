"""What preparation needs does not grow with its data: memory, shared memory, time."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from avatarctl.data.artifacts import read_artifact
from avatarctl.data.windows import Cutting, find_videos, make_samples
from avatarctl.live_bytes import LiveBytes
from avatarctl.media import video_reader, write_audio, write_clip
from tests.data.conftest import SMALL, joined, run
from tests.media.videos import numbered, steady, write_video

_IN_32_MB = """
mount -t tmpfs -o size=32m none /dev/shm && exec "$0" -c "
import numpy
from avatarctl.data.workers import run_jobs
jobs = [(numpy.full, (48 << 20, number, numpy.uint8)) for number in range(3)]
print([int(outcome.value[-1]) for outcome in run_jobs(jobs, 2)])
"
"""


def test_two_workers_hand_over_more_than_a_small_shared_memory_holds(tmp_path: Path) -> None:
    """On a /dev/shm of 32 MB each of three results has 48 MB."""
    within = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*within, "mount -t tmpfs none /dev/shm"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody mount a /dev/shm of their own")
    made = subprocess.run([*within, _IN_32_MB, sys.executable], capture_output=True, text=True, timeout=300)
    assert made.stdout.strip() == "[0, 1, 2]", made.stderr


def test_live_tensors_do_not_depend_on_how_many_clips_there_are(tmp_path: Path) -> None:
    """And not on how long they are: the longer ones leave frames behind the clip."""
    from avatarctl.demo.clips import clip

    drawn = clip(5, 24)
    peaks = []
    for count, frames in ((1, 9), (2, 24)):
        folder = tmp_path / f"{count} of {frames}"
        for number in range(count):
            (folder / str(number)).mkdir(parents=True)
            write_clip(folder / f"{number}/sub_clip.mp4", iter([drawn.frames[:frames]]))
            write_audio(folder / f"{number}/audio.wav", drawn.speech.audio[: frames * 640], 16_000)
            (folder / f"{number}/prompt.txt").write_text("a person is talking")
        with LiveBytes() as live:
            made = run("precompute-latents", "--data", folder, *SMALL)
        assert made.exit_code == 0, made.output
        peaks.append(live.peak)
    assert peaks[0] > 100_000  # it has seen the networks
    assert peaks[1] == peaks[0]


def test_live_tensors_of_audio_are_a_window_and_the_features(tmp_path: Path) -> None:
    """Whatever the number of clips; longer audio has more features, and nothing else is more."""
    peaks, sizes = [], []
    for count, seconds in ((1, 31), (2, 62)):
        folder = tmp_path / f"{count} of {seconds}"
        for number in range(count):
            (folder / str(number)).mkdir(parents=True)
            write_clip(folder / f"{number}/sub_clip.mp4", iter([np.zeros((5, 32, 32, 3), np.uint8)]))
            noise = np.random.default_rng(number).standard_normal(seconds * 16_000) / 10
            write_audio(folder / f"{number}/audio.wav", noise.astype(np.float32), 16_000)
            (folder / f"{number}/prompt.txt").write_text("a person is talking")
        with LiveBytes() as live:
            made = run("precompute-audio", "--data", folder, *SMALL)
        assert made.exit_code == 0, made.output
        peaks.append(live.peak)
        sizes.append(read_artifact(folder / "0/audio_features.safetensors", "audio_features").numel() * 4)
    assert sizes[1] == 2 * sizes[0] and peaks[0] > 10 * sizes[0]
    assert peaks[1] <= peaks[0] + sizes[1] - sizes[0]


def test_cutting_holds_no_more_of_a_longer_source(tmp_path: Path) -> None:
    cutting = Cutting(9, 20, None, (32, 32), "crop", "audio.wav", references=True)
    peaks = []
    for frames in (90, 240):
        (tmp_path / f"{frames}").mkdir()
        joined(tmp_path / f"{frames}/v.mp4", np.zeros((frames, 64, 64, 3), np.uint8))
        (raw,) = find_videos(tmp_path / f"{frames}", "")
        tracemalloc.start()
        make_samples(tmp_path / f"out{frames}", raw, "", "", cutting)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 150 frames more are 1.8 MB, and 0.4 MB of audio; the pool of frames elsewhere is full in both.
    assert peaks[1] < peaks[0] + 300_000, peaks


def test_an_hour_is_read_no_further_than_two_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one frame a second, so that 25 numbers are one frame."""
    draw = lambda number: numbered(number, 16, 16)  # noqa: E731
    (tmp_path / "in").mkdir()
    write_video(
        tmp_path / "in/a.mp4", steady(3600, 1), codec="mpeg4", rate=1, tick=Fraction(1, 1000), draw=draw
    )
    write_audio(tmp_path / "in/a.wav", np.zeros(32_000, np.float32), 16_000)
    (tmp_path / "in/l.csv").write_text("video,audio\na.mp4,a.wav\n")
    reached: list[int] = []
    read = video_reader.VideoReader.read

    def watch(self: video_reader.VideoReader, start: int, stop: int) -> np.ndarray:
        if self.frames > 9:
            reached.append(stop)
        return read(self, start, stop)

    monkeypatch.setattr(video_reader.VideoReader, "read", watch)
    words = ("--from-videos", tmp_path / "in/l.csv", "--data", tmp_path / "out", *SMALL, "--max-windows", 2)
    made = run("precompute-latents", *words)
    assert made.exit_code == 0, made.output
    assert sorted(path.name for path in (tmp_path / "out/a.mp4").iterdir()) == ["000000", "000009"]
    assert max(reached) == 20  # two windows and two frames that tell a flash from a cut
