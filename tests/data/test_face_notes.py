"""What is said about the faces of a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avatarctl.data import face_windows
from avatarctl.data.faces import FacePlan
from avatarctl.data.windows import Cutting, RawVideo, Walked
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
    people: People, persons: list[int | None], cuts: set[int], monkeypatch: pytest.MonkeyPatch
) -> Walked:
    """A source with the faces of these persons, None for nobody."""
    blank = np.zeros((54, 96, 3), np.uint8)

    def faces_of(*arguments: object) -> Any:
        for number, person in enumerate(persons):
            face = () if person is None else (TrackedFace(person, BOX, POINTS, None, 1.0, True),)
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
