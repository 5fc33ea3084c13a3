"""Encoding on a thread: order, failures, endings."""

from pathlib import Path

import numpy as np
import pytest

from avatarctl.errors import WriteFailed
from avatarctl.media import BackgroundWriter, VideoWriter
from tests.helpers_video import count_frames


def blocks(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (9, 16, 16, 3), np.uint8) for _ in range(count)]


def open_writer(path: Path) -> VideoWriter:
    return VideoWriter(path, width=16, height=16, soundtrack=None)


def test_every_block_arrives_in_order(tmp_path: Path) -> None:
    direct = open_writer(tmp_path / "direct.mp4")
    behind = BackgroundWriter(open_writer(tmp_path / "behind.mp4"))
    for block in blocks(6):
        direct.write(block)
        behind.write(block)
    direct.finish()
    assert behind.finish() == tmp_path / "behind.mp4"
    assert behind.frames_written == 54
    assert (tmp_path / "direct.mp4").read_bytes() == (tmp_path / "behind.mp4").read_bytes()


def test_what_waits_is_written_before_a_file_is_abandoned(tmp_path: Path) -> None:
    behind = BackgroundWriter(open_writer(tmp_path / "a.mp4"))
    for block in blocks(4):
        behind.write(block)
    kept = behind.abandon()
    assert kept == tmp_path / "a.partial.mp4"
    assert behind.frames_written == count_frames(kept) == 36


def test_a_failure_of_the_thread_reaches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = VideoWriter.write, []

    def full_disk(self: VideoWriter, frames: np.ndarray) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise WriteFailed("no space left")
        real(self, frames)

    monkeypatch.setattr(VideoWriter, "write", full_disk)
    behind = BackgroundWriter(open_writer(tmp_path / "a.mp4"))
    with pytest.raises(WriteFailed, match="no space left"):
        for block in blocks(20):
            behind.write(block)
    with pytest.raises(WriteFailed):
        behind.check()
    with pytest.raises(WriteFailed):
        behind.finish()
    assert behind.abandon() == tmp_path / "a.partial.mp4"
    assert len(calls) == 2, "frames were written behind the failure"
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial.mp4"]
