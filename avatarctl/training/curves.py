"""The curves of a run as an image: where people would rather look than read."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

from avatarctl.atomic import atomic_write_bytes

__all__ = ["draw_curves"]

_SIZE: Final = (640, 260)
_COLUMNS: Final = 2
_LEFT, _TOP, _RIGHT, _BOTTOM = 76, 34, 20, 34
_INK, _GREY, _FAINT = (32, 32, 32), (110, 110, 110), (226, 226, 226)
_EACH, _MEAN, _SKIPPED = (176, 198, 230), (20, 80, 180), (200, 40, 40)
_WINDOW: Final = 0.02
"""Share of the steps that the thick line averages over."""
_FEWEST: Final = 5
"""Steps that it averages over where there are some."""
_LOGARITHMIC: Final = 30.0
"""Highest over lowest value from which a panel is logarithmic: one early peak would flatten all others."""
_FIRST: Final = ("loss", "flow", "mse")
"""Panels that stand in front; the others follow as the log names them."""
_NO_CURVES: Final = ("step", "skipped")

Points = list[tuple[int, float]]


def draw_curves(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """One panel for every number of the log: thin each step, thick its running mean; red marks below are
    steps that were skipped."""
    seen = dict.fromkeys(
        name
        for entry in entries
        for name, value in entry.items()
        if name not in _NO_CURVES and (value is None or isinstance(value, (int, float)))
    )
    names = [*(name for name in _FIRST if name in seen), *(name for name in seen if name not in _FIRST)]
    width, height = _SIZE
    rows = max(1, -(-len(names) // _COLUMNS))
    image = Image.new("RGB", (width * min(_COLUMNS, max(1, len(names))), height * rows), "white")
    draw = ImageDraw.Draw(image)
    steps = [int(entry["step"]) for entry in entries]
    skipped = [int(entry["step"]) for entry in entries if "skipped" in entry]
    for place, name in enumerate(names):
        points = [
            (int(entry["step"]), float(entry[name]))
            for entry in entries
            if isinstance(entry.get(name), (int, float)) and math.isfinite(entry[name])
        ]
        if points:
            corner = (place % _COLUMNS * width, place // _COLUMNS * height)
            _Panel(draw, corner, (steps[0], steps[-1]), points).draw(name, skipped)
    held = io.BytesIO()
    image.save(held, "PNG")
    atomic_write_bytes(path, held.getvalue())


class _Panel:
    """One number; steps: the first and the last of the run."""

    def __init__(
        self, draw: ImageDraw.ImageDraw, corner: tuple[int, int], steps: tuple[int, int], points: Points
    ) -> None:
        self._draw, self._steps, self._points = draw, steps, points
        (x, y), (width, height) = corner, _SIZE
        self._x = (x + _LEFT, x + width - _RIGHT)
        self._y = (y + _TOP, y + height - _BOTTOM)
        values = [value for _, value in points]
        low, high = min(values), max(values)
        self._log = low > 0 and high / low > _LOGARITHMIC
        self._ticks = _decades(low, high) if self._log else _round_numbers(low, high)
        self._low, self._high = min(low, self._ticks[0]), max(high, self._ticks[-1])

    def draw(self, name: str, skipped: Sequence[int]) -> None:
        font, small = ImageFont.load_default(15), ImageFont.load_default(12)
        (left, right), (top, bottom) = self._x, self._y
        means = _means(self._points)
        scale = ", logarithmic" if self._log else ""
        self._draw.text((left, top - 26), name.replace("_", " "), fill=_INK, font=font)
        self._draw.text(
            (right, top - 23), f"now {means[-1][1]:.4g}{scale}", fill=_GREY, font=small, anchor="ra"
        )
        for value in self._ticks:
            y = self._place(self._steps[0], value)[1]
            self._draw.line((left, y, right, y), fill=_FAINT)
            self._draw.text((left - 8, y), f"{value:.6g}", fill=_GREY, font=small, anchor="rm")
        for step in _round_steps(*self._steps):
            x = self._place(step, self._low)[0]
            self._draw.line((x, bottom, x, bottom + 4), fill=_GREY)
            self._draw.text((x, bottom + 7), f"{step:,}", fill=_GREY, font=small, anchor="ma")
        self._draw.line((left, bottom, right, bottom), fill=_GREY)
        self._draw.text((left - 8, bottom + 7), "step", fill=_GREY, font=small, anchor="ra")
        self._curve(self._points, _EACH, 1)
        self._curve(means, _MEAN, 2)
        for step in skipped:
            x = self._place(step, self._low)[0]
            self._draw.line((x, bottom - 6, x, bottom), fill=_SKIPPED, width=2)

    def _curve(self, points: Points, colour: tuple[int, int, int], width: int) -> None:
        places = [self._place(*point) for point in points]
        if len(places) == 1:
            x, y = places[0]
            self._draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        else:
            self._draw.line(places, fill=colour, width=width)

    def _place(self, step: int, value: float) -> tuple[float, float]:
        first, last = self._steps
        (left, right), (top, bottom) = self._x, self._y
        along = (step - first) / max(last - first, 1)
        low, high, at = self._low, self._high, value
        if self._log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        up = (at - low) / (high - low) if high > low else 0.5
        return left + along * (right - left), bottom - up * (bottom - top)


def _step_of(span: float, most: int) -> float:
    """1, 2 or 5 times a power of ten, so that `span` has at most `most` of them."""
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    return next(each * power for each in (1, 2, 5, 10) if each * power >= raw * (1 - 1e-9))


def _round_numbers(low: float, high: float) -> list[float]:
    """Numbers that people read, from below `low` to above `high`."""
    span = high - low or abs(high) or 1.0
    step = _step_of(span, 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [each * step for each in range(first, max(last, first + 1) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten around `low` to `high`, with 2 and 5 times them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 3:
        return [10.0**each for each in range(first, last + 1, -(-(last - first) // 5))]
    fine = [each * 10.0**power for power in range(first, last) for each in (1, 2, 5)]
    return [each for each in [*fine, 10.0**last] if low / 2.5 < each < high * 2.5]


def _round_steps(first: int, last: int) -> list[int]:
    step = max(1, round(_step_of(max(last - first, 1), 6)))
    return list(range(-(-first // step) * step, last + 1, step)) or [first]


def _means(points: Points) -> Points:
    window = max(1, min(_FEWEST, len(points) // 4), round(len(points) * _WINDOW))
    means, total = [], 0.0
    for index, (step, value) in enumerate(points):
        total += value
        if index >= window:
            total -= points[index - window][1]
        means.append((step, total / min(index + 1, window)))
    return means
