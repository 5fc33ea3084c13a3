"""The image of a run's curves: every number has its panel, whatever the log holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from avatarctl.training.curves import draw_curves

MEAN, SKIPPED = (20, 80, 180), (200, 40, 40)


def drawn(path: Path, entries: list[dict[str, Any]]) -> np.ndarray:
    draw_curves(path, entries)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def places(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Columns with this colour."""
    return np.flatnonzero((pixels == colour).all(axis=-1).any(axis=0))


def log(count: int) -> list[dict[str, Any]]:
    return [{"step": step, "gradient_norm": 3.0, "loss": 1 / step} for step in range(1, count + 1)]


def test_a_long_run_has_two_panels_and_marks_where_it_skipped(tmp_path: Path) -> None:
    entries = log(5000)
    entries[2499] = {"step": 2500, "loss": None, "gradient_norm": None, "skipped": "a"}
    pixels = drawn(tmp_path / "x.png", entries)
    assert pixels.shape == (260, 1280, 3)
    curve, marks = places(pixels, MEAN), places(pixels, SKIPPED)
    assert len(curve[curve < 640]) > 500 and len(curve[curve >= 640]) > 500
    middle = (76 + 620) / 2
    assert marks.size and all(min(abs(x - middle), abs(x - 640 - middle)) < 3 for x in marks)


def test_the_loss_stands_first_and_falls_to_the_right(tmp_path: Path) -> None:
    """1 / step over 5000 steps: logarithmic, so that the end is not one line with zero."""
    left = drawn(tmp_path / "x.png", log(5000))[:, :640]
    rows = [np.flatnonzero((left[:, x] == MEAN).all(axis=-1)).mean() for x in (90, 200, 610)]
    assert rows[0] < rows[1] - 20 < rows[2] - 40


@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_runs_are_drawn(count: int, tmp_path: Path) -> None:
    pixels = drawn(tmp_path / "x.png", log(count))
    assert bool(places(pixels, MEAN).size) == bool(count)


def test_numbers_that_never_were_leave_an_empty_panel(tmp_path: Path) -> None:
    pixels = drawn(tmp_path / "x.png", [{"step": 1, "loss": None, "skipped": "a"}])
    assert not places(pixels, MEAN).size
