"""Faces that another detector found, from a table: `data.faces FILE` (docs/faces.md).

A UTF-8 CSV file with a header line and a line for each face: `frame`, `x0`, `y0`, `x1`, `y1`, and either the
three points that alignment takes (`left_brow_x`, `left_brow_y`, `right_brow_*`, `nose_*`) or the five that
most detectors give (`left_eye_*`, `right_eye_*`, `nose_*`, `left_mouth_*`, `right_mouth_*`; `nose` is then
its tip). Left is left in the image. `video` names the clip, `person` a track, `score` is 0..1; each may be
left out.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from avatarctl.errors import UnusableFile
from avatarctl.files.strict_json import file_size, reading
from avatarctl.perception.smooth import MOST_MISSING, TrackedFace

__all__ = ["GivenFaces", "read_given_faces"]

_LARGEST: Final = 1 << 28
"""Bytes of a table: some hours of video."""
_BOX: Final = ("x0", "y0", "x1", "y1")
_THREE: Final = ("left_brow", "right_brow", "nose")
_FIVE: Final = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
_FARTHEST: Final = 1e6

# In units of the distance of the eyes, from the point between them, across and down: means over the six faces
# of tests/golden/faces, with a deviation of 0.02. Alignment takes brows and the middle of the nose.
_BROW: Final = (0.605, -0.375)
_NOSE: Final = (0.75, 1.02)
"""Of the nose's tip, which lies further out where a head is turned."""


@dataclass(frozen=True)
class _Row:
    box: np.ndarray
    points: np.ndarray
    score: float


@dataclass(frozen=True)
class GivenFaces:
    """videos: by the name in the table, "" where it names none: person to frame to face."""

    path: Path
    videos: Mapping[str, Mapping[int, Mapping[int, _Row]]]

    def people(self, video: str) -> list[int]:
        """The persons of a clip; `video` is its name relative to the data, with or without its suffix.

        Raises UnusableFile where the table names other clips only.
        """
        return sorted(self._of(video))

    def digest(self, video: str) -> str:
        """SHA-256 of what is said of a clip; other clips in the table do not change it."""
        told = hashlib.sha256()
        for person, track in sorted(self._of(video).items()):
            for frame, row in sorted(track.items()):
                told.update(f"{person} {frame} {row.score!r} ".encode())
                told.update(row.box.tobytes() + row.points.tobytes())
        return told.hexdigest()

    def follow(self, video: str, frames: int, person: int | None = None) -> Iterator[TrackedFace | None]:
        """The face of each frame of a clip of `frames` frames, in order; gaps of at most half a second are
        filled.

        person: as in the table; None for whoever has the largest box in most frames. Points are taken as they
        are: smoothing is for whoever found them.
        Raises UnusableFile for another clip, and for frames that the clip does not have.
        """
        held = self._of(video)
        chosen = _largest(held) if person is None else person
        track = held.get(chosen, {})
        last = max((max(each, default=-1) for each in held.values()), default=-1)
        if last >= frames:
            raise UnusableFile(
                f"has a face in frame {last} of {video or 'the clip'}, which has {frames} frames",
                where=self.path,
                fix="frames count from 0 at 25 a second; is it of another clip?",
            )
        known = np.array(sorted(track))
        for frame in range(frames):
            yield _between(track, known, frame, chosen)

    def _of(self, video: str) -> Mapping[int, Mapping[int, _Row]]:
        names = dict.fromkeys((video, video.rpartition(".")[0] or video, ""))
        found = next((self.videos[name] for name in names if name in self.videos), None)
        if found is None:
            some = ", ".join(list(self.videos)[:3])
            raise UnusableFile(f"names no face of {video}, but of {some}", where=self.path)
        return found


def _largest(held: Mapping[int, Mapping[int, _Row]]) -> int:
    wins: dict[int, int] = dict.fromkeys(held, 0)
    for frame in {frame for track in held.values() for frame in track}:
        sides = {
            person: float((track[frame].box[2:] - track[frame].box[:2]).max())
            for person, track in held.items()
            if frame in track
        }
        wins[max(sides, key=lambda person: sides[person])] += 1
    return max(wins, key=lambda person: (wins[person], -person))


def _between(track: Mapping[int, _Row], known: np.ndarray, frame: int, person: int) -> TrackedFace | None:
    if frame in track:
        row = track[frame]
        return TrackedFace(person, row.box, row.points, None, row.score, True)
    place = int(np.searchsorted(known, frame))
    if not 0 < place < len(known) or known[place] - known[place - 1] - 1 > MOST_MISSING:
        return None
    before, after = int(known[place - 1]), int(known[place])
    share = (frame - before) / (after - before)
    first, second = track[before], track[after]
    box = (1 - share) * first.box + share * second.box
    points = (1 - share) * first.points + share * second.points
    return TrackedFace(person, box, points, None, min(first.score, second.score), False)


