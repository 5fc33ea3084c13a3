"""Images of known formats that are not read here, told by their bytes, so that a message can name them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

__all__ = ["foreign_kind", "way_out"]

_START = 64  # bytes: a file type box with a dozen brands, or any of the signatures below
# Brands of ISO/IEC 23000-22 and the formats' registrations; the generic ones at the end come with others.
_BRANDS = (
    ((b"avif", b"avis"), "AVIF"),
    ((b"crx ",), "camera raw (CR3)"),
    ((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"),
    ((b"mif1", b"mif2", b"msf1"), "HEIF"),
)
_JPEG_XL = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")  # a bare codestream, and in its container
_CAMERAS = (  # offset, signature, format
    (0, b"FUJIFILMCCD-RAW", "RAF"),
    (0, b"IIRO", "ORF"),
    (0, b"IIRS", "ORF"),
    (0, b"MMOR", "ORF"),
    (0, b"IIU\0", "RW2"),
    (0, b"FOVb", "X3F"),
    (0, b"\0MRM", "MRW"),
    (6, b"HEAPCCDR", "CRW"),
    (8, b"CR\x02", "CR2"),
)
# Tags of a TIFF directory, and what photometric interpretation is the sensor's own: a mosaic of its colours,
# or linear values of the sensor (DNG 1.7, TIFF/EP).
_PHOTOMETRIC, _SUB_DIRECTORIES, _DNG_VERSION = 262, 330, 50706
_OF_A_SENSOR = (32803, 34892)
_MOST_DIRECTORIES = 16
_MOST_ENTRIES = 4096


def foreign_kind(path: Path) -> str | None:
    """The name of a known format that Pillow does not read, or not as what it is; None for all others.

    Raw files of many cameras are TIFF files that begin with a small preview, which would be taken for the
    image. Whether AVIF is foreign depends on how Pillow was built: the caller decides.
    """
    with path.open("rb") as handle:
        start = handle.read(_START)
        if start[4:8] == b"ftyp":
            return _of_brands(start)
        if start.startswith(_JPEG_XL):
            return "JPEG XL"
        for offset, signature, name in _CAMERAS:
            if start[offset:].startswith(signature):
                return f"camera raw ({name})"
        if start[:4] in (b"II*\0", b"MM\0*"):
            return _of_directories(handle, "<" if start.startswith(b"II") else ">")
    return None


def way_out(kind: str) -> str:
    """What a person can do with a file of a foreign kind."""
    tool = {"HEIC": "heif-convert", "HEIF": "heif-convert", "JPEG XL": "djxl", "AVIF": "avifdec"}.get(kind)
    if tool is None:
        return "develop it to PNG, TIFF or JPEG in a photo program"
    return f"save it as PNG or JPEG in a photo program, or: {tool} IN OUT.png"


def _of_brands(start: bytes) -> str | None:
    """By the major brand and the compatible ones: a photograph may say `mif1` first and `heic` only then."""
    end = min(int.from_bytes(start[:4], "big"), len(start))
    brands = {start[8:12], *(start[at : at + 4] for at in range(16, end - 3, 4))}
    return next((name for known, name in _BRANDS if brands.intersection(known)), None)


def _of_directories(handle: BinaryIO, order: str) -> str | None:
    """Whether a TIFF file holds what a sensor saw, in its first directories or those below them."""
    waiting = _offsets(handle, order, 4, 1)
    for _ in range(_MOST_DIRECTORIES):
        if not waiting:
            break
        place = waiting.pop(0)
        handle.seek(place)
        count = int.from_bytes(handle.read(2), "little" if order == "<" else "big")
        entries = handle.read(12 * min(count, _MOST_ENTRIES))
        for at in range(0, len(entries) - 11, 12):
            tag, _, many, value = struct.unpack(f"{order}HHIH", entries[at : at + 10])
            if tag == _DNG_VERSION:
                return "camera raw (DNG)"
            if tag == _PHOTOMETRIC and value in _OF_A_SENSOR:
                return "camera raw"
            if tag == _SUB_DIRECTORIES:  # one stands in the entry itself, several where the entry points to
                inside = place + 2 + at + 8
                for start in [inside] if many == 1 else _offsets(handle, order, inside, 1):
                    waiting += _offsets(handle, order, start, many)
        waiting += _offsets(handle, order, place + 2 + 12 * count, 1)  # the next of the chain
    return None


def _offsets(handle: BinaryIO, order: str, place: int, many: int) -> list[int]:
    """Up to `many` file offsets at a place of the file; zeros mean none."""
    handle.seek(place)
    content = handle.read(4 * min(many, _MOST_DIRECTORIES))
    return [each for (each,) in struct.iter_unpack(f"{order}I", content[: len(content) // 4 * 4]) if each]
