"""Where storages lie, and what else an archive holds: torch and our own look at it must agree."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
import torch

from avatarctl.files.source import open_weights
from avatarctl.files.tensors import read_whole
from tests.files.test_source_pickle import refusal, repacked, saved


def read(path: Path) -> dict[str, list[float]]:
    return {name: read_whole(tensor).tolist() for name, tensor in open_weights(path).tensors.items()}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return saved(tmp_path / "good.pt", {"w": torch.arange(4.0)})


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_any_alignment_of_torch_is_read(tmp_path: Path, alignment: int) -> None:
    from torch.utils.serialization import config

    made = {str(at): torch.full((at * 7,), float(at)) for at in range(12)}
    with config.patch({"save.storage_alignment": alignment}):
        path = saved(tmp_path / "a.pt", made)
    assert read(path) == {name: tensor.tolist() for name, tensor in made.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": b"11\n"}, "torch cannot read it"),
        ({"version": b"0"}, "record version holds"),
        ({"version": b"x"}, "record version holds"),
        ({"version": None}, "torch cannot read it"),
        ({".data/serialization_id": b"\xff"}, "torch cannot read it"),
    ],
    ids=str,
)
def test_records_beside_the_tensors_that_are_wrong_are_refused(
    archive: Path, tmp_path: Path, change: dict[str, bytes | None], says: str
) -> None:
    assert says in refusal(repacked(tmp_path / "a.pt", archive, **change))


def test_an_archive_without_a_byte_order_is_read(archive: Path, tmp_path: Path) -> None:
    """Archives of older versions of torch have none."""
    assert read(repacked(tmp_path / "a.pt", archive, byteorder=None)) == {"w": [0, 1, 2, 3]}


def renamed(path: Path, source: Path, **names: str) -> Path:
    """A copy of an archive with other names for some records, made by Python, which aligns nothing."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            folder, _, name = member.filename.partition("/")
            new.writestr(f"{folder}/{names.get(name, name)}", old.read(member))
    return path


def test_an_archive_repacked_with_its_format_version_is_refused(tmp_path: Path) -> None:
    """torch counts where the storages lie, without looking, and would read other bytes."""
    two = saved(tmp_path / "two.pt", {"w": torch.ones(3), "v": torch.zeros(3)})
    assert "corrupt or repacked" in refusal(renamed(tmp_path / "a.pt", two))
    swapped = renamed(tmp_path / "b.pt", two, **{"data/0": "data/1", "data/1": "data/0"})
    assert "corrupt or repacked" in refusal(swapped)


@pytest.mark.parametrize("name", ["ByteOrder", ".Storage_Alignment", ".FORMAT_VERSION"])
def test_records_in_capitals_are_checked_too(archive: Path, tmp_path: Path, name: str) -> None:
    """torch takes them for what they resemble; such a byte order or alignment ends the process."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            if member.filename.partition("/")[2] != name.lower():
                new.writestr(member.filename, old.read(member))
        new.writestr(f"good/{name}", b"big" if name == "ByteOrder" else b"0")
    says = refusal(path)
    assert "byte order" in says or name in says


@pytest.mark.parametrize(("at", "value"), [(8, 0x20), (9, 0x20), (28, 99), (30, 2), (32, 2), (33, 2)])
@pytest.mark.parametrize("which", [0, -1])
def test_entries_that_torch_does_not_write_are_refused(
    archive: Path, tmp_path: Path, at: int, value: int, which: int
) -> None:
    """Flags and lengths of the list of members (APPNOTE.TXT 4.3.12)."""
    data = bytearray(archive.read_bytes())
    entries = [place for place in range(len(data)) if data.startswith(b"PK\1\2", place)]
    data[entries[which] + at] = value
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    assert re.search("torch cannot read it|end of the archive is missing|members, and its end", refusal(path))


def test_a_member_marked_as_a_folder_is_refused(archive: Path, tmp_path: Path) -> None:
    """torch takes it for a folder and reads whatever is in its memory."""
    whole = bytearray(archive.read_bytes())
    whole[whole.index(b"PK\1\2") + 38] = 0x10
    path = tmp_path / "a.pt"
    path.write_bytes(whole)
    assert "'good/data.pkl' marked as a folder" in refusal(path)