def read_given_faces(path: Path) -> GivenFaces:
    """Reads and checks a table.

    Raises PathNotFound, and UnusableFile with the line for whatever is wrong: missing columns, what is no
    number or not finite, an empty box, a face that stands twice.
    """
    if file_size(path) > _LARGEST:
        raise UnusableFile(f"is larger than {_LARGEST >> 20} MB", where=path)
    with reading(path):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableFile("is not UTF-8 text", where=path) from error
    if "\0" in text:
        raise UnusableFile("is not a text", where=path)
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    videos: dict[str, dict[int, dict[int, _Row]]] = {}
    try:
        names = _points_of(path, table.fieldnames or ())
        for line in table:
            where = f"{path}:{table.line_num}"
            frame, person = _integer(where, line, "frame"), _integer(where, line, "person", 0)
            track = videos.setdefault((line.get("video") or "").strip(), {}).setdefault(person, {})
            if frame in track:
                raise UnusableFile(
                    f"frame {frame} has this face twice", where=where, fix="give a person column"
                )
            track[frame] = _row(where, line, names)
    except csv.Error as error:
        raise UnusableFile(f"is no CSV table: {error}", where=f"{path}:{table.line_num}") from error
    if not videos:
        raise UnusableFile("holds no faces", where=path)
    return GivenFaces(path, videos)


def _points_of(path: Path, columns: object) -> tuple[str, ...]:
    held = set(columns) if isinstance(columns, (list, tuple)) else set()
    for name in ("frame", *_BOX):
        if name not in held:
            raise UnusableFile(f"has no column {name}", where=path, fix="docs/faces.md shows a table")
    for names in (_THREE, _FIVE):
        if held >= {f"{name}_{axis}" for name in names for axis in "xy"}:
            return names
    raise UnusableFile(
        "has neither brows and nose nor eyes, nose and mouth: a box alone does not say how a face is turned",
        where=path, fix="docs/faces.md shows the columns",
    )  # fmt: skip


def _row(where: str, line: Mapping[str, str | None], names: tuple[str, ...]) -> _Row:
    box = np.array([_number(where, line, name) for name in _BOX])
    if not (box[2] > box[0] and box[3] > box[1]):
        raise UnusableFile("the box is empty: x1 and y1 are its far corner", where=where)
    points = np.array([[_number(where, line, f"{name}_{axis}") for axis in "xy"] for name in names])
    three = points if names == _THREE else _three_of_five(points)
    if not np.ptp(three, axis=0).max() > 0:
        raise UnusableFile("all points lie in one place", where=where)
    left, right, nose = points[:3]
    across, down = right - left, nose - (left + right) / 2
    if across[0] * down[1] < across[1] * down[0]:  # the same however the head is tilted
        raise UnusableFile(
            "the nose lies above the line from the left to the right: left is left in the image",
            where=where, fix=f"the columns {names[0]} and {names[1]} are swapped",
        )  # fmt: skip
    score = _number(where, line, "score") if (line.get("score") or "").strip() else 1.0
    return _Row(box, three, min(max(score, 0.0), 1.0))


def _three_of_five(points: np.ndarray) -> np.ndarray:
    """Brows and the middle of the nose from both eyes and the nose's tip."""
    left, right, tip = points[:3]
    middle, across = (left + right) / 2, right - left
    down = np.array([-across[1], across[0]])
    length = max(float(across @ across), 1e-12)
    out, low = (tip - middle) @ across / length, (tip - middle) @ down / length
    brows = [middle + sign * _BROW[0] * across + _BROW[1] * down for sign in (-1, 1)]
    return np.stack([*brows, middle + _NOSE[0] * out * across + _NOSE[1] * low * down])


def _number(where: str, line: Mapping[str, str | None], name: str) -> float:
    text = line.get(name) or ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < _FARTHEST:
        raise UnusableFile(f"{name} is {text.strip()[:40]!r}, not a number", where=where)
    return value


def _integer(where: str, line: Mapping[str, str | None], name: str, default: int | None = None) -> int:
    text = (line.get(name) or "").strip()
    if not text and default is not None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UnusableFile(f"{name} is {text[:40]!r}, not a number from 0 on", where=where)
    return int(text)
