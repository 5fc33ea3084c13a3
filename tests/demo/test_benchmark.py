"""Scores of the built-in models: what is compared with what, and what they are given."""

from __future__ import annotations

import numpy as np
import pytest

from avatarctl.demo import benchmark as scores
from avatarctl.demo.clips import HELD_OUT, clip
from avatarctl.errors import UsageError
from avatarctl.events import silent
from avatarctl.media import Waveform, audio_from_array
from avatarctl.registry import find_model


def test_an_image_scores_with_its_audio_and_not_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clips whose own mouths have nothing to do with each other (r -0.03)."""
    monkeypatch.setattr(scores, "_FRAMES", {**scores._FRAMES, "i2v": 29})
    found = scores.benchmark("i2v", find_model("cartoon-i2v"), range(HELD_OUT + 2003, HELD_OUT + 2005))
    assert set(found) == {"r_opening", "r_shuffled", "slope", "colour_change"}
    assert all(set(value) == {"mean", "standard_error"} for value in found.values())
    assert found["r_opening"]["mean"] > 0.8 > 0.5 > found["r_shuffled"]["mean"]
    assert 0.5 < found["slope"]["mean"] < 1.1 and found["colour_change"]["mean"] < 0.1


def test_a_clip_scores_with_its_new_audio_and_stays_as_it_was_outside_the_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scores, "_FRAMES", {**scores._FRAMES, "v2v": 33})
    found = scores.benchmark("v2v", find_model("cartoon-v2v"), range(HELD_OUT + 2003, HELD_OUT + 2005))
    assert set(found) == {"r_opening", "r_shuffled", "slope", "outside_box"}
    assert found["r_opening"]["mean"] > 0.85 > 0.5 > found["r_shuffled"]["mean"]
    assert 0 < found["outside_box"]["mean"] <= 0.02


def test_the_copy_that_a_clip_is_compared_with_is_cut_as_infer_cuts() -> None:
    """In chunks of 33 that overlap by five: another cut makes other frames."""
    each, row = clip(HELD_OUT + 2, 66), find_model("cartoon-v2v")
    vae = scores._modules(row, each).vae
    copy = scores._coded_in_chunks(vae, each.frames, scores._plan(row, each, each.speech.audio).video)
    second = scores._bytes(scores._coded(vae, each.frames[28:61])[0])
    assert len(copy) == 61 and np.array_equal(copy[33:], second[5:])


def test_what_makes_the_frames_is_given_an_image_and_audio_alone() -> None:
    """Nothing of what the world knows of the mouth."""
    each = clip(HELD_OUT + 1, 9)
    job = scores._plan(find_model("cartoon-i2v"), each, each.speech.audio).job
    assert job.image is not None and np.array_equal(job.image.pixels, each.frames[0]) and job.video is None
    with Waveform(job.audio) as waveform:
        assert np.allclose(waveform.read(0, 9 * 640), each.speech.audio, atol=1e-6)
    assert (job.prompt, job.negative_prompt) == ("a person is talking", "")


def test_seeds_that_were_trained_on_are_refused() -> None:
    with pytest.raises(UsageError, match="may have been trained on"):
        scores.benchmark("vae", find_model("cartoon-i2v"), range(HELD_OUT - 1, HELD_OUT + 3))
    with pytest.raises(UsageError, match="two at least"):
        scores.benchmark("i2v", find_model("cartoon-i2v"), [HELD_OUT])


def test_colours_are_compared_above_the_mouth_in_the_last_frames() -> None:
    image = np.full((64, 64, 3), 100, np.uint8)
    frames = np.repeat(image[None], 20, 0)
    frames[:10], frames[:, 32:] = 0, 0
    assert scores.colour_change(frames, image) == 0
    frames[10:, :32] = 151
    assert scores.colour_change(frames, image) == pytest.approx(0.2)


def test_a_recording_is_said_in_time_with_its_loudness() -> None:
    """A voice of the world, of which nothing is known here but how loud it is."""
    audio = audio_from_array(clip(HELD_OUT + 11, 61).speech.audio, 16_000, "voice")
    found = scores.spoken(find_model("cartoon-i2v"), audio, range(HELD_OUT, HELD_OUT + 2), silent)
    assert found["r_loudness"]["mean"] > 0.3 and abs(found["best_lag"]) <= 1, found


def test_the_lag_is_that_of_the_mouth() -> None:
    level = np.random.default_rng(1).random(60)
    late = np.concatenate([np.zeros(3), level[:-3]])
    assert (scores.best_lag(late, level), scores.best_lag(level, late), scores.best_lag(level, level)) == (
        3,
        -3,
        0,
    )
