"""Faces of a video: followed, lost, found again, never mixed over a cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from avatarctl.models.face_networks import FaceNetworks
from avatarctl.perception.align import Aligner, template
from avatarctl.perception.mesh import Face, alignment_points
from avatarctl.perception.smooth import DELAY, MOST_MISSING, Smoother
from avatarctl.perception.track import FaceTracker, FrameFaces, track_faces
from tests.repeats import repeats

from .conftest import GOLDEN, NAMES, background, portrait


def video(places: list[tuple[float, float] | None], name: str = "crop", side: float = 128) -> np.ndarray:
    """640 x 360 frames with the middle of a face in these places."""
    scene = background(640, 360)
    return np.stack(
        [np.asarray(portrait(name).put(scene, *place, side) if place else scene) for place in places]
    )


@pytest.mark.parametrize("name", repeats([*NAMES[:2]], [*NAMES[2:]]))
def test_crops_of_a_moved_portrait_agree(name: str, networks: FaceNetworks) -> None:
    """What is at the three points of the portrait comes to the same place of every 256-pixel crop, on their
    mean: within a pixel of where it mostly is. The face takes 20 % of the long side."""
    held, side = portrait(name), 256.0
    places = [(500 + 5.37 * i, 350 + 12 * math.sin(i / 4)) for i in range(9)]
    frames = np.stack([np.asarray(held.put(background(), *place, side)) for place in places])
    aligner, own = Aligner(256), alignment_points(held.face.landmarks)
    means = []
    for found, place in zip(track_faces(networks, [frames]), places, strict=True):
        (face,) = found.faces
        matrix = aligner.fit(face.points)
        true = held.points(own, *place, side) - 0.5
        means.append((true @ matrix[:, :2].T + matrix[:, 2]).mean(0))
    off = np.abs(np.array(means) - np.median(means, axis=0)).max()
    assert off <= 1.0, off


def test_pieces_of_any_length_give_the_same(networks: FaceNetworks) -> None:
    frames = video([(200 + 4.0 * i, 180) for i in range(9)])

    def points(pieces: list[np.ndarray]) -> list[np.ndarray]:
        found = list(track_faces(networks, pieces))
        assert [each.frame for each in found] == list(range(9))
        return [each.faces[0].points for each in found]

    whole = points([frames])
    assert np.array_equal(whole, points([frames[:1], frames[1:4], frames[4:]]))


@pytest.fixture(scope="module")
def interrupted(networks: FaceNetworks) -> list[FrameFaces]:
    """There for 8 frames, hidden for 6, there for 8, gone for 20, there for 6 elsewhere."""
    there, hidden = [(200 + 2.0 * i, 180.0) for i in range(22)], [None] * 6
    places = [*there[:8], *hidden, *there[14:], *[None] * 20, *[(450.0, 150.0)] * 6]
    return list(track_faces(networks, [video(places)]))


def test_a_short_gap_is_filled_and_said(interrupted: list[FrameFaces]) -> None:
    for frame in (7, 14):
        assert interrupted[frame].faces[0].seen
    for frame in range(8, 14):
        (face,) = interrupted[frame].faces
        assert not face.seen
        middle = (face.box[:2] + face.box[2:]) / 2
        assert abs(middle[0] - (200 + 2.0 * frame)) <= 3 and abs(middle[1] - 180) <= 3


def test_a_face_that_leaves_and_comes_back(interrupted: list[FrameFaces]) -> None:
    """A long gap stays empty; searches are `LOOK_EVERY` frames apart."""
    assert all(interrupted[frame].faces for frame in range(22))
    assert not any(interrupted[frame].faces for frame in range(23, 42))
    last = interrupted[-1].faces[0]
    assert last.seen and abs((last.box[0] + last.box[2]) / 2 - 450) <= 4
    assert [each.frame for each in interrupted if each.starts_scene] == [0]


def test_a_cut_between_two_people(networks: FaceNetworks) -> None:
    """Behind it a face elsewhere is found at once, as somebody new, and no point lies between the two."""
    first = video([(170.0, 200.0)] * 8)
    other = np.asarray(portrait("crop").put(background(640, 360, seed=3), 480, 150, 150))
    frames = np.concatenate([first, np.stack([other] * 8)])
    for people, names in (("largest", (0, 0)), ("all", (0, 1))):
        found = list(track_faces(networks, [frames], people=people))
        assert [each.frame for each in found if each.starts_scene] == [0, 8]
        for each in found:
            (face,) = each.faces
            x = 170 if each.frame < 8 else 480
            assert face.seen and face.person == names[each.frame >= 8]
            assert np.abs(face.points.mean(0)[0] - x) <= 12


def test_another_person_has_another_number(networks: FaceNetworks) -> None:
    """The larger of two leaves: for as long as the gap could be filled nobody is followed, then the other
    one, by another number, and no point lies between them."""
    scene = portrait("crop").put(background(384, 216), 288, 108, 70)
    both = np.asarray(portrait("crop").put(scene, 96, 108, 90))
    frames = np.stack([both] * 4 + [np.asarray(scene)] * 18)
    found = list(track_faces(networks, [frames]))
    assert not any(each.faces for each in found[4 : 4 + MOST_MISSING + 1])
    assert len(found[-1].faces) == 1
    for each in found:
        for face in each.faces:
            left = each.frame < 4
            assert face.seen and face.person == (0 if left else 1)
            assert abs(face.points.mean(0)[0] - (96 if left else 288)) <= 10, each.frame


def test_everybody_keeps_a_number(networks: FaceNetworks) -> None:
    frames = []
    for i in range(8):
        scene = portrait("crop").put(background(640, 360), 160 + 3 * i, 180, 110)
        frames.append(np.asarray(portrait("crop").put(scene, 480 - 3 * i, 180, 130)))
    found = list(track_faces(networks, [np.stack(frames)], people="all"))
    for each in found:
        left, right = sorted(each.faces, key=lambda face: face.box[0])
        assert (left.person, right.person) == (1, 0), "the larger one was named first"
    assert len(next(track_faces(networks, [np.stack(frames[:2])])).faces) == 1


def test_nobody_in_a_video(networks: FaceNetworks) -> None:
    found = list(track_faces(networks, [video([None] * 12)]))
    assert len(found) == 12 and not any(each.faces for each in found)
    assert list(track_faces(networks, [])) == []


def test_what_is_kept_does_not_grow(networks: FaceNetworks) -> None:
    tracker, frames = FaceTracker(networks), video([(200.0, 180.0)])
    given = sum(len(tracker.push(frames)) for _ in range(40))
    assert given == 40 - 2 - DELAY
    assert len(tracker._waiting) == 2 and len(tracker._smoother._people[0]) <= 2 * DELAY + 2
    assert len(tracker.finish()) == 2 + DELAY


def moved(landmarks: np.ndarray, matrix: np.ndarray) -> Face:
    flat = landmarks[:, :2] @ matrix[:, :2].T + matrix[:, 2]
    return Face(np.hstack([flat, landmarks[:, 2:]]).astype(np.float32), 1.0)


def test_known_motion_gives_the_matrices_of_that_motion() -> None:
    """Given landmarks, moved, turned and scaled as stated: the crop's corners come from where they should, to
    a pixel of the frame, also where the motion speeds up, at both ends and in a filled gap."""
    own = load_file(GOLDEN / "final.safetensors")["a.landmarks_refined"].astype(np.float64)
    motion = []
    for i in range(40):
        angle, scale = 0.3 * math.sin(i / 7), 1 + 0.2 * math.sin(i / 9)
        turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        motion.append(np.hstack([turn, [[120 * math.sin(i / 8)], [5.0 * i]]]))
    smoother, aligner = Smoother(), Aligner(512, smooth=False)
    given = []
    for i, matrix in enumerate(motion):
        given += smoother.add({} if 20 <= i < 24 else {0: moved(own, matrix)})
    given += smoother.finish()
    first = aligner.fit(alignment_points(own)).astype(np.float64)
    corners = np.array([(0, 0), (419, 0), (0, 559), (419, 559)], float)
    at_rest = (corners - first[:, 2]) @ np.linalg.inv(first[:, :2]).T
    for i, (faces, matrix) in enumerate(zip(given, motion, strict=True)):
        fitted = aligner.fit(faces[0].points).astype(np.float64)
        source = (corners - fitted[:, 2]) @ np.linalg.inv(fitted[:, :2]).T + 0.5
        expected = (at_rest + 0.5) @ matrix[:, :2].T + matrix[:, 2]
        # A gap of four frames is filled by a straight line, which leaves this curve by some pixels.
        assert np.abs(source - expected).max() <= (1.0 if not 17 <= i < 27 else 8.0), i
        assert faces[0].seen == (not 20 <= i < 24)


def test_smoothing_takes_jitter_and_no_motion() -> None:
    """Noise of one pixel becomes 0.58 of it (the norm of the seven weights); a parabola stays as it is."""
    own = load_file(GOLDEN / "final.safetensors")["a.landmarks_refined"].astype(np.float64)
    noise = np.random.default_rng(0).normal(size=(400, 2))
    still, curve = Smoother(), Smoother()
    shaken, bent = [], []
    for i in range(400):
        eye = np.eye(2)
        shaken += still.add({0: moved(own, np.hstack([eye, noise[i, :, None]]))})
        bent += curve.add({0: moved(own, np.hstack([eye, [[0.01 * i * i], [0.0]]]))})
    shaken += still.finish()
    bent += curve.finish()
    rest = alignment_points(own)
    left = np.array([faces[0].points - rest for faces in shaken])[:, 0]
    assert 0.5 <= left.std() / noise.std() <= 0.65
    off = [faces[0].points[0, 0] - rest[0, 0] - 0.01 * i * i for i, faces in enumerate(bent)]
    assert np.abs(off).max() <= 1e-3 * 400


@pytest.mark.parametrize(("length", "filled"), [(MOST_MISSING, True), (MOST_MISSING + 1, False)])
def test_how_long_a_gap_may_be(length: int, filled: bool) -> None:
    own = load_file(GOLDEN / "final.safetensors")["a.landmarks_refined"].astype(np.float64)
    face, smoother = moved(own, np.eye(2, 3)), Smoother()
    given = []
    for faces in ({0: face}, *[{}] * length, {0: face}):
        given += smoother.add(faces)
    given += smoother.finish()
    assert [bool(faces) for faces in given] == [True, *[filled] * length, True]


def test_the_template_is_the_published_one() -> None:
    """spec/face-alignment.md 2: for 512 pixels 5.6 times (17, 20), (58, 20), (37.5, 40)."""
    assert template(512) == pytest.approx(np.array([(95.2, 112), (324.8, 112), (210, 224)]))
