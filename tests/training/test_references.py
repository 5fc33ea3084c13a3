"""The reference of the recipe, a frame elsewhere in the source: shipped runs ask for it, samples that were
cut here have it, and others are told so before the first step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from avatarctl.config import find_config, read_config
from avatarctl.config.presets import preset_names
from avatarctl.data.training_set import TrainingSample, TrainingSet
from avatarctl.demo.clips import clip
from avatarctl.errors import UnusableFile
from avatarctl.events import silent
from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.family import Draw
from avatarctl.media import write_clip
from avatarctl.registry import configure, find_model
from tests.training.running import typed

PREPARING = [name for name in preset_names() if name.startswith(("train/omniavatar", "data/omniavatar"))]


@pytest.mark.parametrize("name", PREPARING)
def test_shipped_runs_draw_a_reference(name: str) -> None:
    file = read_config(find_config(name, "train v2v" if name.startswith("train/") else "precompute-latents"))
    assert file.settings["data.references"].value == 4


def opened(data: Path, *words: str) -> TrainingSet:
    cfg = configure(
        "model.name=cartoon-v2v", f"data.path={data}", "data.width=32", "data.height=32",
        "data.num_frames=9", "train.prefix_dropout=0", *words,
    )  # fmt: skip
    made = TrainingSet(cfg, find_model("cartoon-v2v"), OmniAvatar(), silent)  # type: ignore[arg-type]
    made.check()
    return made


def test_a_sample_that_was_cut_here_is_shown_with_frames_elsewhere(tmp_path: Path) -> None:
    """From the video to the channels of a step."""
    drawn = clip(1, 20)
    (tmp_path / "talks").mkdir()
    write_clip(tmp_path / "talks/talk.mp4", iter([drawn.frames]), audio=drawn.speech.audio)
    out = tmp_path / "samples"
    words = ("--data", out, "--size", "32x32", "--frames", "9", "--references", "2", "--max-windows", "1")
    made = typed("precompute-latents", "--from-videos", tmp_path / "talks", *words)
    assert made.exit_code == 0, made.output
    data = opened(out, "data.references=2")
    data.prepare()
    (sample,) = data.read([0])
    assert isinstance(sample, TrainingSample)
    references = sample.tensors["references"]
    assert references.shape == (16, 2, 4, 4)
    seen = set()
    for step in range(8):
        draws = [Draw(3, step, 0, 1)]
        condition = OmniAvatar().training_condition([sample.tensors], data.constants, draws, data.cfg)
        assert condition.channels is not None
        shown = condition.channels[0, :16]
        seen |= {place for place in range(2) if torch.equal(shown[:, 0], references[:, place])}
        assert torch.equal(shown, shown[:, :1].expand_as(shown))
        assert not torch.equal(shown[:, 0], sample.tensors["latents"][:, 0])
    assert seen == {0, 1}


def test_a_folder_that_was_not_cut_here_says_so_before_the_first_step(samples: Path) -> None:
    with pytest.raises(UnusableFile, match=r"was not cut from a longer video.*--references 0") as caught:
        opened(samples, "data.references=2")
    assert caught.value.exit_code == 3
    assert len(opened(samples).names) == 4, "the default asks for none"


def test_one_wrong_setting_is_no_line_for_each_of_many_samples(samples: Path, tmp_path: Path) -> None:
    """Five are named, once each, and the others are counted."""
    for number in range(9):
        shutil.copytree(samples / "000000", tmp_path / "data" / f"{number:06d}")
    words = ("--data", tmp_path / "data", "--references", "2", "--size", "32x32", "--frames", "9")
    told = typed("train", "v2v", *words, "--out", tmp_path / "run", "--dry-run").stderr.splitlines()
    warnings = [line for line in told if line.startswith("warning")]
    named = [line.partition(": was not cut")[0] for line in warnings[:-1]]
    assert named == [f"warning: {number:06d}" for number in range(5)], told
    assert warnings[-1] == "warning: 4 more of the 9 cannot be used either"
    assert "the first: 000000: was not cut" in told[-1] and "data.references 0" in told[-1]
