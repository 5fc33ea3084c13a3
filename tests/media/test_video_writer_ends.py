"""The growing MP4: what is left after every kind of end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from avatarctl.errors import OutputRefused, WriteFailed
from avatarctl.media.finish import copy_packets
from avatarctl.media.video import LATENCY_FRAMES, VideoWriter
from tests.helpers_video import (
    AAC_PACKET,
    Track,
    count_frames,
    fragment_headers,
    largest_file,
    moving,
    names,
    probe_video,
    tone,
)

RED, GREEN, BLUE, GREY = (220, 30, 20), (20, 200, 40), (30, 40, 210), (128, 128, 128)


posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX locks, limits and signals")


def test_an_existing_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"precious")
    with pytest.raises(OutputRefused, match=r"exists \(add --overwrite or choose another --out\)"):
        VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=None)
    assert names(tmp_path) == ["a.mp4"]
    writer = VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=None, overwrite=True)
    writer.write(moving(9))
    assert (tmp_path / "a.mp4").read_bytes() == b"precious"  # until the new one is complete
    assert probe_video(writer.finish()).frames == 9


def test_a_final_name_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=None)
    writer.write(moving(9))
    (tmp_path / "a.mp4").write_bytes(b"precious")
    with pytest.raises(OutputRefused, match="exists"):
        writer.finish()
    assert (tmp_path / "a.mp4").read_bytes() == b"precious"
    assert count_frames(tmp_path / "a.partial.mp4") == 9
    assert writer.abandon() == tmp_path / "a.partial.mp4"
    assert count_frames(tmp_path / "a.partial.mp4") == 9


def test_wrong_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dir.mp4").mkdir()
    (tmp_path / "file").touch()
    long = "n" * 250 + ".mp4"
    for path in (tmp_path / "a.avi", tmp_path / "dir.mp4", tmp_path / "file" / "a.mp4", tmp_path / long):
        with pytest.raises(OutputRefused):
            VideoWriter(path, width=64, height=48, soundtrack=None, overwrite=True)
    assert names(tmp_path) == ["dir.mp4", "file"]


def test_spaces_and_other_alphabets_in_names_and_new_folders(tmp_path: Path) -> None:
    path = tmp_path / "née 視頻 – 100 % 'x'" / "мой файл 🎬.mp4"
    with VideoWriter(path, width=64, height=48, soundtrack=tone(16000, 1, 0.4)) as writer:
        writer.write(moving(10))
    assert probe_video(path).frames == 10
    assert names(path.parent) == [path.name]


def test_abandon_keeps_what_can_be_played(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=tone(16000, 1, 9))
    writer.write(moving(3))
    assert writer.abandon() == tmp_path / "a.partial.mp4"
    facts = probe_video(tmp_path / "a.partial.mp4")
    assert facts.frames == 3 and abs(facts.audio_seconds - 3 / 25) <= AAC_PACKET / 16000
    assert writer.abandon() is None
    with pytest.raises(ValueError, match="ended"):
        writer.write(moving(1))
    assert names(tmp_path) == ["a.partial.mp4"]


def test_abandon_without_frames_leaves_nothing(tmp_path: Path) -> None:
    track = tone(16000, 1, 1)
    assert VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=track).abandon() is None
    assert track.closed
    with (
        pytest.raises(ValueError, match="no frame"),
        VideoWriter(tmp_path / "b.mp4", width=64, height=48, soundtrack=None),
    ):
        pass
    assert names(tmp_path) == []


def test_an_exception_in_the_block_passes_and_the_part_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=None) as writer,
    ):
        writer.write(moving(20))
        raise KeyboardInterrupt
    assert names(tmp_path) == ["a.partial.mp4"]
    assert count_frames(tmp_path / "a.partial.mp4") == 20


def test_a_soundtrack_that_breaks_leaves_the_frames_so_far(tmp_path: Path) -> None:
    class Broken(Track):
        def blocks(self) -> Iterator[np.ndarray]:
            yield from super().blocks()
            raise RuntimeError("torn file")

    broken = Broken(np.zeros((16000, 1)), 16000)
    with (
        pytest.raises(RuntimeError, match="torn file"),
        VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=broken) as writer,
    ):
        writer.write(moving(50))
    assert 25 <= count_frames(tmp_path / "a.partial.mp4") < 50


def test_a_writer_that_is_dropped_cleans_up_silently(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=None)
    del writer
    assert names(tmp_path) == []
    assert capfd.readouterr() == ("", "")


def test_wrong_frames_are_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=None) as writer:
        for wrong in (moving(2, 48, 64), moving(2)[0], moving(2).astype(np.float32)):
            with pytest.raises(ValueError, match="expected uint8"):
                writer.write(wrong)
        writer.write(moving(1)[:0])
        writer.write(moving(2)[:, ::-1])  # not contiguous
    assert probe_video(tmp_path / "a.mp4").frames == 2


# The leftovers of others

GROW = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from avatarctl.media.video import VideoWriter

    class Noise:
        rate, channels = 16000, 1
        def blocks(self):
            generator = np.random.default_rng(0)
            while True:
                yield generator.uniform(-0.3, 0.3, (4000, 1)).astype(np.float32)

    writer = VideoWriter(Path(sys.argv[1]), width=64, height=48, soundtrack=Noise())
    generator = np.random.default_rng(0)
    while True:
        writer.write(generator.integers(0, 256, (33, 48, 64, 3), dtype=np.uint8))
        print(writer.frames_written, flush=True)
        time.sleep(0.05)
"""


