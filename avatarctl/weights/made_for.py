"""The shape of the videos that weights were trained for, as far as it is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from avatarctl.registry import ROWS, Row, VideoShape, video_shape
from avatarctl.weights.metadata import read_own
from avatarctl.weights.weight_file import WeightFile

__all__ = ["made_for_others", "trained_shape"]


def trained_shape(held: WeightFile) -> VideoShape | None:
    """What these weights were trained for. No tensor tells: the name of the file does, or of the file that it
    was converted from."""
    origins = (str(step.get("source")) for step in read_own(held.metadata).operations)
    names = [held.path.name, *(file.name for file in held.files), *origins]
    stems = {Path(name).stem for name in names}
    published = {Path(name).stem: row.made_for for row in _of_family(held) for name in row.files}
    return next((shape for stem, shape in published.items() if stem in stems), None)


def made_for_others(held: WeightFile, size: tuple[int, int]) -> str:
    """What to say of weights that were trained for videos of another shape than (width, height), empty for
    nothing."""
    shape, asked = trained_shape(held), video_shape(*size)
    if shape in (None, asked):
        return ""
    fits = next((f"; {row.name} is made for such" for row in _of_family(held) if row.made_for == asked), "")
    return f"{held.path} was trained for {shape} videos, and this one is {size[0]}x{size[1]}{fits}"


def _of_family(held: WeightFile) -> Iterator[Row]:
    return (row for row in ROWS.values() if row.family == held.layout.family)
