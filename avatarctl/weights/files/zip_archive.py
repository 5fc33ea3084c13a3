"""The zip archive of torch.save, checked before anything in it is believed.

torch.save writes every record uncompressed, under one folder: `NAME/data.pkl`, `NAME/byteorder` and
`NAME/data/0 ...` with the bytes of one storage each (torch 2.13, torch/serialization.py). So the bytes of a
storage are consecutive bytes of the file. A record that is compressed, overlaps another one, lies outside
the file or leaves the folder does not come from torch.save and is refused. Nothing is ever extracted.
"""

from __future__ import annotations

import itertools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

from avatarctl.errors import UnusableWeights
from avatarctl.weights.files.strict_json import clip

__all__ = ["Record", "read_records"]

MAX_DIRECTORY: Final = 16 << 20
"""Bytes of the list of members; 1100 tensors take 0.1 MB."""

_LOCAL_HEADER: Final = 30
"""Bytes of a local file header before its name (APPNOTE.TXT 4.3.7)."""


@dataclass(frozen=True)
class Record:
    """name: without the folder; offset, size: bytes of its contents within the file."""

    name: str
    offset: int
    size: int


class _Bounded:
    """A file that refuses to be read in one go beyond a bound: zipfile reads as much as the file claims."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self._file, self._size, self._path = file, size, path

    def read(self, count: int = -1) -> bytes:
        left = max(self._size - self._file.tell(), 0)
        count = left if count < 0 else min(count, left)
        if count > MAX_DIRECTORY:
            raise UnusableWeights("invalid: the archive's list of members is too large", where=self._path)
        return self._file.read(count)


def read_records(file: BinaryIO, size: int, path: Path) -> dict[str, Record]:
    """The records of an archive by name without its folder ("data.pkl", "data/0").

    size: bytes of the whole file. Raises UnusableWeights.
    """
    try:
        with zipfile.ZipFile(cast("BinaryIO", _Bounded(file, size, path))) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise UnusableWeights(
            "corrupt or truncated: the end of the archive is missing or damaged", where=path,
            fix="an interrupted download or a killed training job leaves such files",
        ) from error  # fmt: skip
    names = [member.filename for member in members]
    if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
        raise UnusableWeights("is a TorchScript archive (a program), not a state dict", where=path)
    folder = next((name[:-9] for name in names if name.endswith("/data.pkl") and name.count("/") == 1), None)
    if folder is None:
        raise UnusableWeights("is not a torch archive: it has no data.pkl", where=path)
    records: dict[str, Record] = {}
    for member in members:
        name = _inner_name(member, folder, path)
        if name in records:
            raise UnusableWeights(f"refused: archive member {clip(name)!r} is there twice", where=path)
        records[name] = Record(name, _contents(file, member, size, path), member.file_size)
    _refuse_overlap(members, records, path)
    return records


def _inner_name(member: zipfile.ZipInfo, folder: str, path: Path) -> str:
    """The name of a member within the folder of the archive, after everything but its place is checked."""
    name = member.filename
    top, _, inner = name.partition("/")
    parts = inner.split("/")
    if not folder or top != folder or not all(parts) or {".", ".."} & {top, *parts} or "\\" in name:
        raise UnusableWeights(
            f"refused: archive member {clip(name)!r} lies outside its folder (an unsafe path)", where=path
        )
    if not name.isascii() or not name.isprintable():
        raise UnusableWeights(f"refused: archive member {clip(name)!r} has an unusual name", where=path)
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise UnusableWeights(
            f"refused: archive member {clip(name)!r} is compressed, which torch.save never does",
            where=path,
            fix="unpack it with its author's tool and save it again with torch.save",
        )
    if member.flag_bits & 1:
        raise UnusableWeights(f"refused: archive member {clip(name)!r} is encrypted", where=path)
    return inner


def _contents(file: BinaryIO, member: zipfile.ZipInfo, size: int, path: Path) -> int:
    """Byte of the file at which the contents of a member begin; all of them lie within the file."""
    file.seek(max(member.header_offset, 0))
    header = file.read(_LOCAL_HEADER)
    start = member.header_offset + _LOCAL_HEADER
    if len(header) == _LOCAL_HEADER and header.startswith(b"PK\x03\x04"):
        start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if start + member.file_size <= size:
            return start
    raise UnusableWeights(
        f"corrupt: archive member {clip(member.filename)!r} lies outside the file", where=path
    )


def _refuse_overlap(members: list[zipfile.ZipInfo], records: dict[str, Record], path: Path) -> None:
    places = sorted(zip(members, records.values(), strict=True), key=lambda place: place[0].header_offset)
    for (_, record), (following, _) in itertools.pairwise(places):
        if record.offset + record.size > following.header_offset:
            raise UnusableWeights(
                f"refused: archive members {clip(record.name)!r} and {clip(following.filename)!r} overlap",
                where=path,
            )
