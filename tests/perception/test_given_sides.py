"""A table with left and right swapped is refused, however the head is tilted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from avatarctl.errors import UnusableFile
from avatarctl.perception.given import read_given_faces

FIVE = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
FACE = np.array([[-20.0, -15.0], [20.0, -15.0], [3.0, 4.0], [-15.0, 20.0], [15.0, 20.0]])


def table(path: Path, names: tuple[str, ...], points: np.ndarray) -> Path:
    columns = [f"{name}_{axis}" for name in names for axis in "xy"]
    path.write_text(
        f"frame,x0,y0,x1,y1,{','.join(columns)}\n0,60,60,140,140,{','.join(map(str, points.reshape(-1)))}\n"
    )
    return path


@pytest.mark.parametrize("degrees", range(-160, 181, 20))
def test_both_sides_swapped(degrees: int, tmp_path: Path) -> None:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned = FACE @ np.array([[cos, sin], [-sin, cos]]) + 100
    three = ("left_brow", "right_brow", "nose")
    for names, right in ((FIVE, turned), (three, turned[:3])):
        read_given_faces(table(tmp_path / "good.csv", names, right))
        order = [1, 0, 2, 4, 3][: len(names)]
        with pytest.raises(UnusableFile, match="left is left in the image") as refused:
            read_given_faces(table(tmp_path / "swapped.csv", names, right[order]))
        assert "swapped.csv:2" in str(refused.value)
        assert f"the columns {names[0]} and {names[1]} are swapped" in str(refused.value)
