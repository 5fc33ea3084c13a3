"""The built-in models are made again by anybody, and whatever stops that costs nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from avatarctl.demo.clips import HELD_OUT
from avatarctl.demo.making import audio_learner, vae_learner
from avatarctl.demo.making.audio_learner import AudioLearner
from avatarctl.demo.making.build import Build
from avatarctl.demo.making.drawn_set import UTTERANCE, draw_window
from avatarctl.demo.making.judge_learner import JudgeLearner, right_cosines
from avatarctl.demo.making.learning import Learner, learn
from avatarctl.demo.making.muon import orthogonal
from avatarctl.demo.making.recipe import FULL, PARTS, SHORT
from avatarctl.demo.making.transformers import read_standardised
from avatarctl.demo.making.vae_learner import VaeLearner
from avatarctl.errors import Interrupted, UnusableWeights
from avatarctl.events import silent
from avatarctl.registry import ASSETS, find_model

NETWORK = find_model("cartoon-i2v").network


def learner(part: str, steps: int = 2) -> Learner:
    """Of the real class, narrow; scored behind the last step only, as scores cost more than steps."""
    if part == "vae":
        sizes = {**NETWORK["vae"], "base_dim": 4, "dim_mult": (1, 1, 2, 2)}
        return VaeLearner(sizes, 3, steps, 100, ((5, 1),))
    if part == "audio":
        return AudioLearner(NETWORK["audio"], 3, steps, 100, watched=1)
    return JudgeLearner(NETWORK["syncnet"], 3, steps, 100, clips=2, watched=1)


@pytest.fixture(autouse=True)
def few_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of clips and voices that are as few as they can be, with frames that only fill the caches."""
    monkeypatch.setattr(vae_learner, "_SHORT", ((1.0, 2, 5, 0),))
    monkeypatch.setattr(vae_learner, "_LONG", ((1.0, 1, 4, 5),))
    monkeypatch.setattr(audio_learner, "_VOICES", 4)


@pytest.mark.parametrize("part", ["vae", "audio", "judge"])
def test_a_part_that_was_stopped_becomes_what_it_would_have_been(part: str, tmp_path: Path) -> None:
    whole = learner(part)
    learn(whole, tmp_path / "whole", silent, lambda: False, "recipe")
    with pytest.raises(Interrupted, match="which is saved"):
        learn(learner(part), tmp_path / "stopped", silent, lambda: True, "recipe")
    resumed = learner(part)
    facts = learn(resumed, tmp_path / "stopped", silent, lambda: False, "recipe")
    assert facts["steps"] == 2
    expected, found = whole.tensors(), resumed.tensors()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    one, other = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["audio.safetensors", "dit_v2v.safetensors", "syncnet.safetensors"])
def test_the_same_tensors_are_the_same_bytes(name: str, tmp_path: Path) -> None:
    """Those that are shipped, whatever the order that they come in."""
    shipped = ASSETS / "cartoon" / name
    tensors = load_file(shipped)
    Build(tmp_path, 1, SHORT, silent)._write(
        name, {key: tensors[key] for key in sorted(tensors, reverse=True)}
    )
    assert (tmp_path / "cartoon" / name).read_bytes() == shipped.read_bytes()


def test_a_state_of_another_recipe_or_a_damaged_one_is_not_gone_on_with(tmp_path: Path) -> None:
    learn(learner("audio", 1), tmp_path, silent, lambda: False, "one recipe")
    with pytest.raises(UnusableWeights, match="another recipe"):
        learn(learner("audio", 2), tmp_path, silent, lambda: False, "another")
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(UnusableWeights, match="is damaged"):
        learn(learner("audio", 2), tmp_path, silent, lambda: False, "one recipe")


def test_a_part_is_of_another_making_where_anything_before_it_is() -> None:
    ours = {part: FULL.made_by(part, 1) for part in PARTS}
    assert len(set(ours.values())) == len(PARTS)
    assert all(FULL.made_by(part, 2) != ours[part] for part in PARTS)
    assert SHORT.made_by("v2v", 1) != ours["v2v"]


def test_what_reads_raw_features_reads_them_as_standardised() -> None:
    """Mean and deviation are folded into the weights: exact up to rounding."""
    from avatarctl.loading.built_in import build_random_modules

    plain = build_random_modules(find_model("cartoon-i2v")).dit
    folded = build_random_modules(find_model("cartoon-i2v")).dit
    mean, deviation = torch.randn(192), torch.rand(192) + 0.2
    read_standardised(folded, mean, deviation)
    features = torch.randn(1, 9, 192) * deviation + mean
    one = plain(mode="prepare", audio=(features - mean) / deviation).audio
    torch.testing.assert_close(folded(mode="prepare", audio=features).audio, one, rtol=1e-4, atol=1e-5)


def test_kernels_are_made_orthogonal() -> None:
    for shape in ((12, 40), (40, 12)):
        values = torch.linalg.svdvals(
            orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        )
        assert values.min() > 0.5 and values.max() < 1.3


def test_nothing_learns_from_a_held_out_seed() -> None:
    with pytest.raises(ValueError, match="held out"):
        draw_window(HELD_OUT, 9)


def test_a_window_is_cut_out_of_its_utterance() -> None:
    """Frame k of it is the frame of its audio, and the reference shows the same face."""
    from avatarctl.demo.mouth_meter import correlation, measure_mouth
    from avatarctl.demo.voices import speech

    window = draw_window(5, 33)
    said = speech(5, UTTERANCE)
    assert np.array_equal(window.audio, said.audio)
    opening = said.opening[window.first : window.first + 33]
    assert correlation(measure_mouth(window.frames)[0], opening) > 0.99
    assert np.array_equal(window.elsewhere[0], window.frames[0])
    assert not np.array_equal(window.elsewhere[1], window.frames[0])


def test_an_untrained_judge_guesses() -> None:
    """What the score of a judge is measured against."""
    from avatarctl.demo.clips import clip
    from avatarctl.models.stable_syncnet import StableSyncNet

    torch.manual_seed(0)
    judge = StableSyncNet(**NETWORK["syncnet"]).eval()
    clips = [clip(HELD_OUT + k, 40) for k in range(4)]
    assert 0.2 < right_cosines(judge, clips, np.random.default_rng(0)) < 0.8
