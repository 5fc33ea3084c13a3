"""The faces of a video, frame by frame: found once, then followed by the mesh, whose region in a frame comes
from the points of the frame before (spec/face-models.md 6).

Frames come in pieces of any length and are not kept but for the two that tell a cut from a flash and the one
before; memory does not depend on the video's length.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from avatarctl.media.cuts import LOOKAHEAD, CutFinder
from avatarctl.models.face_networks import FaceNetworks
from avatarctl.perception.crops import Region
from avatarctl.perception.detect import Detection, Look, look_again, overlap
from avatarctl.perception.mesh import PRESENCE, Face, find_faces, mesh, mesh_twice, region_of_landmarks
from avatarctl.perception.smooth import MOST_MISSING, Smoother, TrackedFace

__all__ = ["FaceTracker", "FrameFaces", "People", "track_faces"]

People = Literal["largest", "all"]

LOOK_EVERY: Final = 5
"""Frames between two searches while nobody is there."""
SEARCH_EVERY: Final = 25
"""Frames between two searches with tiles while nobody is there, between two for people who come in, and
between two checks by the detector of a face that is followed."""

_NEW_SHARE: Final = 0.5
"""Of the last measurement in the next region."""
_NEW_SPEED: Final = 0.25
"""Of what a prediction was off by in the speed of the next one."""
_SETTLING: Final = 4
"""Passes of the mesh over a face that is new, until its region is as that of a face that is followed."""
_OFF: Final = 0.03
"""Of a region's side: what a prediction may be off by until the mesh looks again, from the right place."""
_NEAR: Final = 0.5
_DRIFT: Final = 0.1
_FARTHEST: Final = 2.0
"""Sides of a face from where it was lost to where it may be found again as the same: at once, more with each
frame, at most. Who sits beside a person that leaves is somebody else."""
_SAME_FACE: Final = 0.5
_MISSED: Final = 75
"""Frames for which everybody who was lost is looked for: 3 s. Who comes later has a new number."""


@dataclass(frozen=True)
class FrameFaces:
    """frame: counted from 0; starts_scene: it is the first one behind a cut, or of the video."""

    frame: int
    starts_scene: bool
    faces: tuple[TrackedFace, ...]


@dataclass
class _Followed:
    """A person who is followed, or was.

    face: the last one that was measured; region: around it, low-passed; speed: of its centre, pixels a frame;
    checked: the frame in which the detector last saw it, or in which it was lost.
    """

    person: int
    face: Face
    region: Region
    checked: int
    speed: tuple[float, float] | None = None

    @property
    def predicted(self) -> Region:
        """Where the face should be in the next frame."""
        x, y = self.speed or (0.0, 0.0)
        return self.region._replace(x=self.region.x + x, y=self.region.y + y)

    def move(self, face: Face) -> None:
        """To the face of the next frame."""
        new, old = region_of_landmarks(face.landmarks), self.predicted
        off = (new.x - old.x, new.y - old.y)
        share = 1.0 if _off(old, face) > _OFF else _NEW_SHARE
        if self.speed is not None and max(map(abs, off)) > _OFF * old.side:
            self.speed = None  # it jumped, and how it moves there nobody knows yet
        else:
            gain = 1.0 if self.speed is None else _NEW_SPEED
            x, y = self.speed or (0.0, 0.0)
            self.speed = (x + gain * off[0], y + gain * off[1])
        self.region = _towards(old, new, share)
        self.face = face


def _towards(old: Region, new: Region, share: float) -> Region:
    """A share of the way from one region to another."""
    return Region(
        old.x + share * (new.x - old.x),
        old.y + share * (new.y - old.y),
        old.side + share * (new.side - old.side),
        old.angle + share * math.remainder(new.angle - old.angle, math.tau),
    )


def _off(region: Region, face: Face) -> float:
    """How far a face lies from the middle of the region that it was measured in, is larger, or is turned."""
    new = region_of_landmarks(face.landmarks)
    moved = max(abs(new.x - region.x), abs(new.y - region.y)) / region.side
    turned = abs(math.remainder(new.angle - region.angle, math.tau))
    return max(moved, turned, abs(new.side / region.side - 1))


