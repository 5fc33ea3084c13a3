"""Masks that a frame's landmarks draw: the hull of each face, the ring of its lips (spec/face-models.md
8)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

__all__ = ["LIPS_OUTER", "convex_hull", "face_mask", "fill_polygon", "lip_mask"]

LIPS_OUTER: Final = (
    61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185,
)  # fmt: skip
"""Indices of the mesh, in drawing order."""


def face_mask(faces: Iterable[np.ndarray], size: tuple[int, int], *, margin: float = 0.0) -> np.ndarray:
    """uint8 [H, W] of 0 and 255: the convex hulls of all points of these faces, united.

    faces: landmarks [468, 2 or 3] in pixels of the frame; of none the mask is empty. size: (H, W) of the
    frame. margin: share by which a hull is larger than its points, from their middle outwards.
    """
    mask = np.zeros(size, bool)
    for landmarks in faces:
        hull = convex_hull(landmarks[:, :2].astype(np.float64))
        middle = (hull.min(0) + hull.max(0)) / 2
        mask |= fill_polygon(middle + (hull - middle) * (1 + margin), size)
    return mask.astype(np.uint8) * 255


def lip_mask(faces: Iterable[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W] of 0 and 255: what the outer rings of these faces' lips enclose, an open mouth
    included."""
    mask = np.zeros(size, bool)
    for landmarks in faces:
        mask |= fill_polygon(landmarks[list(LIPS_OUTER), :2].astype(np.float64), size)
    return mask.astype(np.uint8) * 255


def convex_hull(points: np.ndarray) -> np.ndarray:
    """[n, 2] -> [m, 2], the corners of the hull in order (Andrew 1979, monotone chain)."""
    ordered = sorted(map(tuple, points.tolist()))
    halves = []
    for chain in (ordered, ordered[::-1]):
        half: list[tuple[float, float]] = []
        for point in chain:
            while len(half) > 1 and _turn(half[-2], half[-1], point) <= 0:
                half.pop()
            half.append(point)
        halves += half[:-1]
    return np.array(halves)


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def fill_polygon(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W]: the pixels whose middle lies inside a closed polygon [n, 2], by even and odd crossings."""
    height, width = size
    mask = np.zeros(size, bool)
    low, high = np.floor(corners.min(0)), np.ceil(corners.max(0))
    x0, x1 = int(np.clip(low[0], 0, width)), int(np.clip(high[0] + 1, 0, width))
    y0, y1 = int(np.clip(low[1], 0, height)), int(np.clip(high[1] + 1, 0, height))
    if x0 >= x1 or y0 >= y1:
        return mask
    part = mask[y0:y1, x0:x1]
    across, down = np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        rows = np.flatnonzero((down >= min(ay, by)) & (down < max(ay, by)))
        if len(rows):
            crossing = ax + (down[rows] - ay) * ((bx - ax) / (by - ay))
            part[rows] ^= across[None, :] >= crossing[:, None]
    return mask
