"""The zip archive of torch.save, checked before anything in it is believed.

torch.save writes every record uncompressed, under one folder: `NAME/data.pkl`, `NAME/byteorder` and
`NAME/data/0 ...` with the bytes of one storage each (torch 2.13, torch/serialization.py). So the bytes of a
storage are consecutive bytes of the file. A record that is compressed, overlaps another one, lies outside
the file or leaves the folder does not come from torch.save and is refused. Nothing is ever extracted.

What is checked here must be what torch reads. Python's zipfile and torch's miniz look for the directory in
different ways, so everything that could lead them apart is refused: end records that disagree, gaps and
bytes behind them, local names that differ, names that differ only in case (miniz compares without it).
"""

from __future__ import annotations

import itertools
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from avatarctl.errors import UnusableWeights
from avatarctl.files.strict_json import clip

__all__ = ["Record", "read_records"]

MAX_DIRECTORY: Final = 16 << 20
"""Bytes of the list of members; 1100 tensors take 0.1 MB."""

_LOCAL_HEADER: Final = 30
"""Bytes of a local file header before its name (APPNOTE.TXT 4.3.7)."""

_END: Final = struct.Struct("<4s4H2IH")
"""End of central directory (4.3.16): signature, two disks, two counts, size, offset, length of comment."""
_LOCATOR: Final = struct.Struct("<4sIQI")
"""Zip64 locator (4.3.15): signature, disk, offset of the zip64 end record, number of disks."""
_END64: Final = struct.Struct("<4sQ2H2I4Q")
"""Zip64 end record (4.3.14): signature, its size, two versions, two disks, two counts, size, offset."""

_FOLDER: Final = 0x10
"""The attribute of a folder in MS-DOS (4.4.15): torch reads such a member as whatever is in its memory."""


@dataclass(frozen=True)
class Record:
    """offset, size: bytes of its contents within the file."""

    offset: int
    size: int


def read_records(file: BinaryIO, size: int, path: Path) -> dict[str, Record]:
    """The records of an archive by name without its folder ("data.pkl", "data/0").

    size: bytes of the whole file. Raises UnusableWeights.
    """
    count, directory = _directory(file, size, path)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise _no_end(path) from error
    if len(members) != count:
        raise _ambiguous(f"{len(members)} members, and its end says {count}", path)
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
        records[name] = Record(_contents(file, member, directory, path), member.file_size)
    if len({name.lower() for name in records}) < len(records):
        raise _ambiguous("two members whose names differ only in case", path)
    _refuse_overlap(members, records.values(), path)
    for member in members:
        stated = member.filename.encode("ascii")
        file.seek(member.header_offset + _LOCAL_HEADER - 4)
        local = file.read(4 + len(stated))
        if local[:2] != len(stated).to_bytes(2, "little") or local[4:] != stated:
            raise _ambiguous(f"another name at the contents of {clip(member.filename)!r}", path)
    return records


def _directory(file: BinaryIO, size: int, path: Path) -> tuple[int, int]:
    """(members, first byte) of the archive's only directory, which ends where the end begins."""
    tail = _END64.size + _LOCATOR.size + _END.size
    file.seek(max(size - tail, 0))
    end = file.read(tail)
    if len(end) < _END.size or b"PK\x05\x06" not in end:
        raise _no_end(path)
    signature, *disks, on_disk, count, length, offset, comment = _END.unpack(end[-_END.size :])
    if signature != b"PK\x05\x06" or comment or any(disks) or on_disk != count:
        raise _ambiguous("bytes behind its end, or several parts", path)
    begin = size - _END.size
    if len(end) == tail and end[_END64.size :].startswith(b"PK\x06\x07"):
        begin = size - tail
        _, disk, place, parts = _LOCATOR.unpack(end[_END64.size : -_END.size])
        sign64, own, _, _, *disks, on_disk, count64, length64, offset64 = _END64.unpack(end[: _END64.size])
        if (sign64, own, disk, place, parts) != (b"PK\x06\x06", _END64.size - 12, 0, begin, 1):
            raise _ambiguous("a locator that does not lead to its end", path)
        wide = ((count, count64, 0xFFFF), (length, length64, 0xFFFFFFFF), (offset, offset64, 0xFFFFFFFF))
        if any(disks) or on_disk != count64 or any(old not in (new, unset) for old, new, unset in wide):
            raise _ambiguous("two end records that disagree", path)
        count, length, offset = count64, length64, offset64
    if offset + length != begin:
        raise _ambiguous("a list of members that is not just before its end", path)
    if length > MAX_DIRECTORY:  # zipfile reads all of it at once
        raise UnusableWeights("invalid: the archive's list of members is too large", where=path)
    return count, offset


def _no_end(path: Path) -> UnusableWeights:
    return UnusableWeights(
        "corrupt or truncated: the end of the archive is missing or damaged", where=path,
        fix="an interrupted download or a killed training job leaves such files",
    )  # fmt: skip


def _ambiguous(what: str, path: Path) -> UnusableWeights:
    """The error for an archive that two readers could read differently."""
    return UnusableWeights(
        f"refused: a corrupt or ambiguous archive, with {what}", where=path,
        fix="get the file again, or load and save it again with torch",
    )  # fmt: skip


def _inner_name(member: zipfile.ZipInfo, folder: str, path: Path) -> str:
    """The name of a member within the folder of the archive, after everything but its place is checked."""
    name = member.filename
    top, _, inner = name.partition("/")
    parts = inner.split("/")
    if not folder or top != folder or not all(parts) or {".", ".."} & {top, *parts} or "\\" in name:
        raise UnusableWeights(
            f"refused: archive member {clip(name)!r} lies outside its folder (an unsafe path)", where=path
        )
    if not name.isascii() or not name.isprintable() or name != member.orig_filename:
        raise UnusableWeights(f"refused: archive member {clip(name)!r} has an unusual name", where=path)
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise UnusableWeights(
            f"refused: archive member {clip(name)!r} is compressed, which torch.save never does",
            where=path,
            fix="unpack it with its author's tool and save it again with torch.save",
        )
    if member.external_attr & _FOLDER:
        raise _ambiguous(f"{clip(name)!r} marked as a folder", path)
    if member.flag_bits & 1:
        raise UnusableWeights(f"refused: archive member {clip(name)!r} is encrypted", where=path)
    return inner


def _contents(file: BinaryIO, member: zipfile.ZipInfo, directory: int, path: Path) -> int:
    """Byte of the file at which the contents of a member begin; all of them lie before the directory."""
    file.seek(max(member.header_offset, 0))
    header = file.read(_LOCAL_HEADER)
    start = member.header_offset + _LOCAL_HEADER
    if len(header) == _LOCAL_HEADER and header.startswith(b"PK\x03\x04"):
        start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if start + member.file_size <= directory:
            return start
    raise UnusableWeights(
        f"corrupt: archive member {clip(member.filename)!r} lies outside the file", where=path
    )


def _refuse_overlap(members: list[zipfile.ZipInfo], records: Iterable[Record], path: Path) -> None:
    places = sorted(zip(members, records, strict=True), key=lambda place: place[0].header_offset)
    for (member, record), (following, _) in itertools.pairwise(places):
        if record.offset + record.size > following.header_offset:
            names = f"{clip(member.filename)!r} and {clip(following.filename)!r}"
            raise UnusableWeights(f"refused: archive members {names} overlap", where=path)
