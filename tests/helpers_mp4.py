"""Reads the tables of an MP4 byte by byte (ISO/IEC 14496-12), sharing nothing with what wrote them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

HOLDERS = ("moov", "trak", "edts", "mdia", "minf", "stbl")
"""Boxes that are nothing but boxes."""


@dataclass(frozen=True)
class Tables:
    """One track as the file states it; times in seconds.

    kind:      `vide` or `soun`
    timescale: units of the sample table per second
    shown:     `tkhd`'s duration: what a player shows
    media:     `mdhd`'s duration: all samples, with those that are skipped
    edits:     (duration, where in the media it begins) of each entry of `elst`
    deltas:    the length of each sample in units of `timescale` (`stts`)
    sizes:     bytes of each sample (`stsz`)
    """

    kind: str
    timescale: int
    shown: Fraction
    media: Fraction
    edits: tuple[tuple[Fraction, Fraction], ...]
    deltas: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Every box as (kind, what is in it), a holder before what it holds."""
    at = 0
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8].decode("latin-1")
        yield kind, data[at + 8 : at + size]
        if kind in HOLDERS:
            yield from boxes(data[at + 8 : at + size])
        at += size


def order(path: Path) -> list[str]:
    """The boxes of the file itself, in order."""
    found, at, data = [], 0, path.read_bytes()
    while at < len(data):
        found.append(data[at + 4 : at + 8].decode("latin-1"))
        at += int.from_bytes(data[at : at + 4], "big")
    return found


def read_tables(path: Path) -> tuple[Fraction, list[Tables]]:
    """`mvhd`'s duration in seconds, and all tracks."""
    (moov,) = [body for kind, body in boxes(path.read_bytes()) if kind == "moov"]
    header = dict(boxes(moov))["mvhd"]
    scale = _numbers(header)[3]
    tracks = [_track(body, scale) for kind, body in boxes(moov) if kind == "trak"]
    return Fraction(_numbers(header)[4], scale), tracks


def _track(trak: bytes, movie: int) -> Tables:
    found = {
        kind: _numbers(body) for kind, body in boxes(trak) if kind not in HOLDERS
    }  # all of version 0 here
    scale = found["mdhd"][3]
    elst, stts, stsz = found["elst"], found["stts"], found["stsz"]
    edits = [(elst[at], elst[at + 1]) for at in range(2, 2 + 3 * elst[1], 3)]
    deltas = [delta for at in range(2, 2 + 2 * stts[1], 2) for delta in [stts[at + 1]] * stts[at]]
    return Tables(
        kind=dict(boxes(trak))["hdlr"][8:12].decode(),
        timescale=scale,
        shown=Fraction(found["tkhd"][5], movie),
        media=Fraction(found["mdhd"][4], scale),
        edits=tuple((Fraction(length, movie), Fraction(begin, scale)) for length, begin in edits),
        deltas=tuple(deltas),
        sizes=tuple(stsz[3 : 3 + stsz[2]] if stsz[1] == 0 else [stsz[1]] * stsz[2]),
    )


def _numbers(body: bytes) -> tuple[int, ...]:
    return struct.unpack(f">{len(body) // 4}I", body[: len(body) // 4 * 4])
