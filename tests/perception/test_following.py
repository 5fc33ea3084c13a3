"""Who is followed where several people are in a frame, and what becomes of a face that jumps."""

from __future__ import annotations

import numpy as np
import pytest

from avatarctl.models.face_networks import FaceNetworks
from avatarctl.perception import track
from avatarctl.perception.track import FrameFaces, track_faces

from .conftest import background, portrait

Place = tuple[float, float, float]  # x, y, side


def frame(*places: Place, size: tuple[int, int] = (384, 216)) -> np.ndarray:
    image = background(*size)
    for x, y, side in places:
        image = portrait("crop").put(image, x, y, side)
    return np.asarray(image)


def followed(networks: FaceNetworks, frames: list[np.ndarray]) -> list[FrameFaces]:
    return list(track_faces(networks, [np.stack(frames)]))


def middle(found: FrameFaces) -> float:
    (face,) = found.faces
    return float(face.box[[0, 2]].mean())


ONE, BESIDE = (110.0, 108.0, 90.0), (260.0, 108.0, 70.0)


def test_a_hidden_frame_does_not_hand_the_scene_to_the_neighbour(networks: FaceNetworks) -> None:
    both, hidden = frame(ONE, BESIDE), frame(BESIDE)
    for length in (1, 6):
        found = followed(networks, [both] * 3 + [hidden] * length + [both] * 3)
        for number, each in enumerate(found):
            assert each.faces[0].person == 0 and abs(middle(each) - ONE[0]) <= 4, (length, number)
            assert each.faces[0].seen != (3 <= number < 3 + length)


def test_who_sits_close_beside_a_hidden_face_is_not_taken_for_it(networks: FaceNetworks) -> None:
    """Within the reach of who was lost ten frames ago, and near the place where somebody else was seen."""
    close = (220.0, 108.0, 80.0)
    found = followed(networks, [frame(ONE, close)] * 2 + [frame(close)] * 11 + [frame(ONE, close)] * 2)
    assert all(abs(middle(each) - ONE[0]) <= 4 for each in found)


def test_a_face_that_jumps_is_followed_at_once_as_another(networks: FaceNetworks) -> None:
    """Without a cut that is seen; nothing is filled in between."""
    there, size = (210.0, 100.0, 90.0), (640, 360)
    found = followed(networks, [frame(ONE, size=size)] * 3 + [frame(there, size=size)] * 3)
    for number, each in enumerate(found):
        assert each.faces[0].seen and each.faces[0].person == (number >= 3)
        assert not each.starts_scene or not number
        assert abs(middle(each) - (there if number >= 3 else ONE)[0]) <= 4


def test_who_left_for_good_is_not_looked_for_for_ever(
    networks: FaceNetworks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole frame is searched every 5 frames while somebody may come back, then every 25, for people who
    come in. Their number is not given again."""
    monkeypatch.setattr(track, "_MISSED", 10)
    searched = []
    real = track.find_faces
    monkeypatch.setattr(
        track, "find_faces", lambda *words: searched.append(tracker._measured) or real(*words)
    )
    tracker = track.FaceTracker(networks, people="all", look="whole")
    frames = [frame(ONE, BESIDE)] + [frame(BESIDE)] * 30 + [frame(ONE, BESIDE)] * 21
    found = tracker.push(np.stack(frames)) + tracker.finish()
    assert tracker._lost == [] and searched == [0, 1, 6, 11, 25, 50]
    assert {face.person for each in found for face in each.faces} == {0, 1, 2}
