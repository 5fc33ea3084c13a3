"""Measures mouths in frames of the cartoon world: no detector, no tracking, linear in intensity, so that blur
hardly changes a result (spec/cartoon-world.md 2)."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from avatarctl.demo.faces import INSIDE_RED

__all__ = ["correlation", "measure_mouth", "mouth_window"]

Array = NDArray[np.floating]

# Of the window, which must stay inside the face: with its corners it would see shirt and neck.
_CENTRE: Final = (0.50, 0.735)
_RADII: Final = (0.21, 0.15)
_DEAD: Final = 0.08  # below it darkness is shading, not the inside of a mouth
_EDGE: Final = 1.5  # pixels, as in demo/faces.py
_TINY: Final = 0.5  # square pixels of an image of 64; much smaller mouths give 0
_CHEEK_ROWS: Final = (0.52, 0.60)
_CHEEKS: Final = ((0.26, 0.36), (0.64, 0.74))
_LEAST_CONTRAST: Final = 0.1


def measure_mouth(frames: NDArray[np.uint8]) -> tuple[Array, Array]:
    """Frames uint8 [F, H, W, 3] of one clip -> height and width of the mouth, each [F], in 64ths of the
    image's side: about 12 for a fully open mouth, 0 for a closed one.

    For an ellipse of full contrast they are exact: 3 pi / 8 times the sum of squared column sums over the
    sum. A mouth thinner than the soft edge is drawn fainter, by a rule that `_unfaded` turns round.
    """
    red = frames[..., 0] / 255.0
    side = red.shape[1]
    skin = max(float(np.median(_cheeks(red))), INSIDE_RED + _LEAST_CONTRAST)
    dark = np.clip((skin - red) / (skin - INSIDE_RED), 0, 1.1)
    dark = np.clip((dark - _DEAD) / (1 - _DEAD), 0, None) * mouth_window(side)
    unit = side / 64
    total = dark.sum((1, 2)) / unit**2 + _TINY
    height, width = ((dark.sum(axis) / unit) ** 2 for axis in (1, 2))
    factor = 3 * np.pi / 8 / unit
    return _unfaded(factor * height.sum(1) / total), factor * width.sum(1) / total


def correlation(a: Array, b: Array) -> float:
    """Pearson's r of two tracks [F]; 0 where one does not move."""
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / size) if size > 1e-9 else 0.0


def _unfaded(height: Array) -> Array:
    """Heights as they would be without the fading of thin mouths in `faces.render`.

    There a column of half height b < e / 2, with an edge of e, holds (b + e / 2)^2 / e of darkness (the
    integral of its coverage), times 2 b / e. In an image of another size the edge is another: left out.
    """
    half = np.linspace(0, _EDGE / 2, 64)
    seen = (half + _EDGE / 2) ** 2 / _EDGE * 2 * half / _EDGE
    return np.where(height < _EDGE, np.interp(height, seen, 2 * half), height)


def mouth_window(side: int) -> Array:
    """Where a mouth can be: [side, side] from 0 to 1, with a soft edge."""
    at = (np.arange(side) + 0.5) / side
    u, v = ((at - centre) / radius for centre, radius in zip(_CENTRE, _RADII, strict=True))
    return np.clip((1.1 - np.hypot(u[None, :], v[:, None])) / 0.2, 0, 1)


def _cheeks(red: Array) -> Array:
    side = red.shape[1]
    rows = slice(*(round(edge * side) for edge in _CHEEK_ROWS))
    columns = [slice(*(round(edge * side) for edge in cheek)) for cheek in _CHEEKS]
    return np.concatenate([red[:, rows, cheek] for cheek in columns], axis=2)
