"""Landmarks of a scene as they are measured -> every frame's, with short gaps filled and points without
jitter.

Everything is symmetric in time, so that nothing lags behind the face: a frame is given out when the frames
are known that may still change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from avatarctl.perception.mesh import Face, alignment_points

__all__ = ["DELAY", "MOST_MISSING", "Smoother", "TrackedFace"]

MOST_MISSING: Final = 12
"""Frames in a row without a face that are filled from both sides: half a second."""

_WEIGHTS: Final = (
    (1.0,),
    (1.0, 0.0),
    (17 / 35, 12 / 35, -3 / 35),
    (7 / 21, 6 / 21, 3 / 21, -2 / 21),
)
"""Of the frame itself, of those next to it, and so on, by how far known frames reach: a parabola is fitted,
so that a head that speeds up is not held back (Savitzky and Golay 1964, quadratic, 3, 5 and 7 points)."""
_REACH: Final = len(_WEIGHTS) - 1

_JUMP: Final = 0.04
"""Of a face's side: a step from frame to frame that is so much longer than those next to it is none that a
head makes. Jump cuts before one background are like that, and what lies behind says nothing of before."""

DELAY: Final = _REACH + 1 + MOST_MISSING
"""Frames from the measurement of a frame to where nothing can change it."""


@dataclass(frozen=True)
class TrackedFace:
    """A face of one frame.

    person:    the same number in all frames of a track.
    box:       float64 [4], x0, y0, x1, y1.
    points:    float64 [3, 2], the brows and the nose that alignment takes, smoothed.
    landmarks: float32 [468, 3], x and y in pixels of the frame, as measured; None where the face came from
               another detector.
    presence:  0..1 by the mesh, or as given.
    seen:      measured in this frame; False where it was filled from its neighbours.
    jumped:    it was elsewhere in the frame before, as at a jump cut; nothing is smoothed across.
    """

    person: int
    box: np.ndarray
    points: np.ndarray
    landmarks: np.ndarray | None
    presence: float
    seen: bool
    jumped: bool = False


class Smoother:
    """One scene: takes frames in order, gives them out `DELAY` frames later."""

    def __init__(self) -> None:
        self._people: dict[int, dict[int, Face]] = {}
        self._jumped: dict[
            tuple[int, int], bool
        ] = {}  # by person and frame, of those that are asked for again
        self._added = 0
        self._given = 0

    def add(self, faces: dict[int, Face]) -> list[list[TrackedFace]]:
        """The faces of the next frame by person -> the frames that are finished with it, none or one."""
        for person, face in faces.items():
            self._people.setdefault(person, {})[self._added] = face
        self._added += 1
        return [self._give()] if self._added - self._given > DELAY else []

    def finish(self) -> list[list[TrackedFace]]:
        """The frames that are left, at the end of the scene."""
        return [self._give() for _ in range(self._added - self._given)]

    def _give(self) -> list[TrackedFace]:
        frame, result = self._given, []
        for person in sorted(self._people):
            face = self._at(person, frame)
            if face is not None:
                seen = frame in self._people[person]
                points, jumped = self._points(person, frame), self._jumps(person, frame)
                result.append(
                    TrackedFace(person, face.box, points, face.landmarks, face.presence, seen, jumped)
                )
        self._given += 1
        self._forget()
        return result

    def _points(self, person: int, frame: int) -> np.ndarray:
        """Half of what reaches on one side only would pull a moving face to that side."""
        middle = self._at(person, frame)
        assert middle is not None
        pairs = []
        for reach in range(1, _REACH + 1):
            before, after = self._at(person, frame - reach), self._at(person, frame + reach)
            if before is None or after is None:
                break
            if self._jumps(person, frame - reach + 1) or self._jumps(person, frame + reach):
                break
            pairs.append(alignment_points(before.landmarks) + alignment_points(after.landmarks))
        own, *others = _WEIGHTS[len(pairs)]
        total = own * alignment_points(middle.landmarks)
        return np.asarray(total + sum(weight * pair for weight, pair in zip(others, pairs, strict=True)))

    def _jumps(self, person: int, frame: int) -> bool:
        """Whether a face is elsewhere from this frame on. What is back a frame later was measured wrong."""
        known = self._jumped.get((person, frame))
        if known is None:
            known = self._jumped[person, frame] = self._measure_jump(person, frame)
        return known

    def _measure_jump(self, person: int, frame: int) -> bool:
        step, before, after = (self._step(person, frame + at) for at in (0, -1, 1))
        near = [each for each in (before, after) if each is not None]
        if step is None or not near:
            return False
        beyond = [step - each for each in near]
        if before is not None and after is not None:
            beyond += [step + after - 2 * before, step + before - 2 * after]
        face = self._at(person, frame)
        least = min(float(np.abs(each).max()) for each in beyond)
        return face is not None and least > _JUMP * face.side

    def _step(self, person: int, frame: int) -> np.ndarray | None:
        """[3, 2]: how far the points came from the frame before."""
        before, face = self._at(person, frame - 1), self._at(person, frame)
        if before is None or face is None:
            return None
        return alignment_points(face.landmarks) - alignment_points(before.landmarks)

    def _at(self, person: int, frame: int) -> Face | None:
        """As measured, or between the measured ones around a short gap."""
        held = self._people[person]
        if frame in held:
            return held[frame]
        if not 0 <= frame < self._added:
            return None
        near = range(1, MOST_MISSING + 1)
        before = next((frame - step for step in near if frame - step in held), None)
        after = next((frame + step for step in near if frame + step in held), None)
        if before is None or after is None or after - before - 1 > MOST_MISSING:
            return None
        share = (frame - before) / (after - before)
        first, second = held[before], held[after]
        landmarks = (1 - share) * first.landmarks + share * second.landmarks
        return Face(landmarks.astype(np.float32), min(first.presence, second.presence))

    def _forget(self) -> None:
        oldest = self._given - _REACH - 1 - MOST_MISSING
        self._jumped = {key: known for key, known in self._jumped.items() if key[1] >= oldest}
        for person in list(self._people):
            held = self._people[person]
            for frame in [frame for frame in held if frame < oldest]:
                del held[frame]
            if not held:
                del self._people[person]
