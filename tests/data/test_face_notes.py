"""What is said about the faces of a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from avatarctl.data import face_windows
from avatarctl.data.faces import FacePlan
from avatarctl.data.prepare import _summary
from avatarctl.data.report import Done
from avatarctl.data.windows import Cutting, RawVideo, Walked
from avatarctl.errors import PartlyFailed, UnusableVideo
from avatarctl.perception.smooth import TrackedFace
from avatarctl.perception.track import FrameFaces, People

BOX = np.array([20.0, 10.0, 60.0, 50.0])
POINTS = np.array([[30.0, 20.0], [50.0, 20.0], [40.0, 30.0]])


class Nothing:
    """Stands for a video, and for what writes samples."""

    width, height = 96, 54

    def look(self, *arguments: object) -> None: ...
    def write(self, *arguments: object) -> None: ...


def walked(
    people: People,
    persons: list[int | None],
    cuts: set[int],
    monkeypatch: pytest.MonkeyPatch,
    odd: int = -1,
) -> Walked:
    """A source with the faces of these persons, None for nobody. odd: a frame in which the face was filled,
    is 8 pixels further on, and is hardly one."""
    blank = np.zeros((54, 96, 3), np.uint8)

    def faces_of(*arguments: object) -> Any:
        for number, person in enumerate(persons):
            points, presence = (POINTS + 8, 0.6) if number == odd else (POINTS, 1.0)
            face = (
                () if person is None else (TrackedFace(person, BOX, points, None, presence, number != odd),)
            )
            yield blank, FrameFaces(number, number in cuts | {0}, face)

    monkeypatch.setattr(face_windows, "faces_of", faces_of)
    monkeypatch.setattr(FacePlan, "detector", lambda self, video: "none")
    plan = FacePlan(people, False, 32)
    cutting = Cutting(2, 2, None, (32, 32), "crop", "audio.wav", False, plan)
    nothing: Any = Nothing()
    return face_windows.walk_faces(nothing, nothing, cutting, plan, RawVideo("a", Path("a"), None, ""))


def test_a_change_of_person_without_a_cut_is_said_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    persons = [0, 0, None, 1, 1, 0, 0, 0, None, 0]
    found = walked("largest", persons, {5}, monkeypatch)
    assert found.faces is not None and found.faces["switches"] == [3]
    assert any("at frame 3;" in note for note in found.notes)
    found = walked("all", persons, {5}, monkeypatch)
    assert found.faces is not None and found.faces["switches"] == []


def test_each_window_says_how_doubtful_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Least presence, filled frames, longest step in sides of the face, of 40 pixels."""
    found = walked("largest", [0, 0, 0, 0, 0, 0], set(), monkeypatch, odd=3)
    assert found.faces is not None
    assert found.faces["doubts"] == [[1.0, 0, 0.0], [0.6, 1, 0.2], [1.0, 0, 0.2]]


def test_one_frame_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnusableVideo, match="to be seen for 1 frame at most, and a window has 2"):
        walked("largest", [0, None, 0], set(), monkeypatch)


def done(name: str, kind: Literal["sample", "source"], reason: str = "") -> Done:
    return Done(name, "failed" if reason else "done", reason, kind=kind)


@pytest.mark.parametrize(
    ("results", "says"),
    [
        (
            [
                done("a.mp4", "source"),
                done("b.mp4", "source", "raw/b.mp4: shows no face"),
                done("a.mp4/0", "sample"),
            ],
            "1 of 2 videos failed; the first: raw/b.mp4: shows no face",
        ),
        (
            [done("a", "sample"), done("b", "sample", "audio.wav: is empty"), done("c", "sample", "x")],
            "2 of 3 samples failed; the first: b: audio.wav: is empty",
        ),
        (
            [done("a.mp4", "source", "torn"), done("b", "sample"), done("c", "sample", "x")],
            "1 of 1 video and 1 of 2 samples failed; the first: a.mp4: torn",
        ),
    ],
)
def test_the_last_line_counts_videos_as_videos(results: list[Done], says: str) -> None:
    with pytest.raises(PartlyFailed) as caught:
        _summary(results, Path("report.txt"), 1.0)
    assert caught.value.what == says
