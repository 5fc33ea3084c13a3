"""A head that is elsewhere from one frame to the next, as at a jump cut: nothing reaches across."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from avatarctl.perception.align import Aligner
from avatarctl.perception.face_file import Clip, FaceFileWriter
from avatarctl.perception.mesh import Face, alignment_points, region_of_landmarks
from avatarctl.perception.smooth import Smoother, TrackedFace
from avatarctl.perception.track import _Followed

from .conftest import GOLDEN

OWN = load_file(GOLDEN / "final.safetensors")["a.landmarks_refined"].astype(np.float32)


def face(x: float, y: float = 0.0) -> Face:
    return Face(OWN + np.array([x, y, 0], np.float32), 1.0)


SIDE = face(0).side


def smoothed(places: list[float]) -> list[TrackedFace]:
    smoother, given = Smoother(), []
    for x in places:
        given += smoother.add({0: face(x)})
    given += smoother.finish()
    return [faces[0] for faces in given]


def off(found: list[TrackedFace], places: list[float]) -> np.ndarray:
    rest = alignment_points(OWN)
    return np.array([(each.points - rest).mean(0)[0] - x for each, x in zip(found, places, strict=True)])


@pytest.mark.parametrize("speed", [0.0, 0.03])
@pytest.mark.parametrize("jump", [0.06, -0.2])
def test_points_are_not_smoothed_across_a_jump(jump: float, speed: float) -> None:
    places = [SIDE * (speed * i + jump * (i >= 20)) for i in range(40)]
    found = smoothed(places)
    assert [number for number, each in enumerate(found) if each.jumped] == [20]
    assert np.abs(off(found, places)).max() <= 1e-3 * SIDE


def test_what_is_measured_wrong_once_is_still_smoothed() -> None:
    places = [SIDE * 0.1 * (i == 20) for i in range(40)]
    found = smoothed(places)
    assert not any(each.jumped for each in found)
    there = alignment_points(OWN)
    assert (found[20].points - there)[:, 0] == pytest.approx(SIDE * 0.1 / 3, rel=1e-3), "7 of 21 parts"


def test_a_head_that_moves_quickly_does_not_jump() -> None:
    """Half a side to and fro in a second, and one that sets off within a frame."""
    to_and_fro = [SIDE * 0.25 * np.sin(2 * np.pi * i / 25) for i in range(50)]
    sets_off = [SIDE * 0.08 * max(0, i - 20) for i in range(40)]
    for places in (to_and_fro, sets_off):
        assert not any(each.jumped for each in smoothed(list(map(float, places))))


def test_the_crop_carries_nothing_across_a_jump(tmp_path: Path) -> None:
    points = [np.array([[20.0, 20.0], [60.0, 20.0], [x, 45.0]]) for x in (40.0, 46.0)]
    box = np.array([10.0, 10.0, 70.0, 70.0])
    with FaceFileWriter(tmp_path / "f", Clip("x", 2, 96, 54), 64, "none") as writer:
        writer.add(TrackedFace(0, box, points[0], None, 1.0, True))
        matrix = writer.add(TrackedFace(0, box, points[1], None, 1.0, True, jumped=True))
    assert matrix is not None and np.array_equal(matrix, Aligner(64).fit(points[1]))


def test_a_jump_is_no_speed() -> None:
    """The next frame is predicted where the face is, not further on."""
    first = face(0)
    followed = _Followed(0, first, region_of_landmarks(first.landmarks), 0)
    followed.move(face(1))
    followed.move(face(2))
    followed.move(face(2 + 0.2 * SIDE))
    assert followed.speed is None
    assert followed.predicted.x == pytest.approx(region_of_landmarks(followed.face.landmarks).x)
    followed.move(face(3 + 0.2 * SIDE))
    assert followed.speed == pytest.approx((1, 0), abs=1e-3)
