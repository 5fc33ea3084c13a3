"""Faces of the cartoon world: drawn from a seed, every frame from parameters alone (spec/cartoon-world.md 1).

Image coordinates run from 0 to 1, x to the right and y down; lengths and distances are in them. Time is in
pixel frames of 1/25 s. Everything is a signed distance with a soft edge of 1.5 pixels, painted back to front.

Lips, nose and skin of a face share one red value, and the inside of every mouth has the same red. So red
alone tells how far a mouth is open (demo/mouth_meter.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from avatarctl.timeline import FPS

__all__ = ["INSIDE_RED", "SIZE", "Face", "Motion", "draw_face", "draw_motion", "render"]

Array = NDArray[np.floating]
Colour = NDArray[np.floating] | tuple[float, float, float]

SIZE: Final = 64
"""Pixels of both sides of an image."""

INSIDE_RED: Final = 0.22
"""Of the inside of every mouth."""

_INSIDE: Final = (INSIDE_RED, 0.03, 0.08)
_MOUTH_BELOW: Final = 0.20  # of the centre of the face
_FULLY_OPEN: Final = 0.092  # half height of a mouth with opening 1
_LID_CLOSED: Final = 0.08  # of the height of an open eye
_BLINK: Final = 0.09  # s from open to closed

_HAIR: Final = (
    (0.10, 0.08, 0.08), (0.36, 0.21, 0.12), (0.85, 0.68, 0.34), (0.62, 0.26, 0.12), (0.75, 0.75, 0.78),
)  # fmt: skip


@dataclass(frozen=True)
class Face:
    """A person. Colours are RGB from 0 to 1.

    background: top and bottom. radii: half width, half height. eye: half width, half height.
    eye_distance: of an eye from the middle. brow: half thickness. fringe: its lower edge above the centre.
    long_hair: how far below the centre it reaches, 0 for short hair. mouth: scale.
    """

    skin: Array
    lips: Array
    hair: Array
    shirt: Array
    iris: Array
    background: tuple[Array, Array]
    radii: tuple[float, float]
    eye: tuple[float, float]
    eye_distance: float
    brow: float
    fringe: float
    long_hair: float
    mouth: float
    glasses: bool


def draw_face(seed: int) -> Face:
    """The face of a seed: skin between dark and light, in 15 % of the faces of any hue."""
    rng = np.random.default_rng([seed, 2])
    tone = rng.random()
    skin = np.array([0.48, 0.31, 0.22]) * (1 - tone) + np.array([0.98, 0.82, 0.70]) * tone
    if rng.random() < 0.15:
        skin = np.array([rng.uniform(0.5, 0.9), rng.uniform(0.45, 0.95), rng.uniform(0.45, 0.95)])
    lips = np.array([skin[0], skin[1] * rng.uniform(0.45, 0.65), skin[2] * rng.uniform(0.5, 0.75)])
    hair = np.array(_HAIR)[rng.integers(len(_HAIR))] * rng.uniform(0.8, 1.15)
    if rng.random() < 0.35:
        hair = rng.uniform(0.1, 0.9, 3)
    return Face(
        skin=skin,
        lips=lips,
        hair=np.clip(hair, 0, 1),
        shirt=rng.uniform(0.1, 0.95, 3),
        iris=rng.uniform(0.05, 0.6, 3),
        background=(rng.uniform(0.1, 1.0, 3), rng.uniform(0.1, 1.0, 3)),
        radii=(rng.uniform(0.30, 0.335), rng.uniform(0.385, 0.41)),
        eye=(rng.uniform(0.052, 0.068), rng.uniform(0.038, 0.052)),
        eye_distance=rng.uniform(0.115, 0.14),
        brow=rng.uniform(0.009, 0.018),
        fringe=rng.uniform(0.19, 0.25),
        long_hair=float(rng.choice([0.0, rng.uniform(0.2, 0.45)])),
        mouth=rng.uniform(0.9, 1.12),
        glasses=bool(rng.random() < 0.2),
    )


@dataclass(frozen=True)
class Motion:
    """How a head moves, one value per frame [frames]: shift along x and y, turn in radians, gaze to the side,
    raised brows, lids from 0.08 (closed) to 1."""

    x: Array
    y: Array
    turn: Array
    gaze: Array
    brows: Array
    lids: Array


def draw_motion(seed: int, start: int, stop: int) -> Motion:
    """The motion of a seed in frames [start, stop): two slow sines each, and a blink every 1 to 3.5 s.

    The same for every range that holds a frame. Blinks are drawn one after the other from the beginning,
    which takes a microsecond each.
    """
    rng = np.random.default_rng([seed, 3])
    seconds = np.arange(start, stop) / FPS

    def wander(size: float) -> Array:
        waves = [(rng.uniform(0.1, 0.8), rng.random(), rng.uniform(0.3, 0.7)) for _ in range(2)]
        turns = [np.sin(2 * np.pi * (rate * seconds + turn)) * share for rate, turn, share in waves]
        return size * (turns[0] + turns[1])

    lids = np.ones(stop - start)
    blink = rng.uniform(0, 3.5)
    while blink < stop / FPS + _BLINK:
        if blink > start / FPS - _BLINK:
            lids = np.minimum(lids, np.clip(np.abs(seconds - blink) / _BLINK, _LID_CLOSED, 1))
        blink += rng.uniform(1.0, 3.5)
    return Motion(wander(0.012), wander(0.012), wander(0.035), wander(0.014), wander(0.010), lids)


def render(face: Face, motion: Motion, opening: Array, spread: Array, size: int = SIZE) -> NDArray[np.uint8]:
    """Frames uint8 [frames, size, size, 3] RGB.

    opening: of the mouth, 0 to 1.2; spread: -1 round to 1 wide; both [frames], as long as `motion`.
    """
    return _Canvas(face, motion, size).painted(opening, spread)


class _Canvas:
    """Frames of one head. x and y are coordinates in the head, from its centre: [frames, size, size]."""

    def __init__(self, face: Face, motion: Motion, size: int) -> None:
        self._face, self._motion, self._size = face, motion, size
        self._edge = 1.5 / size
        axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
        self._across, self._down = axis[None, None, :], axis[None, :, None]
        dx = self._across - 0.5 - _per_frame(motion.x)
        dy = self._down - 0.53 - _per_frame(motion.y)
        sine, cosine = np.sin(_per_frame(motion.turn)), np.cos(_per_frame(motion.turn))
        self._x, self._y = dx * cosine + dy * sine, dy * cosine - dx * sine
        top, bottom = face.background
        self._image = np.empty((3, len(motion.x), size, size), np.float32)
        self._image[:] = (top + (bottom - top) * axis[:, None]).T[:, None, :, None]

    def painted(self, opening: Array, spread: Array) -> NDArray[np.uint8]:
        face, whole = self._face, slice(None)
        head = _ellipse(self._x, self._y, *face.radii)
        self._back(head)
        fringe = np.maximum(head - 0.025, self._y + face.fringe - 0.25 * self._x**2 / face.radii[0])
        self._paint(self._inside(fringe), face.hair, whole)
        eyes = slice(self._size // 5, self._size * 3 // 4)
        shade = (face.skin[0], face.skin[1] * 0.8, face.skin[2] * 0.8)
        nose = _ellipse(self._x[:, eyes], self._y[:, eyes] - 0.05, 0.028, 0.04)
        self._paint(self._inside(nose), shade, eyes)
        for side in (-1, 1):
            self._eye(side, eyes)
        self._mouth(opening, spread, slice(self._size // 2, None))
        pixels = np.round(np.clip(self._image, 0, 1) * 255).astype(np.uint8)
        return np.ascontiguousarray(pixels.transpose(1, 2, 3, 0))

    def _back(self, head: Array) -> None:
        """Hair behind the head, shirt, neck, and the skin of the face."""
        face, (a, b), whole = self._face, self._face.radii, slice(None)
        self._paint(self._inside(_ellipse(self._x, self._y + 0.07, a + 0.05, b + 0.035)), face.hair, whole)
        if face.long_hair:
            half = face.long_hair / 2
            hair = _box(self._x, self._y - half + 0.05, a + 0.035, half + 0.05)
            self._paint(self._inside(hair), face.hair, whole)
        low = slice(self._size * 3 // 4, None)
        shoulders = self._across - 0.5 - 0.4 * _per_frame(self._motion.x)  # they move less than the head
        self._paint(self._inside(_ellipse(shoulders, self._down[:, low] - 1.16, 0.52, 0.26)), face.shirt, low)
        neck = _box(self._x[:, low], self._y[:, low] - 0.36, 0.11, 0.12)
        self._paint(self._inside(neck), face.skin * 0.93, low)
        self._paint(self._inside(head), face.skin, whole)

    def _eye(self, side: int, rows: slice) -> None:
        face, motion = self._face, self._motion
        x, y = self._x[:, rows] - side * face.eye_distance, self._y[:, rows] + 0.085
        half_width, half_height = face.eye
        lid = np.clip(_per_frame(motion.lids), _LID_CLOSED, 1)
        outline = _ellipse(x, y, half_width + 0.010, half_height * lid + 0.010)
        self._paint(self._inside(outline), face.skin * 0.45, rows)
        seen = np.clip((lid - 0.1) * 5, 0, 1)
        white = self._inside(_ellipse(x, y, half_width, half_height * lid)) * seen
        self._paint(white, (0.97, 0.97, 0.97), rows)
        gaze = np.sqrt((x - _per_frame(motion.gaze)) ** 2 + y**2)
        self._paint(np.minimum(self._inside(gaze - 0.030), white), face.iris, rows)
        self._paint(np.minimum(self._inside(gaze - 0.013), white), (0.03, 0.03, 0.03), rows)
        brow = _box(x, y + 0.085 + _per_frame(motion.brows) + 1.5 * x * x, half_width + 0.01, face.brow)
        self._paint(self._inside(brow), face.hair * 0.6, rows)
        if face.glasses:
            rim = np.abs(_ellipse(x, y, 0.088, 0.075)) - 0.007
            self._paint(self._inside(rim), (0.12, 0.12, 0.15), rows)

    def _mouth(self, opening: Array, spread: Array, rows: slice) -> None:
        face = self._face
        high = np.maximum(_FULLY_OPEN * face.mouth * _per_frame(np.clip(opening, 0, 1.2)), 1e-3)
        wide = (0.105 + 0.032 * _per_frame(spread)) * face.mouth
        x, y = self._x[:, rows], self._y[:, rows] - _MOUTH_BELOW
        self._paint(self._inside(_ellipse(x, y, wide + 0.02, high + 0.02)), face.lips, rows)
        thin = np.minimum(1, 2 * (high - 1e-3) / self._edge)  # a slit thinner than the soft edge fades
        self._paint(self._inside(_ellipse(x, y, wide, high)) * thin, _INSIDE, rows)

    def _paint(self, cover: Array, colour: Colour, rows: slice) -> None:
        for plane, value in zip(self._image, colour, strict=True):
            plane[:, rows] += cover * (np.float32(value) - plane[:, rows])

    def _inside(self, distance: Array) -> Array:
        """Coverage 0 to 1 from a signed distance, negative inside."""
        return np.clip(0.5 - distance / self._edge, 0, 1)


def _per_frame(values: Array) -> Array:
    return np.asarray(values, np.float32)[:, None, None]


def _ellipse(x: Array, y: Array, a: float | Array, b: float | Array) -> Array:
    """Signed distance, to first order, to an ellipse around the origin with half axes a and b."""
    u, v = x / a, y / b
    level = np.sqrt(u * u + v * v) + 1e-6
    return (level - 1) * level / (np.sqrt((u / a) ** 2 + (v / b) ** 2) + 1e-6)


def _box(x: Array, y: Array, a: float, b: float) -> Array:
    return np.maximum(np.abs(x) - a, np.abs(y) - b)
