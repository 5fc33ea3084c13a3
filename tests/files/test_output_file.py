"""Large files written past the page cache hold what was written, wherever the pieces end."""

from __future__ import annotations

import errno
import io
import os
import random
from pathlib import Path

import pytest

from avatarctl.files import output_file
from avatarctl.files.output_file import OutputFile

MIB = 1 << 20


class Disk(io.FileIO):
    """A file that tells whether each write was direct; `refuses` with this error, takes `most` bytes."""

    def __init__(self, path: Path, refuses: int = 0, most: int = 64 * MIB) -> None:
        super().__init__(path, "xb")
        self.refuses, self.most = refuses, most
        self.direct: list[bool] = []

    def write(self, data: object) -> int:
        import fcntl

        with memoryview(data) as view:  # type: ignore[arg-type]
            self.direct.append(bool(fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & os.O_DIRECT))
            if self.direct[-1] and self.refuses:
                raise OSError(self.refuses, os.strerror(self.refuses))
            if not self.most:
                return 0
            return super().write(bytes(view[: self.most]) if len(view) > self.most else view) or 0


def opened(monkeypatch: pytest.MonkeyPatch, **answers: int) -> list[Disk]:
    """Every file that is opened from now on."""
    disks: list[Disk] = []

    def open_disk(path: Path, mode: str, buffering: int) -> Disk:
        disks.append(Disk(path, **answers))
        return disks[-1]

    monkeypatch.setattr(Path, "open", open_disk)
    return disks


linux = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="has no direct writes")


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


@linux
@pytest.mark.parametrize("refuses", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_direct_writes_gets_ordinary_ones(
    tmp_path: Path, refuses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some take the flag and refuse the first write."""
    disks = opened(monkeypatch, refuses=refuses)
    data = os.urandom(9 * MIB + 5)
    with OutputFile(tmp_path / "out") as file:
        file.write(memoryview(data))
    monkeypatch.undo()
    assert disks[0].direct.count(True) <= 1 and not disks[0].direct[-1], "asked once, where the flag is taken"
    assert (tmp_path / "out").read_bytes() == data


@linux
@pytest.mark.parametrize("refuses", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_the_flag_gets_ordinary_ones(
    tmp_path: Path, refuses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    call = fcntl.fcntl

    def refuse(descriptor: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT:
            raise OSError(refuses, os.strerror(refuses))
        return call(descriptor, command, value)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    disks = opened(monkeypatch)
    data = os.urandom(5 * MIB + 5)
    with OutputFile(tmp_path / "out") as file:
        file.write(memoryview(data))
    monkeypatch.undo()
    assert disks[0].direct == [False, False]
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("most", [12300, 8192])
def test_a_short_write_is_finished(tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether what is left begins at a block of the device or within one."""
    opened(monkeypatch, most=most)
    data = os.urandom(5 * MIB + 5)
    with OutputFile(tmp_path / "out") as file:
        file.write(memoryview(data))
    monkeypatch.undo()
    assert (tmp_path / "out").read_bytes() == data


def test_an_error_of_the_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(monkeypatch, refuses=errno.ENOSPC)
    with pytest.raises(OSError, match="No space"), OutputFile(tmp_path / "out") as file:
        for _ in range(5):
            file.write(memoryview(bytes(4 * MIB)))


def test_a_file_system_that_takes_nothing_is_not_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(monkeypatch, most=0)
    with pytest.raises(OSError, match="Input/output"), OutputFile(tmp_path / "full") as full:
        full.write(memoryview(bytes(5 * MIB)))


def test_nothing_stays_open_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the flush, nor of the memory that is wanted."""

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "failed")

    with monkeypatch.context() as patch:
        patch.setattr(output_file.mmap, "mmap", failing)
        with pytest.raises(OSError, match="failed"):
            OutputFile(tmp_path / "memory")
    broken = OutputFile(tmp_path / "flush")
    with pytest.raises(OSError, match="failed"), broken:
        monkeypatch.setattr(os, "fsync", failing)
        broken.write(memoryview(b"some"))
    still_open = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
    assert not [path for path in still_open if path.is_relative_to(tmp_path)]


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError):
        OutputFile(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
