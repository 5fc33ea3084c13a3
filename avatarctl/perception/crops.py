"""Parts of a frame at the size of a network, shrunk without aliasing: plain sampling would move a detector's
boxes by up to 8 % of their side on the same image (spec/face-models.md 0)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from avatarctl.models.face_networks import DETECTOR_SIDE, MESH_SIDE

__all__ = ["Region", "Square", "crop_region", "crop_squares", "whole_square"]

_MOST_SAMPLES: Final = 8
"""Of a crop's pixel in each direction."""


class Square(NamedTuple):
    """An upright square of whole pixels that may reach beyond the frame: left, top, side."""

    x: int
    y: int
    side: int


class Region(NamedTuple):
    """A square that may be turned: centre, side, and angle in radians, clockwise as y points down."""

    x: float
    y: float
    side: float
    angle: float


def whole_square(height: int, width: int) -> Square:
    """The letterbox: the frame in the middle of a square of its long side."""
    side = max(height, width)
    return Square((width - side) // 2, (height - side) // 2, side)


def crop_squares(frame: np.ndarray, squares: Sequence[Square]) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [len(squares), 3, 128, 128] for the detector; black outside the frame."""
    return torch.cat([_crop_square(frame, square) for square in squares])


def _crop_square(frame: np.ndarray, square: Square) -> Tensor:
    height, width = frame.shape[:2]
    x0, x1 = (min(max(edge, 0), width) for edge in (square.x, square.x + square.side))
    y0, y1 = (min(max(edge, 0), height) for edge in (square.y, square.y + square.side))
    held = frame[y0:y1, x0:x1]
    if held.shape[:2] != (square.side, square.side):
        whole = np.zeros((square.side, square.side, 3), np.uint8)
        whole[y0 - square.y : y1 - square.y, x0 - square.x : x1 - square.x] = held
        held = whole
    return _resize(held, (DETECTOR_SIDE, DETECTOR_SIDE))


def _resize(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """uint8 [h, w, 3] -> uint8 [1, 3, *size], by a triangle as wide as the step."""
    return F.interpolate(_tensor(image), size=size, mode="bilinear", antialias=True)


def _tensor(image: np.ndarray) -> Tensor:
    """uint8 [h, w, 3] -> the same as uint8 [1, 3, h, w]; torch takes no memory that is read only."""
    return torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]


def crop_region(frame: np.ndarray, region: Region) -> Tensor:
    """uint8 [H, W, 3] -> float32 [1, 3, 192, 192] in [0, 255] for the mesh, upright; the frame's edge goes on
    outside it.

    A pixel is the mean of k x k samples, k = ceil(side / 192), at most 8 (spec/face-models.md 3). Half of
    them in each direction are taken together first, so that a large face costs little more than a small one.
    """
    height, width = frame.shape[:2]
    cos, sin = math.cos(region.angle), math.sin(region.angle)
    wanted = min(max(math.ceil(region.side / MESH_SIDE), 1), _MOST_SAMPLES)
    factor = max(1, (wanted + 1) // 2)
    samples = -(-wanted // factor)
    reach = region.side / 2 * (abs(cos) + abs(sin)) + 2
    x0, x1 = _span(region.x, reach, width)
    y0, y1 = _span(region.y, reach, height)
    part = frame[y0:y1, x0:x1]
    if factor > 1:
        part = np.asarray(Image.fromarray(part).reduce(factor))
    pixels = _tensor(part).to(torch.float32, memory_format=torch.contiguous_format)
    # grid_sample counts from -1 to 1 between the outer edges.
    to_x, to_y = (2 / (factor * size) for size in (pixels.shape[3], pixels.shape[2]))
    places = _PLACES * region.side
    grid = torch.empty(1, MESH_SIDE, MESH_SIDE, 2)
    grid[0, ..., 0] = (places * (cos * to_x))[None, :] + (places * (-sin * to_x))[:, None]
    grid[0, ..., 1] = (places * (sin * to_y))[None, :] + (places * (cos * to_y))[:, None]
    total = pixels.new_zeros(1, 3, MESH_SIDE, MESH_SIDE)
    steps = [((number + 0.5) / samples - 0.5) * region.side / MESH_SIDE for number in range(samples)]
    for down in steps:
        for across in steps:
            x = (region.x - x0 + across * cos - down * sin) * to_x - 1
            y = (region.y - y0 + across * sin + down * cos) * to_y - 1
            total += F.grid_sample(
                pixels, grid + torch.tensor([x, y]), "bilinear", "border", align_corners=False
            )
    return total.div_(samples * samples)


_PLACES: Final = (torch.arange(MESH_SIDE) + 0.5) / MESH_SIDE - 0.5
"""Pixel centres of a crop, in sides from its middle."""


def _span(middle: float, reach: float, size: int) -> tuple[int, int]:
    """The pixels of [0, size) around `middle`; at least one."""
    first = min(max(math.floor(middle - reach), 0), size - 1)
    return first, max(min(math.ceil(middle + reach), size), first + 1)
