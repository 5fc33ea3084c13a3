"""Faces of one frame: found where they are, at the sizes and angles that docs/faces.md states, and nowhere
else."""

from __future__ import annotations

import math

import numpy as np
import pytest

from avatarctl.models.face_networks import FaceNetworks
from avatarctl.perception.crops import Region, crop_region
from avatarctl.perception.detect import decode, overlap, suppress, tiles
from avatarctl.perception.mesh import Face, find_faces
from tests.repeats import repeats

from .conftest import NAMES, background, landscape, portrait


def middle(face: Face) -> np.ndarray:
    return (face.box[:2] + face.box[2:]) / 2


PLACES = ((12, 0, "whole"), (20, 30, "whole"), (20, -30, "whole"), (45, 0, "whole"), (6, 0, "near"))
ALL = [(name, *place) for name in NAMES for place in PLACES]
TELLING = [*ALL[:5], *ALL[6::6]]
"""One face in every place, and each of the others in one place of its own."""


@pytest.mark.parametrize(
    ("name", "percent", "angle", "look"), repeats(TELLING, [each for each in ALL if each not in TELLING])
)
def test_a_portrait_is_found_where_it_is(
    name: str, percent: int, angle: int, look: str, networks: FaceNetworks
) -> None:
    side, turned = 12.8 * percent, math.radians(angle)
    place = (640.0, 360.0) if percent > 30 else (417.3, 330.6)
    held = portrait(name)
    frame = np.asarray(held.put(background(), *place, side, turned))
    faces = find_faces(networks, frame, look)
    assert len(faces) == 1
    # The middle of the turned points, not of the turned box: a box of other corners has another middle.
    expected = held.points(held.face.landmarks[:, :2].astype(np.float64), *place, side, turned)
    assert np.abs(middle(faces[0]) - (expected.min(0) + expected.max(0)) / 2).max() <= 0.03 * side
    assert faces[0].presence > 0.9


def test_two_side_by_side(networks: FaceNetworks) -> None:
    scene = background()
    for x in (400, 800):
        scene = portrait("crop").put(scene, x, 360, 230)
    faces = find_faces(networks, np.asarray(scene))
    assert sorted(round(middle(face)[0] / 20) for face in faces) == [20, 40]


@pytest.mark.parametrize("look", ["whole", "near", "far"])
def test_nobody_is_found_where_nobody_is(look: str, networks: FaceNetworks) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (360, 640, 3), np.uint8)
    for frame in (noise, landscape(), np.asarray(background()), np.zeros((90, 160, 3), np.uint8)):
        assert find_faces(networks, frame, look) == []


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (128, 128), (500, 7)])
def test_frames_of_any_shape(size: tuple[int, int], networks: FaceNetworks) -> None:
    assert find_faces(networks, np.full((*size, 3), 90, np.uint8), "far") == []


def test_a_face_at_the_edge_is_found(networks: FaceNetworks) -> None:
    frame = np.asarray(portrait("crop").put(background(), 90, 360, 256))
    (face,) = find_faces(networks, frame)
    assert abs(middle(face)[0] - 90) <= 0.05 * 256


def test_suppression_averages_by_score_and_keeps_the_best_one() -> None:
    """Two rows of one face, one of another; numbers by hand."""
    rows = np.zeros((3, 17))
    rows[:, 0] = 0.9, 0.8, 0.6
    rows[:, 1:5] = (0, 0, 0.4, 0.4), (0.6, 0.6, 1, 1), (0.1, 0, 0.5, 0.4)
    kept = suppress(rows)
    assert kept[:, 0].tolist() == [0.9, 0.8]
    assert kept[0, 1] == pytest.approx(0.6 * 0.1 / 1.5) and kept[1, 1:5].tolist() == [0.6, 0.6, 1, 1]
    assert overlap(rows[0, 1:5], rows[2:, 1:5])[0] == pytest.approx(0.12 / 0.2)


def test_a_logit_of_any_size_is_a_score() -> None:
    scores, boxes = np.full(896, -900.0, np.float32), np.zeros((896, 16), np.float32)
    scores[7], boxes[7, 2:4] = 900.0, 12.8
    (row,) = decode(scores, boxes)
    # Anchor 7 is the second one of the fourth cell of the first row of 16.
    x, y, half = 3.5 / 16, 0.5 / 16, 0.05
    assert row[0] == 1.0 and row[1:5].tolist() == pytest.approx([x - half, y - half, x + half, y + half])


def test_tiles_are_those_that_were_measured() -> None:
    assert len(tiles(720, 1280, "whole")) == 0
    assert len(tiles(720, 1280, "near")) == 3 and len(tiles(720, 1280, "far")) == 3 + 18
    assert len(tiles(512, 512, "near")) == 0 and len(tiles(1280, 720, "far")) == 3 + 18
    for each in tiles(721, 1283, "far"):
        assert 0 <= each.x <= 1283 - each.side and 0 <= each.y <= 721 - each.side


@pytest.mark.parametrize("side", [120.0, 192.0, 384.0, 500.0, 700.0, 1500.0])
def test_a_region_is_cut_where_it_lies(side: float) -> None:
    """Of a plane whose colours are its coordinates, turned: any crop is known. 0.6 of a level is one pixel of
    1280 and a half."""
    y, x = np.mgrid[:720, :1280]
    frame = np.stack([x / 1280 * 255, y / 720 * 255, 0 * x], -1).round().astype(np.uint8)
    angle = 0.4
    crop = crop_region(frame, Region(640.0, 360.0, min(side, 480.0), angle))[0].numpy()
    places = (np.arange(192) + 0.5) / 192 - 0.5
    u, v = np.meshgrid(places * min(side, 480.0), places * min(side, 480.0))
    for plane, axis, length in (
        (0, 640 + u * math.cos(angle) - v * math.sin(angle), 1280),
        (1, 360 + u * math.sin(angle) + v * math.cos(angle), 720),
    ):
        expected = np.clip((axis - 0.5) / length * 255, 0, 255 * (length - 1) / length)
        assert np.abs(crop[plane] - expected).max() <= 0.6
