"""Hulls and lip rings, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.numpy import load_file

from avatarctl.perception.masks import LIPS_OUTER, convex_hull, face_mask, fill_polygon, lip_mask

from .conftest import GOLDEN

LANDMARKS = load_file(GOLDEN / "final.safetensors")
UPPER = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291)
LOWER = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291)
SIZE = (576, 768)


@pytest.mark.parametrize("name", ["a", "d"])
def test_a_hull_holds_what_lies_inside_every_side(name: str) -> None:
    points = LANDMARKS[f"{name}.landmarks_refined"]
    mask = face_mask([points], SIZE)
    hull = convex_hull(points[:, :2].astype(np.float64))
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    inside = np.ones(SIZE, bool)
    for (ax, ay), (bx, by) in zip(hull, np.roll(hull, -1, 0), strict=True):
        inside &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= 0
    assert set(np.unique(mask)) == {0, 255}
    assert np.count_nonzero((mask > 0) != inside) <= 2  # middles on a side
    for px, py in points[:, :2]:
        assert mask[int(py) - 1 : int(py) + 2, int(px) - 1 : int(px) + 2].any()


@pytest.mark.parametrize("name", ["a", "b", "c", "two.0"])
def test_the_ring_is_both_arcs_filled_and_united(name: str) -> None:
    """spec/face-models.md 8, with another program's polygons, which fill their edge as well."""
    points = LANDMARKS[f"{name}.landmarks_refined"]
    scaled = points * 4
    image = Image.new("L", (3072, 3072))
    for arc in (UPPER, LOWER):
        ImageDraw.Draw(image).polygon([tuple(scaled[i, :2]) for i in arc], fill=255)
    ours, theirs = lip_mask([scaled], (3072, 3072)) > 0, np.asarray(image) > 0
    assert (ours & theirs).sum() / (ours | theirs).sum() >= 0.97
    assert len(set(LIPS_OUTER)) == 20


def test_faces_are_united_and_nobody_is_an_empty_mask() -> None:
    first, second = (LANDMARKS[f"two.{n}.landmarks_refined"] for n in (0, 1))
    both = face_mask([first, second], (400, 800))
    assert np.array_equal(both, face_mask([first], (400, 800)) | face_mask([second], (400, 800)))
    assert not face_mask([], (40, 80)).any() and not lip_mask([], (40, 80)).any()


def test_a_margin_makes_a_hull_larger_by_its_share() -> None:
    points = LANDMARKS["a.landmarks_refined"]
    plain, wide = (np.count_nonzero(face_mask([points], SIZE, margin=share)) for share in (0.0, 0.1))
    assert wide / plain == pytest.approx(1.21, abs=0.01)


def test_what_lies_outside_the_frame_is_cut() -> None:
    square = np.array([(-5.0, -5.0), (4.0, -5.0), (4.0, 3.0), (-5.0, 3.0)])
    mask = fill_polygon(square, (10, 10))
    assert mask.sum() == 12 and mask[:3, :4].all()
    assert not fill_polygon(square - 50, (10, 10)).any() and not fill_polygon(square + 50, (10, 10)).any()
