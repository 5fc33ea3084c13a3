"""Archives that two readers would read differently: what is checked must be what torch reads."""

from __future__ import annotations

import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from avatarctl.errors import UnusableWeights
from avatarctl.files.pickle_file import read_pickle
from avatarctl.files.zip_archive import MAX_DIRECTORY

torch = pytest.importorskip("torch")

END, LOCATOR, END64 = 22, 20, 56


@pytest.fixture
def archive(tmp_path: Path) -> bytearray:
    path = tmp_path / "audio.pt"
    torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2)}, path)
    return bytearray(path.read_bytes())


def refused(data: bytes, tmp_path: Path) -> str:
    """Why; without the path, in which words of the test stand."""
    path = tmp_path / "weights.pt"
    path.write_bytes(data)
    with pytest.raises(UnusableWeights) as caught:
        read_pickle(path)
    return str(caught.value).removeprefix(str(path))


def changed(data: bytearray, at: int, layout: str, *values: int) -> bytearray:
    struct.pack_into(layout, data, at, *values)
    return data


def second_directory(data: bytearray) -> bytes:
    """Another directory and end record before the true ones; the locator leads to them, and torch follows."""
    end64 = len(data) - END - LOCATOR - END64
    count, length, offset = struct.unpack_from("<3Q", data, end64 + 32)
    moved = length + END64
    hidden = data[offset : offset + length] + data[end64 : end64 + END64]
    whole = data[:offset] + hidden + data[offset:]
    changed(whole, end64 + moved + 32, "<3Q", count, length, offset + moved)
    changed(whole, len(whole) - END + 16, "<I", offset + moved)
    return bytes(changed(whole, len(whole) - END - LOCATOR + 8, "<Q", offset + length))


CASES: dict[str, tuple[Callable[[bytearray], bytes | bytearray], str]] = {
    "second directory": (second_directory, "locator"),
    "comment": (lambda data: changed(data, len(data) - 2, "<H", 3) + b"abc", "truncated|behind its end"),
    "bytes behind": (lambda data: data + b"\0" * 8, "behind its end"),
    "bytes in front": (lambda data: data[:64] + data, "locator|just before"),
    "count": (lambda data: changed(data, len(data) - END + 8, "<HH", 1, 1), "disagree"),
    "disk": (lambda data: changed(data, len(data) - END + 4, "<H", 1), "several parts"),
    "offset": (lambda data: changed(data, len(data) - END + 16, "<I", 64), "disagree"),
    "no end": (lambda data: data[:-END], "truncated"),
}


@pytest.mark.parametrize(("change", "says"), CASES.values(), ids=CASES.keys())
def test_ends_that_disagree_are_refused(
    tmp_path: Path, archive: bytearray, change: Callable[[bytearray], bytes | bytearray], says: str
) -> None:
    message = refused(bytes(change(archive)), tmp_path)
    assert any(word in message for word in says.split("|")), message


def test_a_list_of_members_that_would_fill_the_memory_is_not_read(tmp_path: Path, archive: bytearray) -> None:
    end64 = len(archive) - END - LOCATOR - END64
    length = struct.unpack_from("<Q", archive, end64 + 40)[0]
    more = MAX_DIRECTORY + 1 - length
    changed(archive, end64 + 40, "<Q", length + more)
    changed(archive, len(archive) - END + 12, "<I", length + more)
    changed(archive, len(archive) - END - LOCATOR + 8, "<Q", end64 + more)
    data = bytes(archive[:end64]) + bytes(more) + bytes(archive[end64:])
    tracemalloc.start()
    try:
        assert "list of members is too large" in refused(data, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < MAX_DIRECTORY / 4
    finally:
        tracemalloc.stop()


def test_fewer_members_than_the_end_says_are_refused(tmp_path: Path, archive: bytearray) -> None:
    end64 = len(archive) - END - LOCATOR - END64
    count = struct.unpack_from("<Q", archive, end64 + 32)[0] - 1
    changed(archive, end64 + 24, "<QQ", count, count)
    assert "members" in refused(changed(archive, len(archive) - END + 8, "<HH", count, count), tmp_path)


def test_a_local_name_is_the_one_of_the_directory(tmp_path: Path, archive: bytearray) -> None:
    archive[archive.index(b"/data/1")+1] = ord("x")  # fmt: skip
    assert "another name" in refused(archive, tmp_path)


def test_names_that_differ_only_in_case_are_refused(tmp_path: Path, archive: bytearray) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(archive)
    with zipfile.ZipFile(path, "a") as opened:
        folder = opened.namelist()[0].partition("/")[0]
        opened.writestr(f"{folder}/DATA.PKL", b"\x80\x02}.")
    assert "only in case" in refused(path.read_bytes(), tmp_path)


def test_an_archive_without_zip64_is_read(tmp_path: Path, archive: bytearray) -> None:
    """miniz and Python write zip64 records only where they need them; torch.save always does."""
    end64 = len(archive) - END - LOCATOR - END64
    path = tmp_path / "weights.pt"
    path.write_bytes(archive[:end64] + archive[-END:])
    assert set(read_pickle(path).tensors) == {"a", "b"}
