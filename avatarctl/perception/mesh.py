"""The 468 points of each face of one frame, and whether it is one (spec/face-models.md 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from avatarctl.models.face_networks import MESH_SIDE, FaceNetworks
from avatarctl.perception.crops import Region, crop_region
from avatarctl.perception.detect import Detection, Look, detect, look_again, overlap, tiles

__all__ = [
    "MOST_FACES",
    "PRESENCE",
    "Face",
    "alignment_points",
    "find_faces",
    "mesh",
    "mesh_twice",
    "region_of_landmarks",
]

PRESENCE: Final = 0.5
MOST_FACES: Final = 10
"""Of a frame; the largest ones."""

_SAME_FACE: Final = 0.5
_REGION: Final = 1.5
_EYE_CORNERS: Final = (33, 263)
_BROWS: Final = ((70, 63, 105, 66, 107), (300, 293, 334, 296, 336))
_NOSE: Final = (5, 4, 48, 278)


@dataclass(frozen=True)
class Face:
    """landmarks: float32 [468, 3], x and y in pixels of the frame, z in the same unit; presence: 0..1."""

    landmarks: np.ndarray
    presence: float

    @property
    def box(self) -> np.ndarray:
        """float64 [4]: x0, y0, x1, y1 around all points."""
        flat = self.landmarks[:, :2].astype(np.float64)
        return np.concatenate([flat.min(0), flat.max(0)])

    @property
    def side(self) -> float:
        box = self.box
        return float((box[2:] - box[:2]).max())


def region_of_landmarks(landmarks: np.ndarray) -> Region:
    """[468, 2 or 3] -> 1.5 times the box around all points, turned by the line between the eyes' outer
    corners."""
    flat = landmarks[:, :2].astype(np.float64)
    low, high = flat.min(0), flat.max(0)
    (x, y), (across, down) = (low + high) / 2, flat[_EYE_CORNERS[1]] - flat[_EYE_CORNERS[0]]
    return Region(float(x), float(y), _REGION * float((high - low).max()), math.atan2(down, across))


def mesh(networks: FaceNetworks, frame: np.ndarray, regions: Sequence[Region]) -> list[Face]:
    """uint8 [H, W, 3] -> the face in each region, whether it is one or not: see its presence."""
    if not regions:
        return []
    points, flags = networks.landmarks(torch.cat([crop_region(frame, region) for region in regions]))
    placed = []
    for region, crop, logit in zip(regions, points.numpy(), flags.tolist(), strict=True):
        unit = crop.astype(np.float64) / MESH_SIDE
        u, v = unit[:, 0] - 0.5, unit[:, 1] - 0.5
        cos, sin = math.cos(region.angle), math.sin(region.angle)
        x = region.x + region.side * (u * cos - v * sin)
        y = region.y + region.side * (u * sin + v * cos)
        landmarks = np.stack([x, y, unit[:, 2] * region.side], 1).astype(np.float32)
        placed.append(Face(landmarks, 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0))
    return placed


def mesh_twice(networks: FaceNetworks, frame: np.ndarray, found: Sequence[Detection]) -> list[Face]:
    """The faces of these boxes that are faces: the first points say where to look for the second ones, which
    are three times as steady (spec/face-models.md 6)."""
    first = [
        face for face in mesh(networks, frame, [each.region for each in found]) if face.presence >= PRESENCE
    ]
    second = mesh(networks, frame, [region_of_landmarks(face.landmarks) for face in first])
    return [face for face in second if face.presence >= PRESENCE]


def find_faces(networks: FaceNetworks, frame: np.ndarray, look: Look = "whole") -> list[Face]:
    """uint8 [H, W, 3] -> the faces of a frame, largest first, at most `MOST_FACES`.

    A box counts where the detector sees it again from near and the mesh says that a face is there.
    """
    looked = [each for boxes in detect(networks, frame) for each in boxes]
    if squares := tiles(frame.shape[0], frame.shape[1], look):
        looked += [each for boxes in detect(networks, frame, squares) for each in boxes]
    again = [each for each in look_again(networks, frame, _distinct(looked)) if each is not None]
    faces = mesh_twice(networks, frame, _distinct(again))
    faces.sort(key=lambda face: -face.side)
    kept: list[Face] = []
    for face in faces:
        if not kept or overlap(face.box, np.stack([each.box for each in kept])).max() < _SAME_FACE:
            kept.append(face)
    return kept[:MOST_FACES]


def _distinct(found: Sequence[Detection]) -> list[Detection]:
    """Of those that overlap by half the best one: the same face in two squares."""
    kept: list[Detection] = []
    for each in sorted(found, key=lambda each: -each.score):
        if not kept or overlap(each.box, np.stack([other.box for other in kept])).max() < _SAME_FACE:
            kept.append(each)
    return kept


def alignment_points(landmarks: np.ndarray) -> np.ndarray:
    """[468, 2 or 3] -> float64 [3, 2]: middle of the brow on the left of the image, of the other brow, and of
    the nose, as the published alignment's points lie (spec/face-models.md 7)."""
    flat = landmarks[:, :2].astype(np.float64)
    return np.stack([flat[list(group)].mean(0) for group in (*_BROWS, _NOSE)])
