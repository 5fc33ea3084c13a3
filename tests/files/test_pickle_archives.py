"""Where storages lie and what else an archive holds, judged without torch as torch judges it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from avatarctl.files.zip_archive import Record, storage_offsets
from tests.files.test_pickle_reading import both_ways, outcome
from tests.files.test_source_pickle import repacked, saved


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return saved(tmp_path / "good.pt", {"w": torch.arange(4.0)})


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_alignments_of_torch_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alignment: int
) -> None:
    from torch.utils.serialization import config

    with config.patch({"save.storage_alignment": alignment}):
        path = saved(tmp_path / "a.pt", {str(at): torch.ones(at * 7) for at in range(12)})
    ours, theirs, asked = both_ways(path, monkeypatch)
    assert not asked
    assert ours == theirs


@pytest.mark.parametrize(
    ("header", "size"),
    [(1000, 5), (1000, 0xFFFFFFFF), (0xFFFFFFFE - 40, 7), (0xFFFFFFFF, 7), (1 << 33, 1 << 33), (1 << 33, 0)],
)
@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_places_beyond_4_gib_are_counted_as_torch_counts_them(
    tmp_path: Path, header: int, size: int, alignment: int
) -> None:
    reader = torch._C.PyTorchFileReader(str(saved(tmp_path / "a.pt", {"w": torch.ones(1)})))
    told = reader.get_record_offset_no_read(header, "data/1", size, alignment)
    # What the first storage must hold for the second one's header to be there: descriptor of 16 or 24 bytes.
    for descriptor in (16, 24):
        first = header - descriptor - 64
        if (first >= 0xFFFFFFFF) != (descriptor == 24):
            continue
        for off_by in (0, 1):
            records = {
                "data/0": Record("data/0", "a/data/0", 64, first),
                "data/1": Record("data/1", "a/data/1", told + off_by, size),
            }
            found = storage_offsets({"0": first, "1": size}, records, alignment)
            assert found == (None if off_by else {"0": 64, "1": told})


@pytest.mark.parametrize(
    "change",
    [
        {"version": b"11\n"},
        {"version": b"0"},
        {"version": None},
        {"version": b"x"},
        {"data/1": None},
        {"data/0": bytes(4)},
        {"byteorder": None},
        {".data/serialization_id": b"\xff"},
    ],
    ids=str,
)
def test_records_are_judged_as_torch_judges_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, bytes | None]
) -> None:
    good = saved(tmp_path / "good.pt", {"w": torch.arange(4.0), "v": torch.ones(3)})
    ours, theirs, _ = both_ways(repacked(tmp_path / "a.pt", good, **change), monkeypatch)
    assert ours == theirs
    assert isinstance(ours, tuple) == (change == {"byteorder": None})


def renamed(path: Path, source: Path, **names: str) -> Path:
    """A copy of an archive with other names for some records, made by Python, which aligns nothing."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            folder, _, name = member.filename.partition("/")
            new.writestr(f"{folder}/{names.get(name, name)}", old.read(member))
    return path


def test_an_archive_repacked_with_its_format_version_is_refused_as_before(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = saved(tmp_path / "two.pt", {"w": torch.ones(3), "v": torch.ones(3)})
    ours, theirs, asked = both_ways(renamed(tmp_path / "a.pt", two), monkeypatch)
    assert ours == theirs
    assert asked
    assert "corrupt or repacked" in str(ours)
    swapped = renamed(tmp_path / "b.pt", two, **{"data/0": "data/1", "data/1": "data/0"})
    ours, theirs, _ = both_ways(swapped, monkeypatch)
    assert ours == theirs


@pytest.mark.parametrize("name", ["ByteOrder", ".Storage_Alignment", ".FORMAT_VERSION"])
def test_records_in_capitals_are_checked_too(archive: Path, tmp_path: Path, name: str) -> None:
    """torch takes them for what they resemble; such a byte order or alignment ends the process."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            if member.filename.partition("/")[2] != name.lower():
                new.writestr(member.filename, old.read(member))
        new.writestr(f"good/{name}", b"big" if name == "ByteOrder" else b"0")
    assert isinstance(refusal := outcome(path), str)
    assert "byte order" in refusal or name in refusal


@pytest.mark.parametrize(
    ("at", "value"),
    [(8, 0x20), (9, 0x20), (28, 99), (30, 2), (32, 2), (33, 2), (34, 1)],
)
def test_entries_that_torch_refuses_are_refused_as_before(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, value: int
) -> None:
    """Flags, lengths, disk and attributes of the list of members (APPNOTE.TXT 4.3.12)."""
    whole = archive.read_bytes()
    entries = [place for place in range(len(whole)) if whole.startswith(b"PK\1\2", place)]
    for entry in (entries[0], entries[-1]):
        data = bytearray(whole)
        data[entry + at] = value
        path = tmp_path / "a.pt"
        path.write_bytes(data)
        ours, theirs, _ = both_ways(path, monkeypatch)
        assert ours == theirs


def test_a_member_marked_as_a_folder_is_refused(archive: Path, tmp_path: Path) -> None:
    """torch takes it for a folder and reads whatever is in its memory."""
    whole = bytearray(archive.read_bytes())
    whole[whole.index(b"PK\1\2") + 38] = 0x10
    path = tmp_path / "a.pt"
    path.write_bytes(whole)
    assert "'good/data.pkl' marked as a folder" in str(outcome(path))