@posix
def test_kill_leaves_a_playable_part_and_the_next_run_replaces_it(tmp_path: Path) -> None:
    out, part = tmp_path / "a.mp4", tmp_path / "a.partial.mp4"
    command = [sys.executable, "-c", textwrap.dedent(GROW), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(4):
            seen = int(process.stdout.readline())
        with pytest.raises(OutputRefused, match="another run is writing"):
            VideoWriter(out, width=64, height=48, soundtrack=None)
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(tmp_path) == ["a.partial.mp4"]
    assert count_frames(part) >= seen - LATENCY_FRAMES > 100
    with VideoWriter(out, width=64, height=48, soundtrack=None) as writer:
        writer.write(moving(9))
    assert names(tmp_path) == ["a.mp4"]
    assert probe_video(out).frames == 9


@posix
def test_a_leftover_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"precious")
    (tmp_path / "a.partial.mp4").symlink_to(tmp_path / "other")
    with pytest.raises(OutputRefused):
        VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=None)
    assert (tmp_path / "other").read_bytes() == b"precious"


@posix
@pytest.mark.parametrize("limit", [100_000, 60])
def test_a_full_disk_is_told_and_the_playable_part_stays(
    tmp_path: Path, limit: int, capfd: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "a.partial.mp4"
    generator = np.random.default_rng(0)
    with largest_file(limit):
        writer = VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=None)
        with pytest.raises(WriteFailed, match="no space left") as told:
            while True:
                writer.write(generator.integers(0, 256, (5, 48, 64, 3), dtype=np.uint8))
        frames, kept = writer.frames_written, writer.abandon()
    assert told.value.where == part and capfd.readouterr() == ("", ""), "encoders keep quiet"
    if limit == 60:
        assert kept is None and names(tmp_path) == []
    else:
        assert kept == part and names(tmp_path) == ["a.partial.mp4"]
        assert frames - LATENCY_FRAMES <= count_frames(part) <= frames


@posix
def test_a_disk_that_fills_at_the_very_end(tmp_path: Path) -> None:
    """The encoders' last frames do not fit: no final name, the part stays."""
    frames = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
    writer = VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=None)
    writer.write(frames)
    with (
        largest_file(writer.partial_path.stat().st_size + 100),
        pytest.raises(WriteFailed, match="no space left"),
    ):
        writer.finish()
    assert writer.abandon() == tmp_path / "a.partial.mp4"
    assert names(tmp_path) == ["a.partial.mp4"]
    assert count_frames(tmp_path / "a.partial.mp4") >= 20 - LATENCY_FRAMES


# Between the growing file and the finished one


def complete(path: Path) -> VideoWriter:
    writer = VideoWriter(path, width=64, height=48, soundtrack=tone(16000, 1, 1.0), overwrite=True)
    writer.write(moving(25))
    return writer