class FaceTracker:
    """Follows one face of each scene, or everybody.

    people: "largest" gives at most one face a frame: who is the largest where a scene first shows anybody,
    and is followed until lost for longer than a gap that is filled; then the largest there is. "all" gives
    everybody's. A person keeps a number until a cut, also through a gap, if found again near to where the gap
    began. Nobody is recognised: behind a cut all are new; for "largest" numbers begin with 0 again.
    look: how far a search goes when a look at the whole frame finds nothing ("largest"), or always ("all").
    """

    def __init__(self, networks: FaceNetworks, *, people: People = "largest", look: Look = "near") -> None:
        self._networks, self._people, self._look = networks, people, look
        self._cuts = CutFinder()
        self._waiting: deque[np.ndarray] = deque()
        self._measured = self._given = 0
        self._named = 0
        self._smoother = Smoother()
        self._starts = {0}
        self._begin_scene()

    def push(self, frames: np.ndarray) -> list[FrameFaces]:
        """uint8 [n, H, W, 3], the next frames -> those that are finished, in order, some frames later."""
        result = []
        for frame in frames:
            begins = self._cuts.look(frame)
            self._waiting.append(np.array(frame))
            if len(self._waiting) > LOOKAHEAD:
                result += self._take(self._waiting.popleft(), begins)
        return result

    def finish(self) -> list[FrameFaces]:
        """The rest, at the end of the video."""
        result = []
        for begins in self._cuts.rest():
            result += self._take(self._waiting.popleft(), begins)
        return result + self._numbered(self._smoother.finish())

    def _take(self, frame: np.ndarray, begins: bool) -> list[FrameFaces]:
        result = []
        if begins:
            result = self._numbered(self._smoother.finish())
            self._smoother = Smoother()
            self._starts.add(self._measured)
            self._begin_scene()
        self._follow(frame)
        self._check(frame)
        self._search(frame)
        # A face that is followed was measured in this frame: lost ones are no longer among them.
        faces = {each.person: each.face for each in self._followed}
        self._measured += 1
        self._before = frame
        return result + self._numbered(self._smoother.add(faces))

    def _numbered(self, frames: list[list[TrackedFace]]) -> list[FrameFaces]:
        result = []
        for faces in frames:
            starts = self._given in self._starts
            self._starts.discard(self._given)
            result.append(FrameFaces(self._given, starts, tuple(faces)))
            self._given += 1
        return result

    def _begin_scene(self) -> None:
        self._followed: list[_Followed] = []
        self._lost: list[_Followed] = []
        self._others: list[Face] = []
        self._searched = self._searched_far = -SEARCH_EVERY + self._measured

    def _follow(self, frame: np.ndarray) -> None:
        """The mesh of everybody, where they should be by the frames before."""
        kept: list[_Followed] = []
        for each, face in zip(self._followed, self._meshes(frame), strict=True):
            alone = not kept or overlap(face.box, np.stack([k.face.box for k in kept])).max() < _SAME_FACE
            if face.presence >= PRESENCE and _inside(face, frame) and alone:
                each.move(face)
                kept.append(each)
            elif alone:
                self._lose(each)
        self._followed = kept

    def _meshes(self, frame: np.ndarray) -> list[Face]:
        """A face beside the middle of its region is measured a little wrong: where it moved in another way
        than before, or nobody knows yet how it moves, it is measured twice."""
        regions = [each.predicted for each in self._followed]
        faces = mesh(self._networks, frame, regions)
        again = [
            number
            for number, (region, face) in enumerate(zip(regions, faces, strict=True))
            if face.presence >= PRESENCE
            and (self._followed[number].speed is None or _off(region, face) > _OFF)
        ]
        second = mesh(
            self._networks, frame, [region_of_landmarks(faces[number].landmarks) for number in again]
        )
        for number, face in zip(again, second, strict=True):
            faces[number] = face
        return faces

    def _lose(self, each: _Followed) -> None:
        each.checked = self._measured
        self._lost.append(each)
        self._searched = -SEARCH_EVERY + self._measured  # look in this very frame

    def _check(self, frame: np.ndarray) -> None:
        """Whether the detector still sees who was followed for a while: the mesh alone may settle on what is
        no face."""
        due = [each for each in self._followed if self._measured - each.checked >= SEARCH_EVERY]
        proposals = [Detection(1.0, each.face.box, np.zeros((6, 2))) for each in due]
        for each, seen in zip(due, look_again(self._networks, frame, proposals), strict=True):
            each.checked = self._measured
            if seen is None:
                self._followed.remove(each)
                self._lose(each)

    def _near(self, frame: np.ndarray) -> list[Face]:
        """Who was lost a moment ago and is back in that place: a look at it costs little, so that a face that
        was covered is found in the frame in which it shows again."""
        lately = [each for each in self._lost if self._measured - each.checked <= MOST_MISSING]
        proposals = [Detection(1.0, each.face.box, np.zeros((6, 2))) for each in lately]
        seen = look_again(self._networks, frame, proposals)
        return mesh_twice(self._networks, frame, [each for each in seen if each is not None])

    def _search(self, frame: np.ndarray) -> None:
        if self._people == "all":
            self._lost = [each for each in self._lost if self._measured - each.checked <= _MISSED]
        if self._lost:
            self._welcome(frame, self._near(frame))
        waited, waited_far = self._measured - self._searched, self._measured - self._searched_far
        far = waited_far >= SEARCH_EVERY
        if self._people == "largest":
            if self._followed or waited < LOOK_EVERY:
                return
            found = find_faces(self._networks, frame)
            if not found and far and self._look != "whole":
                found = find_faces(self._networks, frame, self._look)
        else:
            missing = not self._followed or bool(self._lost)
            if not far and not (missing and waited >= LOOK_EVERY):
                return
            found = find_faces(self._networks, frame, self._look if far else "whole")
        self._searched = self._measured
        if far:
            self._searched_far = self._measured
        self._welcome(frame, found)

    def _welcome(self, frame: np.ndarray, found: list[Face]) -> None:
        """Those of the found faces that nobody follows yet: who was lost near by, or somebody new."""
        if self._people == "largest":
            found = self._of_the_one(found)[:1]
        if self._followed and found:
            boxes = np.stack([each.face.box for each in self._followed])
            found = [face for face in found if overlap(face.box, boxes).max() < _SAME_FACE / 2]
        new = [_Followed(-1, face, region_of_landmarks(face.landmarks), self._measured) for face in found]
        for _ in range(_SETTLING):
            for each, face in zip(
                new, mesh(self._networks, frame, [each.region for each in new]), strict=True
            ):
                each.face = face
                each.region = _towards(each.region, region_of_landmarks(face.landmarks), _NEW_SHARE)
        for each in new:
            if each.face.presence >= PRESENCE and _inside(each.face, frame):
                each.person = self._person(each.face)
                self._followed.append(each)

    def _of_the_one(self, found: list[Face]) -> list[Face]:
        """While the gap may still be filled only who was lost: whoever sits beside a face that is hidden for
        a moment was to be seen when it was lost. Who shows in that frame where nobody was in the one before
        has jumped there."""
        lost = self._lost[-1] if self._lost else None
        if lost is None or self._measured - lost.checked > MOST_MISSING:
            return found
        again = [face for face in found if self._may_be(face, lost)]
        if again or not found or self._measured > lost.checked:
            return again
        places = [Detection(1.0, face.box, np.zeros((6, 2))) for face in found]
        before = look_again(self._networks, self._before, places)
        self._others = [face for face, seen in zip(found, before, strict=True) if seen is not None]
        return [face for face, seen in zip(found, before, strict=True) if seen is None]

    def _person(self, face: Face) -> int:
        if self._people == "largest":
            before = self._lost[-1] if self._lost else None
            person = 0 if before is None else before.person + (not self._may_be(face, before))
            self._lost.clear()
            self._others.clear()
            return person
        near = [lost for lost in self._lost if self._may_be(face, lost)]
        if near:
            chosen = min(near, key=lambda lost: _apart(face, lost.face))
            self._lost.remove(chosen)
            return chosen.person
        self._named += 1
        return self._named - 1

    def _may_be(self, face: Face, lost: _Followed) -> bool:
        """Whether a face that is found may be the one that was lost: near to it, and of about its size;
        not who sat beside it then."""
        reach = min(_FARTHEST, _NEAR + _DRIFT * (self._measured - lost.checked))
        apart = _apart(face, lost.face)
        near = apart <= reach * lost.face.side
        near = near and all(apart < _apart(face, other) for other in self._others)
        return near and 0.5 <= face.side / max(lost.face.side, 1e-6) <= 2


def _inside(face: Face, frame: np.ndarray) -> bool:
    """Whether the middle of a face lies in the frame: what has left it is made up."""
    (x, y), (height, width) = (face.box[:2] + face.box[2:]) / 2, frame.shape[:2]
    return bool(0 <= x < width and 0 <= y < height and face.side >= 4)


def _apart(one: Face, other: Face) -> float:
    return float(np.abs((one.box[:2] + one.box[2:]) / 2 - (other.box[:2] + other.box[2:]) / 2).max())


def track_faces(
    networks: FaceNetworks,
    pieces: Iterable[np.ndarray],
    *,
    people: People = "largest",
    look: Look = "near",
) -> Iterator[FrameFaces]:
    """Pieces of a video, uint8 [n, H, W, 3], in order -> every frame of it, in order; see `FaceTracker`."""
    tracker = FaceTracker(networks, people=people, look=look)
    for piece in pieces:
        yield from tracker.push(piece)
    yield from tracker.finish()
