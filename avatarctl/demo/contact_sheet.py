"""One page that shows a video: frames at eight moments, and below how far the mouth is open over time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from avatarctl.atomic import atomic_write_bytes
from avatarctl.demo.faces import SIZE
from avatarctl.demo.mouth_meter import correlation, measure_mouth
from avatarctl.timeline import FPS

__all__ = ["ContactSheet"]

Array = NDArray[np.floating]

_COLUMNS: Final = 8
_TILE: Final = 128  # pixels
_GAP: Final = 8
_CURVE: Final = 72  # pixels high
_LINE: Final = 20  # of text
_PAPER, _INK, _PALE = "#ffffff", "#1f2933", "#cbd2d9"
_FULLY_OPEN: Final = 12.0  # what the meter shows for it

_STEADY: Final = 1e-3  # of 1, the loudest: less is no movement that a mouth could follow


class ContactSheet:
    """Gathers a video as it is made, eight frames and one number per frame; `save` draws it.

    frames: of the whole video. opening: [frames] of the mouth that the audio calls for, 0 to 1, if that is
    known; loudness: [frames], 0 to 1, of audio of which nobody knows more. Only with one of them the mouth of
    the video is measured, as only then it is a face of the cartoon world.
    """

    def __init__(self, frames: int, opening: Array | None = None, loudness: Array | None = None) -> None:
        self._frames = frames
        self._times = [round(k * (frames - 1) / (_COLUMNS - 1)) for k in range(_COLUMNS)]
        self._tiles: dict[int, Image.Image] = {}
        self._opening = opening
        self._wanted = loudness if opening is None else opening
        self._measured: list[float] = []
        self._done = 0

    def add(self, frames: NDArray[np.uint8]) -> None:
        """The next frames of the video, uint8 [n, H, W, 3]."""
        for time in self._times:
            if self._done <= time < self._done + len(frames):
                tile = Image.fromarray(frames[time - self._done])
                self._tiles[time] = ImageOps.contain(tile, (_TILE, _TILE))
        if self._wanted is not None and frames.shape[1:3] == (SIZE, SIZE):
            self._measured += measure_mouth(frames)[0].tolist()
        self._done += len(frames)

    def agreement(self) -> float | None:
        """r of the measured opening and the true one, or the loudness; None where nothing was measured, and
        for audio that is as loud all the time."""
        measured = np.array(self._measured)
        if self._wanted is None or len(measured) != len(self._wanted) or np.ptp(self._wanted) < _STEADY:
            return None
        return correlation(measured, self._wanted)

    def save(self, path: Path, title: str) -> None:
        """Write the page as PNG, whole or not at all. Raises OutputRefused and WriteFailed."""
        width = _COLUMNS * (_TILE + _GAP) + _GAP
        agreement = self.agreement()
        curves: list[tuple[str, Array]] = []
        if agreement is not None and self._wanted is not None:
            known = self._opening is not None
            curves = [
                (
                    "opening of the mouth that the audio calls for" if known else "loudness of the audio",
                    self._wanted,
                ),
                (f"measured in the video (r = {agreement:.2f})", np.array(self._measured) / _FULLY_OPEN),
            ]
        height = 3 * _GAP + 2 * _LINE + _TILE + len(curves) * (_CURVE + _LINE + _GAP)
        page = Image.new("RGB", (width, height), _PAPER)
        draw = ImageDraw.Draw(page)
        font = ImageFont.load_default(13)
        draw.text((_GAP, _GAP), title, _INK, font)
        top = 2 * _GAP + _LINE
        for column, time in enumerate(self._times):
            left = _GAP + column * (_TILE + _GAP)
            if time in self._tiles:
                page.paste(self._tiles[time], (left, top))
            draw.text((left, top + _TILE + 3), f"{time / FPS:.2f} s", _INK, font)
        top += _TILE + _LINE + _GAP
        for label, values in curves:
            draw.text((_GAP, top), label, _INK, font)
            self._draw_curve(draw, values, (_GAP, top + _LINE, width - _GAP, top + _LINE + _CURVE))
            top += _LINE + _CURVE + _GAP
        data = io.BytesIO()
        page.save(data, "PNG")
        atomic_write_bytes(path, data.getvalue())

    def _draw_curve(self, draw: ImageDraw.ImageDraw, values: Array, box: Sequence[int]) -> None:
        """A column of pixels shows the largest value of its frames; grey lines are the times of the tiles."""
        left, top, right, bottom = box
        for time in self._times:
            x = left + time * (right - left) // max(1, self._frames - 1)
            draw.line((x, top, x, bottom), _PALE)
        for x in range(left, right):
            first = (x - left) * len(values) // (right - left)
            last = max(first + 1, (x + 1 - left) * len(values) // (right - left))
            high = round(float(np.clip(values[first:last].max(), 0, 1.2)) / 1.2 * (bottom - top))
            if high:
                draw.line((x, bottom - high, x, bottom), _INK)
        draw.line((left, bottom, right, bottom), _INK)
