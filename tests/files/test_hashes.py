"""Which file it was: the whole SHA-256 of small files, a sampled one of large files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from avatarctl.files import hashes as hashes_module
from avatarctl.files.hashes import FileDigest, FileHashes

MIB = 1 << 20
LARGE = 300 * MIB + 12345
SMALLER = 10 * MIB + 12345


@pytest.fixture
def soon_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as large from 8 MiB: which parts of them count does not depend on where that begins."""
    monkeypatch.setattr(hashes_module, "_WHOLE_BYTES", 8 * MIB)


def digest_of(path: Path, *, whole: bool = False) -> FileDigest:
    with FileHashes(whole=whole) as hashes:
        hashes.start([path])
        (promised,) = hashes.placeholders([path])
        (digest,) = hashes.digests([path])
    assert promised.entries().keys() == digest.entries().keys()
    return digest


def sparse(path: Path, size: int, *writes: tuple[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in writes:
            file.seek(offset)
            file.write(data)
    return path


def test_of_a_small_file_every_byte_counts(tmp_path: Path) -> None:
    path = sparse(tmp_path / "small", 3 * MIB + 1, (2 * MIB, b"x"))
    assert digest_of(path) == FileDigest(sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_of_a_large_file_the_documented_parts_count(tmp_path: Path) -> None:
    path = sparse(tmp_path / "large", LARGE, (0, b"head"), (7 * MIB + 100, b"middle"), (LARGE - 4, b"tail"))
    data = path.read_bytes()
    parts = [data[:MIB], *(data[at : at + 4096] for at in range(MIB, len(data), MIB)), data[-MIB:]]
    expected = hashlib.sha256(len(data).to_bytes(8, "little") + b"".join(parts)).hexdigest()
    assert digest_of(path) == FileDigest(sampled_sha256=expected)


def test_in_full_where_it_is_asked_for(tmp_path: Path, soon_large: None) -> None:
    path = sparse(tmp_path / "large", SMALLER, (0, b"head"))
    digest = digest_of(path, whole=True)
    assert digest.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest.sampled_sha256 == digest_of(path).sampled_sha256 is not None


@pytest.mark.parametrize("at", [0, MIB - 1, 7 * MIB, 7 * MIB + 4095, SMALLER - MIB, SMALLER - 1])
def test_a_change_in_a_part_shows(tmp_path: Path, at: int, soon_large: None) -> None:
    before = digest_of(sparse(tmp_path / "before", SMALLER))
    after = digest_of(sparse(tmp_path / "after", SMALLER, (at, b"1")))
    assert before.sha256 is None and after != before


def test_another_size_shows(tmp_path: Path, soon_large: None) -> None:
    assert digest_of(sparse(tmp_path / "a", SMALLER)) != digest_of(sparse(tmp_path / "b", SMALLER + 1))


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sparse(tmp_path / "a", 100)
    with FileHashes() as hashes:
        hashes.start([path])
        hashes.digests([path])
        monkeypatch.setattr(hashlib, "sha256", None)  # whoever hashes again fails
        hashes.start([path])
        hashes.digests([path])
