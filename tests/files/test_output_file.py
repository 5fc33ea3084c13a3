"""Large files written past the page cache hold what was written, wherever the pieces end."""

from __future__ import annotations

import errno
import io
import os
import random
from pathlib import Path

import pytest

from avatarctl.files import output_file
from avatarctl.files.flushing import EarlyFlush
from avatarctl.files.output_file import OutputFile

MIB = 1 << 20


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4 * MIB, 12 * MIB + 1, 13 * MIB + 8192])
def test_bytes_are_those_written(
    tmp_path: Path, size: int, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(output_file, "_DIRECT", 0)
    data = random.Random(size).randbytes(size)
    pieces = random.Random(1)
    with OutputFile(tmp_path / "out") as file, memoryview(data) as whole:
        start = 0
        while start < size:
            stop = start + pieces.choice((1000, 4096, MIB + 1, 5 * MIB))
            file.write(whole[start:stop])
            start = stop
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("fails", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_direct_writes_gets_ordinary_ones(
    tmp_path: Path, fails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some take the flag and refuse the first write."""

    def refuse(*_: object) -> int:
        raise OSError(fails, os.strerror(fails))

    monkeypatch.setattr(os, "pwrite", refuse)
    data = os.urandom(9 * MIB + 5)
    with OutputFile(tmp_path / "out") as file:
        file.write(memoryview(data))
    assert (tmp_path / "out").read_bytes() == data


def test_a_short_direct_write_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, bytes(data[:12300]), at))
    monkeypatch.setattr(output_file, "_DIRECT", os.O_WRONLY)  # a real one would refuse such lengths
    data = os.urandom(5 * MIB + 5)
    with OutputFile(tmp_path / "out") as file:
        file.write(memoryview(data))
    assert (tmp_path / "out").read_bytes() == data


def test_an_error_of_the_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="no space"), OutputFile(tmp_path / "out") as file:
        for _ in range(5):
            file.write(memoryview(bytes(4 * MIB)))


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_system_that_takes_nothing_is_not_asked_for_ever(
    tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A direct write of no byte gives way to an ordinary one; one of these is an error of the device."""
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    if not direct:
        monkeypatch.setattr(output_file, "_DIRECT", 0)
    data = os.urandom(5 * MIB)
    with OutputFile(tmp_path / "out") as file:
        file.write(memoryview(data))
    assert (tmp_path / "out").read_bytes() == data
    full = OutputFile(tmp_path / "full")
    with pytest.raises(OSError, match="Input/output"), full:
        monkeypatch.setattr(full, "_file", _TakesNothing(full._file.name, "wb"))
        full.write(memoryview(data))


class _TakesNothing(io.FileIO):
    def write(self, data: object) -> int:
        return 0


@pytest.mark.parametrize("direct", [True, False])
def test_nothing_stays_open_after_an_error(
    tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the flush, nor of the memory that is wanted."""
    if not direct:
        monkeypatch.setattr(output_file, "_DIRECT", 0)

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "failed")

    with monkeypatch.context() as patch:
        patch.setattr(output_file.mmap, "mmap", failing)
        with pytest.raises(OSError, match="failed"):
            OutputFile(tmp_path / "memory")
    broken = OutputFile(tmp_path / "flush")
    with pytest.raises(OSError, match="failed"), broken:
        monkeypatch.setattr(EarlyFlush, "__exit__", failing)
        monkeypatch.setattr(os, "fsync", failing)
        broken.write(memoryview(b"some"))
    still_open = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
    assert not [path for path in still_open if path.is_relative_to(tmp_path)]


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError):
        OutputFile(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
