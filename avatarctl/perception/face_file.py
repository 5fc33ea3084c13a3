"""`face.safetensors`: for every frame of a clip where its face is and how it becomes an aligned one.

Tensors, n frames: `matrices` F32 [n, 2, 3] frame to crop, counting from pixel centres; `points` F32 [n, 3, 2]
the smoothed points that they were fitted to; `boxes` F32 [n, 4]; `presence` F32 [n]; `found`, `seen`,
`starts` U8 [n]; `landmarks` F32 [n, 468, 3] where a mesh was. The metadata say which video this is, of which
detector, and by which version of the algorithm. Frames without a face have the matrix and points of the
nearest frame with one, `found` 0, and zeros elsewhere.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import numpy as np

from avatarctl.atomic import disk_errors
from avatarctl.errors import UnusableFile, UnusableVideo
from avatarctl.files.finite import nonfinite
from avatarctl.files.safetensors_file import read_header
from avatarctl.files.tensors import ArrayTensor, FileTensor, StoredTensor, TensorInfo, read_whole
from avatarctl.files.writer import write_safetensors
from avatarctl.models.face_networks import MESH_POINTS
from avatarctl.perception.align import Aligner, crop_size
from avatarctl.perception.smooth import TrackedFace

__all__ = ["FACE_FILE", "VERSION", "Clip", "FaceFile", "FaceFileWriter", "read_face_file"]

FACE_FILE: Final = "face.safetensors"
VERSION: Final = 2
"""Of tracking, smoothing and alignment together; one more makes all files again."""

_KEY: Final = "avatarctl.faces"
_ROW: Final = MESH_POINTS * 3


@dataclass(frozen=True)
class Clip:
    """The video that a file belongs to: its SHA-256, its frames at 25 a second, its size in pixels."""

    sha256: str
    frames: int
    width: int
    height: int


class FaceFileWriter:
    """Takes one face a frame, in order, and writes the file when closed; landmarks wait on the disk.

    smooth: as of `Aligner`. Nothing is written where `close` is not reached.
    """

    def __init__(
        self, path: Path, clip: Clip, resolution: int, detector: str, *, smooth: bool = True
    ) -> None:
        self._path, self._clip, self._detector = path, clip, detector
        self._aligner = Aligner(resolution, smooth=smooth)
        self._rows: list[tuple[np.ndarray, ...]] = []
        self._flags: list[tuple[bool, bool, bool]] = []
        with disk_errors(path):
            self._spool: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 see __exit__
        self._landmarks = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.close()

    def add(
        self, face: TrackedFace | None, *, starts_scene: bool = False, matrix: np.ndarray | None = None
    ) -> np.ndarray | None:
        """The next frame's face, if it has one; its matrix, float32 [2, 3], frame to crop.

        matrix: where it is known already, as in a clip out of the middle of a video; else it is fitted.
        """
        lost = not self._flags or not self._flags[-1][0]
        if starts_scene or lost or (face is not None and face.jumped):
            self._aligner.reset()
        self._flags.append((face is not None, face is not None and face.seen, starts_scene))
        points, box, presence = np.zeros((3, 2)), np.zeros(4), 0.0
        landmarks = np.zeros((MESH_POINTS, 3), np.float32)
        if face is not None:
            matrix = self._aligner.fit(face.points) if matrix is None else matrix
            points, box, presence = face.points, face.box, face.presence
            if face.landmarks is None:
                self._landmarks = False
            else:
                landmarks = face.landmarks
        row = (np.zeros((2, 3)) if face is None else matrix, points, box, presence)
        self._rows.append(tuple(np.asarray(each, np.float32) for each in row))
        if self._landmarks:
            with disk_errors(self._path):
                self._spool.write(np.ascontiguousarray(landmarks, "<f4").tobytes())
        return matrix if face is not None else None

    @property
    def share(self) -> float:
        """Of the frames so far that have a face."""
        return sum(found for found, _, _ in self._flags) / max(len(self._flags), 1)

    def close(self) -> FaceFile:
        """Writes the file. Raises UnusableVideo where no frame has a face, ValueError for another number of
        frames than the clip's, and what `write_safetensors` raises."""
        count = len(self._flags)
        if count != self._clip.frames:
            raise ValueError(f"{count} frames were given of {self._clip.frames}")
        flags = np.array(self._flags, np.uint8).reshape(-1, 3)
        found = np.flatnonzero(flags[:, 0])
        if not len(found):
            raise UnusableVideo("shows no face", where=self._path.parent)
        matrices, points, boxes, presence = (np.stack(column) for column in zip(*self._rows, strict=True))
        nearest = _nearest(found, count)
        tensors: dict[str, StoredTensor] = {
            "matrices": ArrayTensor(matrices[nearest], "F32"),
            "points": ArrayTensor(points[nearest], "F32"),
            "boxes": ArrayTensor(boxes, "F32"),
            "presence": ArrayTensor(presence, "F32"),
            **{
                name: ArrayTensor(flags[:, n].copy(), "U8")
                for n, name in enumerate(("found", "seen", "starts"))
            },
        }
        if self._landmarks:
            tensors["landmarks"] = _Spooled(self._spool, count)
        facts = {
            "version": VERSION, **asdict(self._clip), "resolution": self._aligner.resolution,
            "crop": crop_size(self._aligner.resolution), "detector": self._detector,
        }  # fmt: skip
        write_safetensors(self._path, tensors, {_KEY: json.dumps(facts)})
        return read_face_file(self._path, self._clip)


