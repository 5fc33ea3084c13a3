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
CLIPS = 5

Talk = Callable[[Clip, np.ndarray], np.ndarray]


def plan_of(face: Clip, audio: np.ndarray) -> JobPlan:
    cfg = configure("model.name=cartoon-i2v", "long_video.strategy=chunks")
    image = image_from_array(face.frames[0], "face")
    job = Job(image, audio_from_array(audio, 16_000, "voice"), "a person is talking", "")
    return check_job(cfg, find_model("cartoon-i2v"), job, silent)


@pytest.fixture(scope="module")
def talk() -> Talk:
    """(face, audio) -> the frames of the video, uint8 [F, 64, 64, 3]."""
    modules = load(plan_of(clip(HELD_OUT, 1), clip(HELD_OUT, 1).speech.audio))

    def frames(face: Clip, audio: np.ndarray) -> np.ndarray:
        blocks = [block.pixels.numpy() for block in generate(plan_of(face, audio), modules=modules)]
        pixels = np.concatenate(blocks, axis=1).transpose(1, 2, 3, 0)
        return np.clip((pixels + 1) * 127.5, 0, 255).round().astype(np.uint8)

    return frames


def heights(frames: np.ndarray) -> np.ndarray:
    return measure_mouth(frames)[0]


def other_heights(frames: np.ndarray) -> np.ndarray:
    """A meter of its own kind, from the world's definition: how much of the upright middle of the mouth is as
    dark as the inside of one, against a patch of the cheek."""
    red = frames[..., 0].astype(float) / 255
    skin = np.median(red[:, 33:38, 16:24])
    dark = np.clip((skin - red) / (skin - 0.22), 0, 1)[:, 38:58, 29:35]
    return np.where(dark < 0.15, 0, dark).sum(1).mean(1)


def follows(measured: np.ndarray, voice: Clip, lag: int = 0) -> float:
    """r behind the first frame, which is given; lag: frames that the mouth is late."""
    mouth, opening = measured[1:], voice.speech.opening[1:]
    if lag > 0:
        mouth, opening = mouth[lag:], opening[:-lag]
    elif lag < 0:
        mouth, opening = mouth[:lag], opening[-lag:]
    return correlation(mouth, opening)


@pytest.fixture(scope="module")
def made(talk: Talk) -> list[tuple[Clip, np.ndarray]]:
    """Clips, and what the model makes of their first frame and their audio."""
    clips = [clip(HELD_OUT + 2000 + k, FRAMES) for k in range(CLIPS)]
    return [(each, talk(each, each.speech.audio)) for each in clips]


def test_mouths_follow_their_audio_and_no_other(made: list[tuple[Clip, np.ndarray]]) -> None:
    own = np.array([follows(heights(frames), each) for each, frames in made])
    others = np.array([follows(heights(frames), made[k - 1][0]) for k, (_, frames) in enumerate(made)])
    print(f"\nr with the own audio {own.mean():.3f} (worst {own.min():.3f}), another's {others.mean():.3f}")
    assert own.mean() >= 0.90, own
    assert others.mean() <= 0.18, others


def test_mouths_are_neither_early_nor_late(made: list[tuple[Clip, np.ndarray]]) -> None:
    by_lag = {lag: np.mean([follows(heights(f), each, lag) for each, f in made]) for lag in range(-4, 5)}
    assert abs(max(by_lag, key=lambda lag: by_lag[lag])) <= 1, by_lag


def test_another_meter_says_the_same(made: list[tuple[Clip, np.ndarray]]) -> None:
    one = np.mean([follows(heights(frames), each) for each, frames in made])
    other = np.mean([follows(other_heights(frames), each) for each, frames in made])
    assert abs(one - other) <= 0.02


def test_mouths_follow_nothing_when_the_audio_is_cut_off(talk: Talk) -> None:
    """What the first test would measure if audio did not reach the transformer."""
    clips = [clip(HELD_OUT + 2000 + k, FRAMES) for k in range(2)]
    cut = [follows(heights(talk(each, np.zeros_like(each.speech.audio) + 1e-4)), each) for each in clips]
    assert np.mean(cut) < 0.5, cut


def test_silence_leaves_the_mouth_closed(talk: Talk) -> None:
    closed = heights(talk(clip(HELD_OUT + 5000, 1), np.zeros(21 * 640, np.float32)))
    assert closed.mean() / 12 <= 0.05, closed


def test_later_chunks_follow_as_well(talk: Talk) -> None:
    long = clip(HELD_OUT + 2100, 65)
    late = heights(talk(long, long.speech.audio))[33:]
    assert correlation(late, long.speech.opening[33:]) > 0.8
