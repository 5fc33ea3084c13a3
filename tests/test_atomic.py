"""Atomic writes: whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from avatarctl.atomic import (
    atomic_path,
    atomic_write_bytes,
    atomic_write_text,
    disk_errors,
    ensure_writable_folder,
)
from avatarctl.errors import OutputRefused, WriteFailed

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX limits and users")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["a.yaml", "née – 視頻 🎬 'x' 100 %.json", "n" * 250 + ".yaml", "é" * 127])
def test_text_and_bytes_come_back_and_nothing_else_stays(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    atomic_write_text(path, "älter\r\nzwei\n")
    assert path.read_bytes() == "älter\r\nzwei\n".encode()
    atomic_write_bytes(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, failure: type[BaseException]) -> None:
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(failure), atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        assert temporary.parent.parent == tmp_path and temporary.suffix == ".bin"
        assert (tmp_path / "a.bin").read_bytes() == b"old"
        raise failure
    assert names(tmp_path) == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_bytes_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        happened.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        happened.append("rename")
        return replace(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell files from folders")
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    atomic_write_bytes(tmp_path / "a", b"x")
    assert happened == ["file", "rename", "folder"]


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").touch()
    for path, cause in (
        (tmp_path / "absent" / "a", "does not exist"),
        (tmp_path / "file" / "a", "not a folder"),
        (tmp_path / ("n" * 256), "too long"),
        (tmp_path / "folder", "folder"),
    ):
        with pytest.raises(OutputRefused, match=cause):
            atomic_write_bytes(path, b"x")
    assert names(tmp_path) == ["file", "folder"]


def test_errors_of_foreign_code_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        (tmp_path / "input").read_bytes()
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        raise FileNotFoundError(errno.ENOENT, "some input")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO])
def test_a_failing_disk_is_told(tmp_path: Path, number: int) -> None:
    with pytest.raises(WriteFailed) as told, disk_errors(tmp_path / "a.mp4"):
        raise OSError(number, os.strerror(number))
    assert str(told.value).startswith(str(tmp_path / "a.mp4")) and told.value.exit_code == 3


@posix
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(WriteFailed, match="no space left"):
            atomic_write_bytes(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["a.bin"] and path.read_bytes() == b"old"


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    ensure_writable_folder(tmp_path / "x" / "y z é")
    ensure_writable_folder(tmp_path / "x" / "y z é")
    assert names(tmp_path / "x" / "y z é") == []


@posix
def test_what_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "dangling", tmp_path / "loop"):
        with pytest.raises(OutputRefused) as told:
            ensure_writable_folder(path)
        assert told.value.exit_code == 2


READ_ONLY = """
    import os, sys
    from pathlib import Path
    import numpy as np
    from avatarctl.atomic import atomic_write_bytes, ensure_writable_folder
    from avatarctl.errors import AvatarctlError
    from avatarctl.media.video import VideoWriter

    folder = Path(sys.argv[1])
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    for attempt in (
        lambda: ensure_writable_folder(folder),
        lambda: ensure_writable_folder(folder / "below"),
        lambda: atomic_write_bytes(folder / "a", b"x"),
        lambda: VideoWriter(folder / "a.mp4", width=64, height=48, soundtrack=None),
    ):
        try:
            attempt()
            print("allowed")
        except AvatarctlError as error:
            print(error.exit_code, error)
"""


@posix
def test_a_read_only_folder_is_refused() -> None:
    """In a folder that anyone may enter: pytest's own are closed to the user we become."""
    import tempfile

    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "read only é"
        folder.mkdir()
        Path(base).chmod(0o755)
        folder.chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(READ_ONLY), str(folder)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd="/",
        )
        if done.returncode and "setuid" in done.stderr:
            pytest.skip("runs as root and cannot drop privileges")
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert len(lines) == 4
        for line in lines:
            assert line.startswith("2 ") and "no permission to write" in line and str(folder) in line
        assert names(folder) == []
        folder.chmod(0o755)
