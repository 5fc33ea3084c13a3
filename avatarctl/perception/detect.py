"""Boxes of faces in one frame: the detector's rows, weighted suppression, a second look at each, and tiles
for faces that are small in the frame (spec/face-models.md 2, 5)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from avatarctl.models.face_networks import DETECTOR_SIDE, FaceNetworks, anchors
from avatarctl.perception.crops import Region, Square, crop_squares, whole_square

__all__ = ["Detection", "Look", "decode", "detect", "look_again", "overlap", "suppress", "tiles"]

Look = Literal["whole", "near", "far"]
"""whole: one look at the whole frame, for faces from about 10 % of its long side on; near: also at squares of
its short side, from about 6 %; far: also at squares of half of that, from about 4 %."""

SCORE: Final = 0.5
IOU: Final = 0.3
_LARGEST_LOGIT: Final = 100.0
_SECOND_LOOK: Final = 3.0
"""Side of the second look, in sides of the box."""
_TILE_STEP: Final = 0.6
"""Of a tile's side, at most, from one to the next."""
_LEAST_TILE: Final = 64
"""Pixels of a tile's side: in less there is no face that the mesh could follow."""
_REGION: Final = 1.5
"""Side of the mesh's region, in sides of the box."""


@dataclass(frozen=True)
class Detection:
    """score in 0..1; box: float64 [4], x0, y0, x1, y1; points: float64 [6, 2], the eye on the left of the
    image, the other eye, nose tip, mouth, the ear on the left, the other ear. In pixels of the frame."""

    score: float
    box: np.ndarray
    points: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        return (self.box[:2] + self.box[2:]) / 2

    @property
    def side(self) -> float:
        return float((self.box[2:] - self.box[:2]).max())

    @property
    def region(self) -> Region:
        """What the mesh looks at: 1.5 boxes, turned by the line between the eyes."""
        (x, y), (across, down) = self.centre, self.points[1] - self.points[0]
        return Region(float(x), float(y), _REGION * self.side, math.atan2(down, across))


def decode(scores: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Logits [896] and boxes [896, 16] of one square -> float64 [n, 17] of those that count, best first:
    score, x0, y0, x1, y1, six points, in units of the square's side. Not yet suppressed."""
    logits = np.clip(scores.astype(np.float64), -_LARGEST_LOGIT, _LARGEST_LOGIT)
    certain = 1 / (1 + np.exp(-logits))
    chosen = np.flatnonzero(certain >= SCORE)
    chosen = chosen[np.argsort(-certain[chosen], kind="stable")]
    raw = boxes[chosen].astype(np.float64) / DETECTOR_SIDE
    origin = _ANCHORS[chosen]
    middle, half = raw[:, :2] + origin, raw[:, 2:4] / 2
    points = raw[:, 4:].reshape(-1, 6, 2) + origin[:, None]
    return np.hstack([certain[chosen, None], middle - half, middle + half, points.reshape(-1, 12)])


_ANCHORS: Final = anchors().numpy().astype(np.float64)


def overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[4] and [n, 4] -> [n]: intersection over union."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    both = np.clip(high - low, 0, None).prod(1)
    each = np.clip(others[:, 2:] - others[:, :2], 0, None).prod(1)
    one = float(np.clip(box[2:] - box[:2], 0, None).prod())
    return np.asarray(both / np.maximum(one + each - both, 1e-12))


def suppress(rows: np.ndarray) -> np.ndarray:
    """Rows of `decode` -> one row for each face: those that overlap the best one are averaged, weighed by
    their scores; it keeps the best score."""
    kept = []
    while len(rows):
        same = overlap(rows[0, 1:5], rows[:, 1:5]) > IOU
        same[0] = True
        weights = rows[same, :1]
        mean = (rows[same] * weights).sum(0) / weights.sum()
        kept.append(np.concatenate([rows[0, :1], mean[1:]]))
        rows = rows[~same]
    return np.stack(kept) if kept else np.empty((0, 17))


def detect(
    networks: FaceNetworks, frame: np.ndarray, squares: Sequence[Square] = ()
) -> list[list[Detection]]:
    """uint8 [H, W, 3] -> the detections of each square, best first; of the whole frame where none is
    named."""
    squares = squares or (whole_square(*frame.shape[:2]),)
    scores, boxes = networks.detect(crop_squares(frame, squares))
    found = []
    for square, of_score, of_box in zip(squares, scores.numpy(), boxes.numpy(), strict=True):
        rows = suppress(decode(of_score, of_box))
        found.append([_placed(row, square) for row in rows])
    return found


def _placed(row: np.ndarray, square: Square) -> Detection:
    places = row[1:].reshape(-1, 2) * square.side + (square.x, square.y)
    return Detection(float(row[0]), places[:2].reshape(4), places[2:])


def look_again(
    networks: FaceNetworks, frame: np.ndarray, proposals: Sequence[Detection]
) -> list[Detection | None]:
    """Each proposal as the detector sees it in a square of three boxes around it; None where it is no face
    then. A first box may be a face that is not there, and that of a small face lies up to a third beside
    it."""
    if not proposals:
        return []
    squares = []
    for each in proposals:
        side = max(8, round(_SECOND_LOOK * each.side))
        x, y = (round(float(middle) - side / 2) for middle in each.centre)
        squares.append(Square(x, y, side))
    seen = detect(networks, frame, squares)
    return [_same(each, found) for each, found in zip(proposals, seen, strict=True)]


def _same(proposal: Detection, found: Sequence[Detection]) -> Detection | None:
    """The detection whose centre lies nearest to the proposal's, within its box."""
    near = [each for each in found if np.abs(each.centre - proposal.centre).max() <= proposal.side / 2]
    return min(near, key=lambda each: float(np.abs(each.centre - proposal.centre).sum()), default=None)


def tiles(height: int, width: int, look: Look) -> list[Square]:
    """The squares beside the whole frame that a look goes through."""
    short = min(height, width)
    sides = {"whole": (), "near": (short,), "far": (short, short // 2)}[look]
    found = []
    for number, side in enumerate(sides):
        if side < _LEAST_TILE or (number == 0 and height == width):
            continue
        # The squares of the short side always are three: beginning, middle and end (spec/face-models.md 0).
        least = 3 if number == 0 else 1
        found += [
            Square(x, y, side)
            for y in _starts(height, side, least if height > width else 1)
            for x in _starts(width, side, least if width > height else 1)
        ]
    return found


def _starts(length: int, side: int, least: int) -> Iterator[int]:
    room = length - side
    count = max(least, math.ceil(room / (_TILE_STEP * side)) + 1) if room else 1
    for number in range(count):
        yield round(room * number / (count - 1)) if count > 1 else 0
