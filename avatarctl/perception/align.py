"""Three points of a face to the published template, frames to aligned faces (spec/face-alignment.md 1, 2).

Here and in `paste.py` the middle of the first pixel is 0, as in the published alignment: `Aligner.fit` takes
half a pixel off the points, which count from the pixel's edge.
"""

from __future__ import annotations

import functools
import math
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "FILL",
    "Aligner",
    "after",
    "align",
    "crop_size",
    "inverse",
    "moved",
    "squeeze",
    "template",
    "warp",
]

FILL: Final = 127 / 255
"""Grey outside the frame, in [0, 1]."""

_TEMPLATE: Final = ((17.0, 20.0), (58.0, 20.0), (37.5, 40.0))
_CROP: Final = (75, 100)
_RATIO: Final = 2.8 / 256
_KEPT_BIAS: Final = 0.2


def template(resolution: int) -> np.ndarray:
    """float64 [3, 2]: where both brows and the nose belong in the crop of an aligned face of `resolution`
    pixels."""
    return np.array(_TEMPLATE) * (resolution * _RATIO)


def crop_size(resolution: int) -> tuple[int, int]:
    """(height, width) of the crop that is squeezed to a square: (560, 420) for 512."""
    width, height = (int(side * resolution * _RATIO + 1e-9) for side in _CROP)
    return height, width


class Aligner:
    """Fits faces one frame after another; holds what the published alignment carries from frame to frame.

    smooth: carry the residual of the nose; with False each frame is fitted by itself.
    """

    def __init__(self, resolution: int, *, smooth: bool = True) -> None:
        self.resolution = resolution
        self._template = template(resolution)
        self._smooth = smooth
        self._bias: np.ndarray | None = None

    def reset(self) -> None:
        """Forget what was carried: at the start of a video and at each cut."""
        self._bias = None

    def fit(self, points: np.ndarray) -> np.ndarray:
        """float64 [3, 2], as `mesh.alignment_points` gives them -> float32 [2, 3], frame to crop.

        A similarity: turned, scaled and moved, never mirrored. Raises ValueError for three equal points.
        """
        return self.fit_centres(np.asarray(points, np.float64) - 0.5)

    def fit_centres(self, points: np.ndarray) -> np.ndarray:
        """The same for points that count from the middle of the first pixel."""
        goal, goal_middle, goal_size = _normalised(self._template)
        held, middle, size = _normalised(points)
        u, _, v = np.linalg.svd(held.T @ goal)
        turn = (u @ v).T
        if np.linalg.det(turn) < 0:
            v[-1] *= -1
            turn = (u @ v).T
        matrix = np.empty((2, 3))
        matrix[:, :2] = turn * (goal_size / size)
        matrix[:, 2] = goal_middle - matrix[:, :2] @ middle
        if self._smooth:
            residual = goal[2] - held[2]
            kept = self._bias
            self._bias = residual if kept is None else _KEPT_BIAS * kept + (1 - _KEPT_BIAS) * residual
            matrix[:, 2] += self._bias
        return matrix.astype(np.float32)


def _normalised(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Points around 0 with a deviation of 1, over all six numbers; their mean; their deviation."""
    middle = points.mean(0)
    size = float((points - middle).std(ddof=1))
    if not size > 0:
        raise ValueError("three points in one place have no direction")
    return (points - middle) / size, middle, size


def squeeze(resolution: int) -> np.ndarray:
    """float64 [2, 3]: crop to the square that it is squeezed to, both counting from their first pixel's
    middle."""
    height, width = crop_size(resolution)
    x, y = resolution / width, resolution / height
    return np.array([[x, 0, x / 2 - 0.5], [0, y, y / 2 - 0.5]])


def after(second: np.ndarray, first: np.ndarray) -> np.ndarray:
    """float64 [..., 2, 3]: `first` and then `second`, each [..., 2, 3]."""
    turned = second[..., :2] @ first.astype(np.float64)
    turned[..., 2] += second[..., 2]
    return np.asarray(turned)


def inverse(matrix: np.ndarray) -> np.ndarray:
    """float64 [2, 3]: the way back."""
    turned = np.linalg.inv(matrix[:, :2].astype(np.float64))
    return np.hstack([turned, -turned @ matrix[:, 2:]])


def moved(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """[n, 2] -> float64 [n, 2] by a matrix [2, 3]; both sides count from the pixel's edge, as points of faces
    do, though the matrix counts from its middle."""
    matrix = matrix.astype(np.float64)
    return np.asarray((points.astype(np.float64) - 0.5) @ matrix[:, :2].T + matrix[:, 2] + 0.5)


def warp(images: Tensor, matrices: Tensor, size: tuple[int, int], fill: float) -> Tensor:
    """[n, c, H, W] float -> [n, c, *size] by [n, 2, 3], image to result; differentiable in the images.

    Bilinear between pixel centres; `fill` outside, blended at the edge by what of a sample lies inside.
    """
    height, width = images.shape[-2:]
    places = _sources(matrices.to(images.device, torch.float64), size)
    scale = places.new_tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)])
    grid = (places * scale - 1).to(images.dtype)
    sampled = F.grid_sample(images, grid, "bilinear", "zeros", align_corners=True)
    if not fill:
        return sampled
    inside = F.grid_sample(torch.ones_like(images[:, :1]), grid, "bilinear", "zeros", align_corners=True)
    return sampled + (1 - inside) * fill


def _sources(matrices: Tensor, size: tuple[int, int]) -> Tensor:
    """[n, 2, 3] -> [n, *size, 2]: x and y in the image of each pixel of the result."""
    y, x = torch.meshgrid(
        torch.arange(size[0], dtype=torch.float64), torch.arange(size[1], dtype=torch.float64), indexing="ij"
    )
    places = torch.stack([x, y], -1).to(matrices.device).reshape(1, -1, 2) - matrices[:, None, :, 2]
    # `inv` waits for the device, to ask it whether there is an inverse.
    way_back, _ = torch.linalg.inv_ex(matrices[:, :, :2])
    turned: Tensor = places @ way_back.transpose(1, 2)
    return turned.reshape(-1, *size, 2)


def align(images: Tensor, matrices: Tensor, resolution: int, *, fill: float = FILL) -> Tensor:
    """[n, 3, H, W] float in [0, 1] -> [n, 3, resolution, resolution], aligned faces; differentiable, float32.

    matrices: [n, 2, 3] of an `Aligner` of this resolution. fill: of what lies outside; 0 for values in
    [-1, 1], where grey is 0. Sharp edges may leave the range by a little, as the last step is Lanczos.
    """
    with torch.autocast(images.device.type, enabled=False):
        height, width = crop_size(resolution)
        crop = warp(images.float(), matrices, (height, width), fill)
        down = _lanczos(height, resolution).to(crop.device)
        across = _lanczos(width, resolution).to(crop.device)
        return down @ crop @ across.T


@functools.lru_cache(maxsize=16)
def _lanczos(length: int, to: int) -> Tensor:
    """float32 [to, length]: Lanczos of 8 taps without antialias, the edge repeated, as OpenCV's
    INTER_LANCZOS4 resizes (spec/face-alignment.md 2)."""
    weights = np.zeros((to, length))
    for row in range(to):
        place = (row + 0.5) * length / to - 0.5
        first = math.floor(place) - 3
        offsets = place - (first + np.arange(8))
        taps = np.sinc(offsets) * np.sinc(offsets / 4)
        np.add.at(weights[row], np.clip(first + np.arange(8), 0, length - 1), taps / taps.sum())
    return torch.from_numpy(weights).float()
