"""The model that comes with the program, through the same loop as `avatarctl infer`, on faces and voices that
it never saw: the mouth follows the audio, and follows nothing else (spec/cartoon-world.md 9)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from avatarctl.demo.clips import HELD_OUT, Clip, clip
from avatarctl.demo.mouth_meter import correlation, measure_mouth
from avatarctl.events import silent
from avatarctl.media import audio_from_array, image_from_array
from avatarctl.pipelines.infer import generate, load
from avatarctl.pipelines.job import Job, JobPlan, check_job
from avatarctl.registry import configure, find_model

FRAMES = 33  # one chunk
CLIPS = 8

Talk = Callable[[Clip, np.ndarray], np.ndarray]


def plan_of(face: Clip, audio: np.ndarray) -> JobPlan:
    cfg = configure("model.name=cartoon-i2v", "long_video.strategy=chunks")
    image = image_from_array(face.frames[0], "face")
    job = Job(image, audio_from_array(audio, 16_000, "voice"), "a person is talking", "")
    return check_job(cfg, find_model("cartoon-i2v"), job, silent)


@pytest.fixture(scope="module")
def talk() -> Talk:
    """(face, audio) -> height of the mouth in every frame of the video."""
    modules = load(plan_of(clip(HELD_OUT, 1), clip(HELD_OUT, 1).speech.audio))

    def heights(face: Clip, audio: np.ndarray) -> np.ndarray:
        blocks = [block.pixels.numpy() for block in generate(plan_of(face, audio), modules=modules)]
        pixels = np.concatenate(blocks, axis=1).transpose(1, 2, 3, 0)
        return measure_mouth(np.clip((pixels + 1) * 127.5, 0, 255).round().astype(np.uint8))[0]

    return heights


def follows(heights: np.ndarray, voice: Clip) -> float:
    """r behind the first frame, which is given."""
    return correlation(heights[1:], voice.speech.opening[1:])


@pytest.fixture(scope="module")
def scores(talk: Talk) -> tuple[np.ndarray, np.ndarray]:
    """r with the own audio, and with that of the clip before, for each of the clips."""
    clips = [clip(HELD_OUT + 2000 + k, FRAMES) for k in range(CLIPS)]
    made = [talk(each, each.speech.audio) for each in clips]
    own = np.array([follows(heights, each) for heights, each in zip(made, clips, strict=True)])
    others = np.array([follows(heights, clips[k - 1]) for k, heights in enumerate(made)])
    print(f"\nr with the own audio {own.mean():.3f} (worst {own.min():.3f}), another's {others.mean():.3f}")
    return own, others


def test_mouths_follow_their_audio(scores: tuple[np.ndarray, np.ndarray]) -> None:
    assert scores[0].mean() >= 0.86, scores[0]


def test_mouths_do_not_follow_the_audio_of_another_clip(scores: tuple[np.ndarray, np.ndarray]) -> None:
    assert scores[1].mean() <= 0.25, scores[1]


def test_mouths_follow_nothing_when_the_audio_is_cut_off(talk: Talk) -> None:
    """What the first test would measure if audio did not reach the transformer."""
    clips = [clip(HELD_OUT + 2000 + k, FRAMES) for k in range(2)]
    cut = [follows(talk(each, np.zeros_like(each.speech.audio) + 1e-4), each) for each in clips]
    assert np.mean(cut) < 0.5, cut


def test_later_chunks_follow_as_well(talk: Talk) -> None:
    long = clip(HELD_OUT + 2100, 65)
    late = talk(long, long.speech.audio)[33:]
    assert correlation(late, long.speech.opening[33:]) > 0.8