@posix
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_disk_without_room_for_the_copy_keeps_the_growing_form(
    part: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """0.99: there is room for the packets, and not for the tables in front of them."""
    complete(tmp_path / "whole.mp4").finish()
    limit = int(part * (tmp_path / "whole.mp4").stat().st_size)
    (tmp_path / "whole.mp4").unlink()

    def copy_to_a_full_disk(growing: Path, ordinary: Path) -> None:
        with largest_file(limit):
            copy_packets(growing, ordinary)

    monkeypatch.setattr("avatarctl.media.video.copy_packets", copy_to_a_full_disk)
    writer = complete(tmp_path / "a.mp4")
    assert writer.notices == ()
    assert writer.finish() == tmp_path / "a.mp4" and names(tmp_path) == ["a.mp4"]
    (line,) = writer.notices
    assert line.startswith("a.mp4 plays but stays fragmented") and "no space left" in line
    assert (
        fragment_headers((tmp_path / "a.mp4").read_bytes()) and probe_video(tmp_path / "a.mp4").frames == 25
    )
    assert capfd.readouterr() == ("", "")


FINISH = """
    import os, signal, sys
    from pathlib import Path
    import numpy as np
    from avatarctl.media import video

    copy_packets, replace = video.copy_packets, Path.replace

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def finish_until(moment, out):
        def copy(growing, ordinary):
            copy_packets(growing, ordinary)
            if moment == "copying":
                os.truncate(ordinary, ordinary.stat().st_size // 2)
                kill()

        def renamed(path, target):
            if moment == ("copied" if target.stem == "a.partial" else "replaced"):
                kill()
            replace(path, target)
            if moment == "named" and target.stem == "a":
                kill()

        video.copy_packets, Path.replace = copy, renamed
        writer = video.VideoWriter(out, width=64, height=48, soundtrack=None)
        writer.write(np.random.default_rng(0).integers(0, 256, (25, 48, 64, 3), dtype=np.uint8))
        writer.finish()

    for moment in sys.argv[2:]:  # forks of a process that has no threads yet
        if os.fork() == 0:
            finish_until(moment, Path(sys.argv[1], moment, "a.mp4"))
            os._exit(1)
        assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL, moment
"""


@posix
def test_a_kill_while_finishing_leaves_one_playable_file(tmp_path: Path) -> None:
    """In the middle of the copy, before it takes the partial name, between the two names, after them."""
    moments = {
        "copying": "a.partial.mp4",
        "copied": "a.partial.mp4",
        "replaced": "a.partial.mp4",
        "named": "a.mp4",
    }
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FINISH), tmp_path, *moments], check=True, timeout=120
    )
    for moment, name in moments.items():
        folder = tmp_path / moment
        assert [left for left in names(folder) if not left.startswith(".tmp-")] == [name], moment
        facts = probe_video(folder / name)
        assert facts.frames == 25 and facts.steady, moment
        ordinary = not fragment_headers((folder / name).read_bytes())
        assert ordinary == (moment in ("replaced", "named"))
        complete(folder / "a.mp4").finish()
        assert "a.partial.mp4" not in names(folder) and count_frames(folder / "a.mp4") == 25


@posix
def test_no_other_run_takes_the_name_while_a_video_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, replace, tried = tmp_path / "a.mp4", Path.replace, []

    def try_to_write(moment: str) -> None:
        with pytest.raises(OutputRefused, match="another run is writing"):
            VideoWriter(out, width=64, height=48, soundtrack=None)
        tried.append(moment)

    def renamed(self: Path, target: Path) -> Path:
        try_to_write(f"before it is {target.name}")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", renamed)
    complete(out).finish()
    assert tried == ["before it is a.partial.mp4", "before it is a.mp4"]
    assert names(tmp_path) == ["a.mp4"] and count_frames(out) == 25


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_of_the_copy_keeps_the_part(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(growing: Path, ordinary: Path) -> None:
        ordinary.write_bytes(growing.read_bytes()[:2000])
        raise error

    monkeypatch.setattr("avatarctl.media.video.copy_packets", interrupted)
    with pytest.raises(error), complete(tmp_path / "a.mp4"):
        pass
    assert names(tmp_path) == ["a.partial.mp4"] and probe_video(tmp_path / "a.partial.mp4").frames == 25


@pytest.mark.parametrize("name", ["a:b.mp4", "pipe:.mp4", "-i %d.mp4", "concat:a|b/c.MP4"])
def test_names_that_mean_something_to_ffmpeg(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 %03d")  # no UTF-8: of an older disk
    folder.mkdir()
    monkeypatch.chdir(folder)
    complete(Path(name)).finish()
    assert names(Path(name).parent) == [Path(name).name] and not fragment_headers(Path(name).read_bytes())
