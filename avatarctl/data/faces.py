"""Whom samples are cut around: `data.faces` as a plan, and the faces of a source, frame by frame.

Faces are looked for on the CPU, in one thread, in whatever process reads the source: neither a card nor the
number of processes changes a sample.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from avatarctl.config import RunConfig
from avatarctl.errors import UsageError
from avatarctl.family import TrainableFamily
from avatarctl.files.named_path import expanded
from avatarctl.media.cuts import LOOKAHEAD, CutFinder
from avatarctl.media.files import file_sha256
from avatarctl.perception.face_file import VERSION
from avatarctl.perception.given import GivenFaces, read_given_faces

if TYPE_CHECKING:
    from avatarctl.media import Video
    from avatarctl.models.face_networks import FaceNetworks
    from avatarctl.perception.detect import Look
    from avatarctl.perception.track import FrameFaces, People

__all__ = ["FacePlan", "cpu_networks", "face_plan", "faces_of"]

_WHOLE_FRAME: Final = 256
"""Pixels of the aligned face that a whole frame is mapped to: what judges of sync look at
(spec/losses-and-eval.md 1.3)."""
_PIECE: Final = 4
"""Frames that are read at a time."""


@dataclass(frozen=True)
class FacePlan:
    """people: whose samples; aligned: they show the aligned face, `resolution` pixels square, else the frame,
    with a map to the face. table: faces of another detector, and the SHA-256 of its bytes. look: how far
    faces are searched for where there is no table."""

    people: People
    aligned: bool
    resolution: int
    table: tuple[Path, str] | None = None
    look: Look = "near"

    def facts(self, video: str) -> list[object]:
        """What samples of a video depend on. Raises UnusableFile where the table does not name it."""
        facts = ["faces", VERSION, self.people, self.aligned, self.resolution, self.detector(video)]
        return facts if self.table is not None else [*facts, self.look]

    def detector(self, video: str) -> str:
        """Who found the faces of a video: the networks, or what the table says of it."""
        if self.table is not None:
            return f"table-{_table(*self.table).digest(video)[:12]}"
        from avatarctl.loading.faces import networks_identity

        return networks_identity()


def face_plan(cfg: RunConfig, family: TrainableFamily) -> FacePlan | None:
    """What `data.faces` asks for; None for `none`, and for a row that says nothing.

    Raises UsageError for settings without sense, PathNotFound and UnusableFile for a table.
    """
    data, faces = cfg.data, cfg.data.faces
    if faces in (None, "none"):
        return None
    assert faces is not None and data.width is not None and data.height is not None
    aligned = family.takes(cfg) == "video"
    if aligned and data.width != data.height:
        raise UsageError(
            f"samples of this model are aligned faces, which are square, and not {data.width}x{data.height}",
            where="data.faces", fix=f"--size {data.height}x{data.height}, or --faces none",
        )  # fmt: skip
    if faces == "all" and data.references:
        raise UsageError(
            "frames elsewhere may show other people", where="data.references", fix="--faces auto"
        )
    table = None
    if faces not in ("auto", "all"):
        path = expanded(faces)
        table = (path, file_sha256(path)) if path.is_file() else (path, "")
        _table(*table)
    people: People = "all" if faces == "all" else "largest"
    resolution = data.width if aligned else _WHOLE_FRAME
    return FacePlan(people, aligned, resolution, table, data.face_look)


def faces_of(plan: FacePlan, video: Video, name: str) -> Iterator[tuple[np.ndarray, FrameFaces]]:
    """Every frame of a video, uint8 [H, W, 3], with its faces, in order; as many frames are held as a tracker
    is late. Raises what reading raises, UnusableFile for a table of another video."""
    from avatarctl.perception.track import FaceTracker

    finder: FaceTracker | _Given
    if plan.table is None:
        finder = FaceTracker(cpu_networks(), people=plan.people, look=plan.look)
    else:
        finder = _Given(_table(*plan.table), name, video.frames)
    waiting: deque[np.ndarray] = deque()
    for start in range(0, video.frames, _PIECE):
        piece = video.read(start, min(start + _PIECE, video.frames))
        waiting.extend(piece)
        for each in finder.push(piece):
            yield waiting.popleft(), each
    for each in finder.finish():
        yield waiting.popleft(), each


class _Given:
    """Faces of a table, as a `FaceTracker` gives those that it finds."""

    def __init__(self, given: GivenFaces, video: str, frames: int) -> None:
        self._cuts = CutFinder()
        self._track = given.follow(video, frames)
        self._pushed = self._given = 0

    def push(self, frames: np.ndarray) -> list[FrameFaces]:
        result = []
        for frame in frames:
            begins = self._cuts.look(frame)
            self._pushed += 1
            if self._pushed > LOOKAHEAD:
                result.append(self._next(begins))
        return result

    def finish(self) -> list[FrameFaces]:
        return [self._next(begins) for begins in self._cuts.rest()]

    def _next(self, begins: bool) -> FrameFaces:
        from avatarctl.perception.track import FrameFaces

        face, number = next(self._track), self._given
        self._given += 1
        return FrameFaces(number, begins or number == 0, () if face is None else (face,))


@functools.cache
def cpu_networks() -> FaceNetworks:
    """The networks that find faces, loaded once in each process."""
    import torch

    from avatarctl.loading.faces import face_networks

    return face_networks(torch.device("cpu"))


@functools.lru_cache(maxsize=1)
def _table(path: Path, digest: str) -> GivenFaces:
    """Read once in each process. digest: of its bytes, so that a changed one is read anew."""
    return read_given_faces(path)
