"""Windows of a source in which somebody's face is to be seen from the first frame to the last."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from avatarctl.data.faces import FacePlan, faces_of
from avatarctl.data.samples import VIDEO
from avatarctl.data.windows import Cutting, RawVideo, Walked, Work
from avatarctl.data.workers import encoding_threads
from avatarctl.errors import UnusableVideo
from avatarctl.media import FittedFrames, Video, fitted_matrix, video_from_array
from avatarctl.media.files import file_sha256
from avatarctl.perception.align import Aligner, after, align, inverse, moved, squeeze
from avatarctl.perception.face_file import FACE_FILE, Clip, FaceFileWriter
from avatarctl.perception.smooth import TrackedFace
from avatarctl.perception.track import FrameFaces

__all__ = ["walk_faces"]

_NAMED: Final = 3
"""Stretches without a face, and frames in which the person changes, that a line names."""
_RECORDED: Final = 100
"""Those that the record of a source has."""


@dataclass(frozen=True)
class _Shown:
    """A frame of a sample, uint8 [h, w, 3]; its face, in pixels of the sample; sample to crop, [2, 3]; how
    far the face came from the frame before, in the source and in its own sides."""

    pixels: np.ndarray
    face: TrackedFace
    matrix: np.ndarray
    step: float = 0.0


@dataclass
class _Run:
    """Frames of one person, one behind the other. next: the first frame of the next window; held: the frames
    from there on; last: the points of the frame before, in the source."""

    next: int
    aligner: Aligner
    length: int = 0
    last: np.ndarray | None = None
    held: list[_Shown] = field(default_factory=list)


def walk_faces(video: Video, work: Work, cutting: Cutting, plan: FacePlan, raw: RawVideo) -> Walked:
    """Windows that begin where somebody's face is found, and again behind a cut, behind frames without it and
    where another person is followed. Stops when there are enough: what lies behind is never decoded.

    Raises UnusableVideo where nobody's face is to be seen for long enough.
    """
    walk = _Walk(video, work, cutting, plan, raw)
    with encoding_threads():
        for pixels, found in faces_of(plan, video, raw.name):
            walk.take(pixels, found)
            if len(walk.walked.windows) == cutting.max_windows:
                break
    return walk.finished()


class _Walk:
    """A source on its way: what is known of its frames so far."""

    def __init__(self, video: Video, work: Work, cutting: Cutting, plan: FacePlan, raw: RawVideo) -> None:
        self.walked = Walked(people=[] if plan.people == "all" else None)
        self._work, self._cutting, self._plan, self._raw = work, cutting, plan, raw
        self._detector = plan.detector(raw.name)
        self._show: _Aligned | _Whole = _Aligned(plan.resolution) if plan.aligned else _Whole(video, cutting)
        self._runs: dict[int, _Run] = {}
        self._looked = self._with_face = self._longest = 0
        self._without: list[list[int]] = []
        self._switches: list[int] = []
        self._doubts: list[list[float]] = []  # of each window: least presence, filled frames, longest step
        self._person: int | None = None

    def take(self, pixels: np.ndarray, found: FrameFaces) -> None:
        """The next frame of the source."""
        number = found.frame
        if found.starts_scene:
            self._runs.clear()
            self._person = None
            if number:
                self.walked.cuts.append(number)
        if isinstance(self._show, _Whole) and self._cutting.references:
            self._work.look(number, [self._show.frame(pixels)])
        runs: dict[int, _Run] = {}
        for face in found.faces:
            run = self._runs.get(face.person) or _Run(number, Aligner(self._plan.resolution))
            if face.jumped:
                run.aligner.reset()
            shown = self._show.face(pixels, face, run.aligner)
            if shown is not None:
                runs[face.person] = run
                self._go_on(run, number, replace(shown, step=_step(run.last, face)))
                run.last = face.points
        self._runs = runs
        if self._plan.people == "largest" and found.faces:
            person = found.faces[0].person
            if self._person not in (None, person):
                self._switches.append(number)
            self._person = person
        self._count(number, bool(runs))

    def _go_on(self, run: _Run, number: int, shown: _Shown) -> None:
        if self._plan.aligned:
            self._work.look(number, [shown.pixels])
        run.length += 1
        self._longest = max(self._longest, run.length)
        if number >= run.next:
            run.held.append(shown)
        if len(run.held) == self._cutting.window:
            self._write(run)
            run.next += self._cutting.stride
            del run.held[: self._cutting.stride]

    def _write(self, run: _Run) -> None:
        if len(self.walked.windows) == self._cutting.max_windows:
            return  # of two people in one frame the second
        frames = np.stack([each.pixels for each in run.held])
        person = None
        if self.walked.people is not None:
            person = run.held[0].face.person
            self.walked.people.append(person)
        self.walked.windows.append(run.next)
        self._doubts.append(
            [
                round(min(each.face.presence for each in run.held), 3),
                sum(not each.face.seen for each in run.held),
                round(max(each.step for each in run.held), 3),
            ]
        )
        self._work.write(run.next, frames, person, self._beside(run))

    def _beside(self, run: _Run) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            height, width = run.held[0].pixels.shape[:2]
            clip = Clip(file_sha256(folder / VIDEO), len(run.held), width, height)
            writer = FaceFileWriter(folder / FACE_FILE, clip, self._plan.resolution, self._detector)
            with writer:
                for place, each in enumerate(run.held):
                    writer.add(each.face, starts_scene=place == 0, matrix=each.matrix)
                writer.close()

        return write

    def _count(self, number: int, with_face: bool) -> None:
        self._looked += 1
        self._with_face += with_face
        if with_face:
            return
        if self._without and self._without[-1][1] == number:
            self._without[-1][1] = number + 1
        else:
            self._without.append([number, number + 1])

    def finished(self) -> Walked:
        walked = self.walked
        if not walked.windows:
            raise self._problem()
        share = self._with_face / self._looked
        walked.faces = {
            "share": round(share, 4),
            "looked_at": self._looked,
            "without": self._without[:_RECORDED],
            "switches": self._switches[:_RECORDED],
            "doubts": self._doubts,
            "detector": self._detector,
        }
        if self._switches:
            named = ", ".join(map(str, self._switches[:_NAMED]))
            more = len(self._switches) - _NAMED
            walked.notes.append(
                f"without a cut the face jumps, or another person's is followed, at frame {named}"
                f"{f' and {more} more' if more > 0 else ''}; there are samples of both"
            )
        if self._without:
            named = ", ".join(f"{first} to {last - 1}" for first, last in self._without[:_NAMED])
            more = len(self._without) - _NAMED
            walked.notes.append(
                f"no face in {self._looked - self._with_face} of {self._looked} frames ({named}"
                f"{f' and {more} more stretches' if more > 0 else ''}); no sample is cut there"
            )
        return walked

    def _problem(self) -> UnusableVideo:
        if not self._with_face:
            fix = "--faces none takes videos as they are: faces aligned already, or drawn ones"
            if self._plan.table is not None:
                fix = "frames count from 0 at 25 a second, boxes are in pixels of the frame"
            return UnusableVideo("shows no face", where=self._raw.video, fix=fix)
        return UnusableVideo(
            f"a face is to be seen for {_frames(self._longest)} at most, and a window has "
            f"{self._cutting.window} ({_frames(self._looked)} at 25 a second, {len(self.walked.cuts)} cuts)",
            where=self._raw.video, fix="give a smaller --window",
        )  # fmt: skip


class _Whole:
    """Samples that show the whole frame, as large as they are to be."""

    def __init__(self, video: Video, cutting: Cutting) -> None:
        self._cutting = cutting
        self._matrix = fitted_matrix(video.height, video.width, cutting.size, cutting.fit)
        self._last: tuple[np.ndarray, np.ndarray] | None = None

    def frame(self, pixels: np.ndarray) -> np.ndarray:
        if self._last is None or self._last[0] is not pixels:  # several faces are in one frame
            reader = video_from_array(pixels[None], "a frame")
            fitted = FittedFrames(reader, self._cutting.size, self._cutting.fit).read(0, 1)[0]
            self._last = (pixels, fitted)
        return self._last[1]

    def face(self, pixels: np.ndarray, face: TrackedFace, aligner: Aligner) -> _Shown | None:
        """None for a face whose middle was cut off."""
        there = _moved(face, self._matrix)
        x, y = (there.box[:2] + there.box[2:]) / 2
        if not (0 <= x < self._cutting.size[1] and 0 <= y < self._cutting.size[0]):
            return None
        return _Shown(self.frame(pixels), there, aligner.fit(there.points))


class _Aligned:
    """Samples that show the aligned face."""

    def __init__(self, resolution: int) -> None:
        self._resolution = resolution
        self._squeeze = squeeze(resolution)
        self._back = inverse(self._squeeze).astype(np.float32)

    def face(self, pixels: np.ndarray, face: TrackedFace, aligner: Aligner) -> _Shown:
        matrix = aligner.fit(face.points)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        made = align(image, torch.from_numpy(matrix)[None], self._resolution)[0]
        shown = (made * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        return _Shown(shown, _moved(face, after(self._squeeze, matrix)), self._back)


def _step(before: np.ndarray | None, face: TrackedFace) -> float:
    side = float((face.box[2:] - face.box[:2]).max())
    return 0.0 if before is None or side <= 0 else float(np.abs(face.points - before).max()) / side


def _frames(count: int) -> str:
    return f"{count} frame{'' if count == 1 else 's'}"


def _moved(face: TrackedFace, matrix: np.ndarray) -> TrackedFace:
    """A face in the pixels of another frame."""
    x0, y0, x1, y1 = face.box
    corners = np.array([(x0, y0), (x1, y0), (x0, y1), (x1, y1)])
    landmarks = face.landmarks
    if landmarks is not None:
        scale = math.sqrt(abs(float(np.linalg.det(matrix[:, :2]))))
        flat = moved(landmarks[:, :2], matrix)
        landmarks = np.hstack([flat, landmarks[:, 2:] * scale]).astype(np.float32)
    around = moved(corners, matrix) if landmarks is None else landmarks[:, :2].astype(np.float64)
    box = np.concatenate([around.min(0), around.max(0)])
    return replace(face, box=box, points=moved(face.points, matrix), landmarks=landmarks)
