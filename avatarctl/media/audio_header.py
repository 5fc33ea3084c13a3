"""What the header of a WAV or AIFF file promises, read without trusting it; whether an Ogg file ends.

libsndfile clips the declared length to the file's size without a word. These few lines recover the
promise, so that a file that was cut short can be told from a short one, from one that was streamed by a
program that did not know the length yet, and from one with more behind its audio.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

__all__ = ["AudioHeader", "ogg_is_complete", "read_header"]

_IN_DS64 = 0xFFFFFFFF  # RF64: the size is in the ds64 chunk; without one, "until the end of the file"
# Bytes that programs state when they write into a pipe and do not know the length yet: the largest number of
# the field, signed or not, and round ones (SoX, espeak); many take off a header or a part of a sample frame.
_PLACEHOLDERS = (2_000_000_000, 0x7F000000, 0x7FFFF000, 1 << 31, 1 << 32, 1 << 63)
_NEAR = 256  # bytes
_FAR = 100  # times what is there: no recording was cut to so little and is still wanted
_MOST_CHUNKS = 1000  # behind the audio; a forged chain of empty ones must not take long
_WAVES = (b"RIFF", b"RIFX", b"RF64")
_LARGEST_OGG_PAGE = 65_307  # bytes: header, 255 lengths, 255 * 255 of content
_UNCOMPRESSED_TAGS = frozenset({1, 3, 6, 7, 0xFFFE})  # PCM, float, A-law, mu-law, extensible


@dataclass(frozen=True)
class AudioHeader:
    """The promise of a header.

    declared:          sample frames, None when not stated or compressed
    size_left_at_zero: the data chunk says 0 bytes and yet more than chunks follow
    doubts:            what a person should read about the length, without the file's name
    """

    rate: int
    channels: int
    declared: int | None
    size_left_at_zero: bool
    doubts: tuple[str, ...] = ()


def read_header(path: Path) -> AudioHeader | None:
    """The header of a RIFF, RIFX, RF64 or AIFF file; None for any other content or a broken one."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        start = handle.read(12)
        if len(start) < 12:
            return None
        magic, form = start[:4], start[8:12]
        if magic in _WAVES and form == b"WAVE":
            return _read_wave(handle, size, ">" if magic == b"RIFX" else "<")
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
            if size == _IN_DS64 and data_size_64 is not None:
                size = data_size_64
            behind = _end_of_chunks(handle, body + size + size % 2, file_size, order)
            if size == 0 and behind not in (file_size, file_size + 1):
                return AudioHeader(rate, channels, None, size_left_at_zero=True)
            stated, doubts = _judge(size, file_size - body)
            second = rate * max(1, frame_bytes)
            doubts = (*doubts, *_more_than_stated(handle, (behind, body + size), file_size, second))
            known = stated and tag in _UNCOMPRESSED_TAGS and frame_bytes > 0
            return AudioHeader(rate, channels, size // frame_bytes if known else None, False, doubts)
        handle.seek(body + size + size % 2)
    return None


def _is_placeholder(number: int) -> bool:
    return any(abs(number - each) <= _NEAR for each in _PLACEHOLDERS)


def _judge(size: int, present: int) -> tuple[bool, tuple[str, ...]]:
    """Whether `size` bytes of audio are a statement at all where `present` bytes follow, and the doubts."""
    if size <= present:
        return True, ()
    if _is_placeholder(size):
        return False, ()
    if size <= _FAR * present:
        return True, ()
    return False, (
        f"has a header that declares {size} bytes of audio, where {present} follow: its length is taken as "
        "not stated, and what is there is used",
    )


def _end_of_chunks(handle: BinaryIO, position: int, file_size: int, order: str) -> int:
    """Where the chain of well-formed chunks that begins at `position` ends: at the end of the file, in front
    of something else, or in front of another WAV file, which is formed like a chunk."""
    for _ in range(_MOST_CHUNKS):
        handle.seek(min(position, file_size))
        head = handle.read(8)
        if len(head) < 8 or head[:4] in _WAVES or not all(32 <= char < 127 for char in head[:4]):
            break
        size = struct.unpack(f"{order}I", head[4:])[0]
        position += 8 + size + size % 2
    return position


def _more_than_stated(
    handle: BinaryIO, ends: tuple[int, int], file_size: int, second: int
) -> tuple[str, ...]:
    """A doubt where another WAV file begins at one of `ends`, or more than a second of bytes that are no
    chunks begins at the first; fewer are padding or a tag."""
    for end in ends:
        handle.seek(min(end, file_size))
        start = handle.read(12)
        if start[:4] in _WAVES and start[8:] == b"WAVE":
            return (f"has another WAV file behind its audio: the last {file_size - end} bytes are not read",)
    more = file_size - ends[0]
    if more > second:
        return (f"holds more than its header declares: the last {more} bytes are not read",)
    return ()


def _read_aiff(handle: BinaryIO, file_size: int) -> AudioHeader | None:
    while len(head := handle.read(8)) == 8:
        name, size = head[:4], struct.unpack(">I", head[4:])[0]
        body = handle.tell()
        if name == b"COMM":
            content = handle.read(18)
            if len(content) < 18:
                return None
            channels, frames, bits = struct.unpack(">HIH", content[:8])
            # Compressed audio is smaller than this, and a whole one never by as much as `_FAR`.
            frame_bytes = 1 if _is_placeholder(frames) else channels * ((bits + 7) // 8)
            stated, doubts = _judge(frames * frame_bytes, file_size - body)
            return AudioHeader(_extended(content[8:18]), channels, frames if stated else None, False, doubts)
        handle.seek(body + size + size % 2)
    return None


def _extended(content: bytes) -> int:
    """An 80-bit IEEE 754 extended number, the sample rate of AIFF, as a whole number (0 if not sane)."""
    exponent, mantissa = struct.unpack(">HQ", content)
    shift = 16383 + 63 - (exponent & 0x7FFF)
    return mantissa >> shift if 0 <= shift < 64 else 0
