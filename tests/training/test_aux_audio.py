"""Audio that the sync loss can be taken against: of every frame of the clip, and not constant within it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avatarctl.data.training_set import TrainingSet
from avatarctl.errors import UnusableFile
from avatarctl.events import silent
from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.registry import configure, find_model
from avatarctl.timeline import SAMPLES_PER_FRAME

CLIP = 9
"""Pixel frames of a clip; the samples have 17."""


def looked_at(data: Path) -> TrainingSet:
    cfg = configure(
        "model.name=cartoon-v2v", f"data.path={data}", "data.width=32", "data.height=32",
        f"data.num_frames={CLIP}",
    )  # fmt: skip
    found = TrainingSet(cfg, find_model("cartoon-v2v"), OmniAvatar(), silent, with_audio=True)  # type: ignore[arg-type]
    found.check()
    return found


@pytest.fixture
def data(samples: Path, tmp_path: Path) -> Path:
    for name in ("000000", "000001"):
        shutil.copytree(samples / name, tmp_path / name)
    return tmp_path


def rewrite(data: Path, name: str, audio: np.ndarray) -> None:
    soundfile.write(data / name / "audio.wav", audio, 16_000)


def voice(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, count).astype(np.float32)


def test_audio_that_ends_before_the_clip_is_no_audio_of_it(data: Path) -> None:
    """The trainer's windows would go on in silence."""
    rewrite(data, "000001", voice((CLIP - 1) * SAMPLES_PER_FRAME))
    found = looked_at(data)
    assert found.bad.keys() == {"000001"}
    assert "too short for the sync loss: 8 of the 9 frames" in str(found.bad["000001"])
    rewrite(data, "000000", voice(3200))
    with pytest.raises(UnusableFile, match="5 of the 9 frames") as caught:
        looked_at(data)
    assert caught.value.exit_code == 3


def test_audio_that_is_silent_in_the_clip_alone_is_silent(data: Path) -> None:
    later, before = voice(17 * SAMPLES_PER_FRAME), voice(17 * SAMPLES_PER_FRAME)
    later[: CLIP * SAMPLES_PER_FRAME] = 0
    before[CLIP * SAMPLES_PER_FRAME :] = 0
    rewrite(data, "000000", before)
    rewrite(data, "000001", later)
    found = looked_at(data)
    assert found.bad.keys() == {"000001"}
    assert "silent in the 9 frames of the clip" in str(found.bad["000001"])


def test_audio_that_ends_within_the_last_frame_is_whole(data: Path) -> None:
    """Files of audio and video seldom end at the same sample."""
    rewrite(data, "000001", voice((CLIP - 1) * SAMPLES_PER_FRAME + 1))
    assert not looked_at(data).bad