def _nearest(found: np.ndarray, count: int) -> np.ndarray:
    """[count]: of each frame the nearest of `found`, the earlier one of two."""
    places = np.arange(count)
    after = np.clip(np.searchsorted(found, places), 0, len(found) - 1)
    before = np.clip(after - 1, 0, None)
    nearer = np.abs(found[before] - places) <= np.abs(found[after] - places)
    return np.where(nearer, found[before], found[after])


@dataclass(frozen=True)
class _Spooled:
    """Landmarks of all frames, in a file that has no name."""

    file: IO[bytes]
    frames: int

    @property
    def info(self) -> TensorInfo:
        return TensorInfo("F32", (self.frames, MESH_POINTS, 3))

    def read(self, start: int, stop: int) -> np.ndarray:
        self.file.seek(start * 4)
        return np.frombuffer(self.file.read((stop - start) * 4), "<f4").copy()


@dataclass(frozen=True)
class FaceFile:
    """What a file holds. Small tensors are in memory, landmarks are read when asked for.

    matrices: float32 [n, 2, 3]; points: [n, 3, 2]; boxes: [n, 4]; presence: [n]; found, seen, starts: bool
    [n], see the module. facts: resolution, detector, version and the clip's, as in the header.
    """

    path: Path
    facts: dict[str, Any]
    matrices: np.ndarray
    points: np.ndarray
    boxes: np.ndarray
    presence: np.ndarray
    found: np.ndarray
    seen: np.ndarray
    starts: np.ndarray
    stored_landmarks: FileTensor | None

    @property
    def resolution(self) -> int:
        return int(self.facts["resolution"])

    @property
    def share(self) -> float:
        """Of the frames that have a face."""
        return float(self.found.mean())

    def landmarks(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, 468, 3]; zeros where no face was found.

        Raises UnusableFile where the faces came without a mesh, or the file has changed.
        """
        if self.stored_landmarks is None:
            raise UnusableFile("holds no landmarks: its faces came without a mesh", where=self.path)
        read = self.stored_landmarks.read(start * _ROW, stop * _ROW)
        return read.reshape(-1, MESH_POINTS, 3)


def read_face_file(path: Path, clip: Clip | None = None) -> FaceFile:
    """Reads and checks a file; `clip` is the video that it has to belong to.

    Raises PathNotFound, UnusableFile for a file of another clip, size or length, of another version, with
    numbers that are not finite, or that is none of these files.
    """
    header = read_header(path)
    facts = _facts(header.metadata.get(_KEY), path)
    if clip is not None:
        _same_clip(facts, clip, path)
    count = facts["frames"]
    shapes = {"matrices": (count, 2, 3), "points": (count, 3, 2), "boxes": (count, 4), "presence": (count,)}
    flags = ("found", "seen", "starts")
    arrays = {}
    for name, shape, dtype in (
        *((name, shape, "F32") for name, shape in shapes.items()),
        *((name, (count,), "U8") for name in flags),
    ):
        arrays[name] = _checked(path, header.tensors.get(name), name, shape, dtype)
    if (landmarks := header.tensors.get("landmarks")) is not None:
        _checked(path, landmarks, "landmarks", (count, MESH_POINTS, 3), "F32", read=False)
        for start in range(0, count, 1024):
            stop = min(count, start + 1024)
            _refuse_nonfinite(path, "landmarks", landmarks.read(start * _ROW, stop * _ROW))
    if not np.all(np.abs(np.linalg.det(arrays["matrices"][:, :, :2].astype(np.float64))) > 1e-9):
        raise UnusableFile("holds a matrix that maps a face to nothing", where=path)
    arrays.update({name: arrays[name] > 0 for name in flags})
    return FaceFile(path, facts, **arrays, stored_landmarks=landmarks)


def _facts(text: str | None, path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(text or "")
    except ValueError:
        facts = None
    numbers = ("version", "frames", "width", "height", "resolution")
    whole = isinstance(facts, dict) and all(type(facts.get(name)) is int for name in numbers)
    if not whole or min(facts[name] for name in numbers) < 1 or not isinstance(facts.get("sha256"), str):
        raise UnusableFile("says nothing of the clip whose faces it maps", where=path, fix="make it again")
    if facts["version"] != VERSION:
        raise UnusableFile(
            f"is of version {facts['version']}, {VERSION} is read here", where=path, fix="make it again"
        )
    return dict(facts)


def _same_clip(facts: dict[str, Any], clip: Clip, path: Path) -> None:
    if facts["frames"] != clip.frames:
        raise UnusableFile(
            f"has {facts['frames']} frames, the clip has {clip.frames}", where=path, fix="make it again"
        )
    if (facts["width"], facts["height"]) != (clip.width, clip.height) or facts["sha256"] != clip.sha256:
        raise UnusableFile("belongs to another clip", where=path, fix="make it again")


def _checked(
    path: Path,
    tensor: FileTensor | None,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    *,
    read: bool = True,
) -> np.ndarray:
    expected = TensorInfo(dtype, shape)
    if tensor is None or tensor.info != expected:
        held = "missing" if tensor is None else str(tensor.info)
        raise UnusableFile(f"{name} is {held}, {expected} is needed", where=path)
    values = read_whole(tensor).reshape(shape) if read else np.empty(0)
    if dtype == "F32":
        _refuse_nonfinite(path, name, values)
    return values


def _refuse_nonfinite(path: Path, name: str, values: np.ndarray) -> None:
    if values.size and nonfinite(values.reshape(-1), "F32"):
        raise UnusableFile(f"{name} holds numbers that are not finite (NaN or Inf)", where=path)
