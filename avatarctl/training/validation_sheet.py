"""The contact sheet of a validation: for each clip its reference, the truth above what was made, at equal
times; below, how well lips fit the audio when it is shifted."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from avatarctl.atomic import atomic_write_bytes
from avatarctl.timeline import FPS

__all__ = ["COLUMNS", "Strip", "draw_sheet", "times_of"]

COLUMNS: Final = 6
"""Times at which a clip is shown."""
_TILE, _GAP, _LINE, _SIDE, _CURVE = 144, 8, 20, 64, 150
_PAPER, _INK, _GREY, _FAINT = "#ffffff", "#1f2933", "#6b7280", "#d8dee5"
_COLOURS: Final = {"recon": "#1450b4", "mixed": "#c2570c"}


@dataclass(frozen=True)
class Strip:
    """One clip. reference: uint8 [H, W, 3]; made: uint8 [n, H, W, 3] at `times`, which count frames; truth:
    the same of the source, None where nobody knows it."""

    title: str
    reference: np.ndarray
    times: Sequence[int]
    made: np.ndarray
    truth: np.ndarray | None = None


def times_of(frames: int) -> list[int]:
    """The frames of a clip that a sheet shows, the first and the last among them."""
    count = min(COLUMNS, frames)
    return [round(place * (frames - 1) / max(count - 1, 1)) for place in range(count)]


def draw_sheet(
    path: Path,
    title: str,
    strips: Sequence[Strip],
    curves: Mapping[str, Sequence[float]],
    failed: Sequence[str] = (),
) -> None:
    """Writes the sheet as PNG, whole or not at all.

    curves: by group the mean cosine for audio shifts from -n to n frames; failed: a line for each clip that
    could not be made. Raises OutputRefused and WriteFailed.
    """
    width = 2 * _GAP + _SIDE + (COLUMNS + 1) * (_TILE + _GAP)
    heights = [_strip_height(strip) for strip in strips]
    below = (_CURVE + 3 * _LINE if curves else 0) + len(failed) * _LINE
    page = Image.new("RGB", (width, 2 * _GAP + _LINE + sum(heights) + below + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    draw.text((_GAP, _GAP), title, _INK, font)
    top = 2 * _GAP + _LINE
    for strip, height in zip(strips, heights, strict=True):
        _draw_strip(page, draw, strip, top)
        top += height
    for line in failed:
        draw.text((_GAP, top), line, "#b42318", ImageFont.load_default(12))
        top += _LINE
    if curves:
        _draw_curves(draw, curves, (_GAP + _SIDE, top + _LINE, width - 3 * _GAP, top + _LINE + _CURVE))
    held = io.BytesIO()
    page.save(held, "PNG", compress_level=1)  # untrained frames are noise, which does not shrink
    atomic_write_bytes(path, held.getvalue())


def _rows(strip: Strip) -> list[tuple[str, np.ndarray]]:
    truth = [] if strip.truth is None else [("truth", strip.truth)]
    return [*truth, ("made", strip.made)]


def _strip_height(strip: Strip) -> int:
    return 2 * _LINE + len(_rows(strip)) * (_TILE + _GAP) + _GAP


def _draw_strip(page: Image.Image, draw: ImageDraw.ImageDraw, strip: Strip, top: int) -> None:
    font = ImageFont.load_default(12)
    draw.line((_GAP, top - _GAP // 2, page.width - _GAP, top - _GAP // 2), _FAINT)
    draw.text((_GAP, top), strip.title, _INK, font)
    left = _GAP + _SIDE
    draw.text((left, top + _LINE), "reference", _GREY, font)
    for column, time in enumerate(strip.times, 1):
        draw.text((left + column * (_TILE + _GAP), top + _LINE), f"{time / FPS:.2f} s", _GREY, font)
    top += 2 * _LINE
    page.paste(_tile(strip.reference), (left, top))
    for label, frames in _rows(strip):
        draw.text((_GAP, top + _TILE // 2 - 8), label, _INK, font)
        for column, frame in enumerate(frames, 1):
            page.paste(_tile(frame), (left + column * (_TILE + _GAP), top))
        top += _TILE + _GAP


def _tile(frame: np.ndarray) -> Image.Image:
    return ImageOps.pad(Image.fromarray(frame), (_TILE, _TILE), color=_PAPER)


def _draw_curves(
    draw: ImageDraw.ImageDraw, curves: Mapping[str, Sequence[float]], box: tuple[int, int, int, int]
) -> None:
    """Scaled to what is there: a cosine moves little at first, and where the top lies is what counts."""
    left, top, right, bottom = box
    font = ImageFont.load_default(12)
    said = "fit of lips and audio (cosine), audio shifted by so many frames; in time the top is at 0"
    draw.text((left, top - _LINE), said, _INK, font)
    values = [value for curve in curves.values() for value in curve]
    low, high = min(values), max(values)
    span = max(high - low, 1e-6)
    far = (len(next(iter(curves.values()))) - 1) // 2
    for shift in range(-far, far + 1, 5):
        x = left + (shift + far) * (right - left) // (2 * far)
        draw.line((x, top, x, bottom), _INK if shift == 0 else _FAINT)
        draw.text((x, bottom + 3), f"{shift:+d}" if shift else "0", _GREY, font, anchor="ma")
    for value, y in ((high, top), (low, bottom)):
        draw.text((left - 6, y), f"{value:.3f}", _GREY, font, anchor="rm")
    for place, (group, curve) in enumerate(curves.items()):
        points = [
            (left + at * (right - left) / (2 * far), bottom - (value - low) / span * (bottom - top))
            for at, value in enumerate(curve)
        ]
        draw.line(points, _COLOURS.get(group, _INK), width=2)
        draw.text((right - 4, top + 4 + place * _LINE), group, _COLOURS.get(group, _INK), font, anchor="ra")
