"""What the header of a WAV or AIFF file promises, read without trusting it; whether an Ogg file ends.

libsndfile clips the declared length to the file's size without a word. These few lines recover the
promise, so that a file that was cut short can be told from a short one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

__all__ = ["AudioHeader", "ogg_is_complete", "read_header"]

_UNKNOWN_SIZE = 0xFFFFFFFF  # "until the end of the file", written when streaming into a pipe
_LARGEST_OGG_PAGE = 65_307  # bytes: header, 255 lengths, 255 * 255 of content
_UNCOMPRESSED_TAGS = frozenset({1, 3, 6, 7, 0xFFFE})  # PCM, float, A-law, mu-law, extensible


@dataclass(frozen=True)
class AudioHeader:
    """The promise of a header. `declared`: sample frames, None when unknown or compressed."""

    rate: int
    channels: int
    declared: int | None
    size_left_at_zero: bool  # the data chunk says 0 bytes and yet more than chunks follow


def read_header(path: Path) -> AudioHeader | None:
    """The header of a RIFF, RIFX, RF64 or AIFF file; None for any other content or a broken one."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        start = handle.read(12)
        if len(start) < 12:
            return None
        magic, form = start[:4], start[8:12]
        if magic in (b"RIFF", b"RF64") and form == b"WAVE":
            return _read_wave(handle, size, "<")
        if magic == b"RIFX" and form == b"WAVE":
            return _read_wave(handle, size, ">")
        if magic == b"FORM" and form in (b"AIFF", b"AIFC"):
            return _read_aiff(handle, size)
        return None


def ogg_is_complete(path: Path) -> bool:
    """Whether the last page of an Ogg file carries the end-of-stream flag (RFC 3533, section 6)."""
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - _LARGEST_OGG_PAGE))
        end = handle.read(_LARGEST_OGG_PAGE)
    flags = end.rfind(b"OggS") + 5
    return flags >= 5 and flags < len(end) and bool(end[flags] & 4)


def _read_wave(handle: BinaryIO, file_size: int, order: str) -> AudioHeader | None:
    fmt: tuple[int, int, int, int] | None = None  # tag, channels, rate, bytes per sample frame
    data_size_64 = None
    while len(head := handle.read(8)) == 8:
        name, size = head[:4], struct.unpack(f"{order}I", head[4:])[0]
        body = handle.tell()
        if name == b"ds64":
            content = handle.read(16)
            data_size_64 = struct.unpack("<Q", content[8:])[0] if len(content) == 16 else None
        elif name == b"fmt " and size >= 16:
            content = handle.read(16)
            if len(content) < 16:
                return None
            tag, channels, rate, _, _, bits = struct.unpack(f"{order}HHIIHH", content)
            # The block align field is wrong in enough files; width times channels is not.
            fmt = (tag, channels, rate, channels * ((bits + 7) // 8))
        elif name == b"data":
            if fmt is None:
                return None
            tag, channels, rate, frame_bytes = fmt
            left_at_zero = size == 0 and not _only_chunks_follow(handle, body, file_size, order)
            if size == _UNKNOWN_SIZE:
                size = data_size_64
            known = size is not None and tag in _UNCOMPRESSED_TAGS and frame_bytes > 0
            declared = size // frame_bytes if known and not left_at_zero else None
            return AudioHeader(rate, channels, declared, left_at_zero)
        handle.seek(body + size + size % 2)
    return None


def _only_chunks_follow(handle: BinaryIO, position: int, file_size: int, order: str) -> bool:
    """Whether everything from `position` to the end is a chain of well-formed chunks, or nothing."""
    while position < file_size:
        handle.seek(position)
        head = handle.read(8)
        if len(head) < 8 or not all(32 <= char < 127 for char in head[:4]):
            return False
        size = struct.unpack(f"{order}I", head[4:])[0]
        position += 8 + size + size % 2
    return position in (file_size, file_size + 1)


def _read_aiff(handle: BinaryIO, file_size: int) -> AudioHeader | None:
    while len(head := handle.read(8)) == 8:
        name, size = head[:4], struct.unpack(">I", head[4:])[0]
        body = handle.tell()
        if name == b"COMM":
            content = handle.read(18)
            if len(content) < 18:
                return None
            channels, frames = struct.unpack(">HI", content[:6])
            return AudioHeader(_extended(content[8:18]), channels, frames, size_left_at_zero=False)
        handle.seek(body + size + size % 2)
    return None


def _extended(content: bytes) -> int:
    """An 80-bit IEEE 754 extended number, the sample rate of AIFF, as a whole number (0 if not sane)."""
    exponent, mantissa = struct.unpack(">HQ", content)
    shift = 16383 + 63 - (exponent & 0x7FFF)
    return mantissa >> shift if 0 <= shift < 64 else 0
