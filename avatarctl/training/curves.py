"""The curves of a run as an image: where people would rather look than read."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw

from avatarctl.atomic import atomic_write_bytes

__all__ = ["draw_curves"]

_SIZE: Final = (960, 240)
_MARGIN: Final = (64, 20, 12, 24)  # left, top, right, bottom
_INK, _FAINT, _LINE, _MEAN = (32, 32, 32), (220, 220, 220), (170, 190, 220), (20, 80, 180)
_WINDOW: Final = 0.02
"""Share of the steps that the thick line averages over."""


def draw_curves(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """One panel below another for every number of the log: thin each step, thick its running mean."""
    names = [
        name
        for name in dict.fromkeys(name for entry in entries for name in entry)
        if name not in ("step", "skipped")
    ]
    width, height = _SIZE
    image = Image.new("RGB", (width, max(1, len(names)) * height), "white")
    draw = ImageDraw.Draw(image)
    for row, name in enumerate(names):
        points = [
            (entry["step"], float(entry[name]))
            for entry in entries
            if isinstance(entry.get(name), (int, float)) and math.isfinite(entry[name])
        ]
        if points:
            _panel(draw, row * height, name, points)
    held = io.BytesIO()
    image.save(held, "PNG")
    atomic_write_bytes(path, held.getvalue())


def _panel(draw: ImageDraw.ImageDraw, top: int, name: str, points: list[tuple[int, float]]) -> None:
    width, height = _SIZE
    left, above, right, below = _MARGIN
    x0, x1, y0, y1 = left, width - right, top + above, top + height - below
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0

    def place(step: float, value: float) -> tuple[float, float]:
        along = (step - steps[0]) / max(steps[-1] - steps[0], 1)
        return x0 + along * (x1 - x0), y1 - (value - low) / span * (y1 - y0)

    for value in (low, (low + high) / 2, high):
        y = place(steps[0], value)[1]
        draw.line((x0, y, x1, y), fill=_FAINT)
        draw.text((4, y - 6), f"{value:.4g}", fill=_INK)
    draw.text((x0, top + 4), name, fill=_INK)
    draw.text((x0, y1 + 6), f"step {steps[0]}", fill=_INK)
    draw.text((x1 - 70, y1 + 6), f"step {steps[-1]}", fill=_INK)
    draw.line([place(*point) for point in points], fill=_LINE)
    draw.line([place(step, value) for step, value in _means(points)], fill=_MEAN, width=2)


def _means(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    window = max(1, round(len(points) * _WINDOW))
    means, total = [], 0.0
    for index, (step, value) in enumerate(points):
        total += value
        if index >= window:
            total -= points[index - window][1]
        means.append((step, total / min(index + 1, window)))
    return means
