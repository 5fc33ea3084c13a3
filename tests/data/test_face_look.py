"""`data.face_look` reaches the tracker and decides what samples are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from avatarctl.data import faces
from avatarctl.data.faces import face_plan, faces_of
from avatarctl.families import family_named
from avatarctl.registry import configure
from tests.data.test_face_notes import Nothing


def test_a_look_is_another_making_and_reaches_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    family: Any = family_named("omniavatar")
    looked: list[str] = []
    monkeypatch.setattr(
        "avatarctl.perception.track.find_faces",
        lambda networks, frame, look="whole": looked.append(look) or [],
    )
    monkeypatch.setattr(faces, "cpu_networks", lambda: None)
    facts = []
    for words, expected in ((), {"whole", "near"}), (("data.face_look=far",), {"whole", "far"}):
        cfg = configure("model.name=cartoon-i2v", "data.faces=auto", *words)
        plan = face_plan(cfg, family)
        assert plan is not None
        video: Any = Video()
        assert len(list(faces_of(plan, video, "a"))) == Video.frames
        assert set(looked) == expected
        looked.clear()
        facts.append(plan.facts("a"))
    assert facts[0] != facts[1]


class Video(Nothing):
    frames = 8

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.zeros((stop - start, 54, 96, 3), np.uint8)
