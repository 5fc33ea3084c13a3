"""One clip by both roads: what training shows the network is what inference shows it, for 33, 49 and 65
channels (spec/omniavatar.md g.1: "train and inference input logic identical", j 4, j 39).

Training reads the clip as a sample, through the data set and `training_condition`; its prefix is that of a
first chunk, or that of a later one. Inference reads the same files by `infer`, and its condition of that
chunk is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from avatarctl.data import training_set
from avatarctl.data.media import ReadFrames
from avatarctl.data.training_set import TrainingSample, TrainingSet
from avatarctl.demo.clips import clip
from avatarctl.errors import UnusableFile
from avatarctl.events import silent
from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.families.omniavatar_objective import prefix_latents
from avatarctl.family import Condition, Draw
from avatarctl.media import FittedFrames, open_video, write_audio, write_clip
from avatarctl.models.encode import frames_tensor
from avatarctl.registry import ROWS, configure, find_model
from tests.repeats import repeats
from tests.training.running import typed

NO_DROPOUT = ("train.text_dropout=0", "train.audio_dropout=0", "train.prefix_dropout=0")
FRAMES = 9


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cartoon model with 65 channels, as a row of its own, with a random transformer."""
    row = ROWS["cartoon-v2v"]
    network = {**row.network, "dit": {**row.network["dit"], "in_channels": 65}}
    files = tuple(name for name in row.files if "/dit_" not in name)
    values = {**row.defaults, "model.channels": 65}
    wide = replace(row, name="cartoon-65", network=network, files=files, trained=False, defaults=values)
    monkeypatch.setitem(ROWS, wide.name, wide)  # type: ignore[index]


def trained_on(
    folder: Path, model: str, *words: str, changed: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
) -> Condition:
    """The condition of a step, from the files of one sample; changed: what is made of its tensors."""
    cfg = configure(
        f"model.name={model}", f"data.path={folder.parent}", "data.width=32", "data.height=32",
        f"data.num_frames={FRAMES}", "data.artifact_dtype=float32", *NO_DROPOUT, *words,
    )  # fmt: skip
    data = TrainingSet(cfg, find_model(model), OmniAvatar(), silent)  # type: ignore[arg-type]
    data.check()
    data.prepare()
    (sample,) = data.read([data.names.index(folder.name)])
    assert isinstance(sample, TrainingSample)
    steps = [Draw(seed=3, step=step, slot=0, slots=1) for step in range(20)]
    given = (max(cfg.train.prefix_frames) + 3) // 4  # under the rule `all` nothing is one of the choices
    draws = [each for each in steps if prefix_latents(each, 3, cfg) == given][:1]
    tensors = changed(dict(sample.tensors))
    return OmniAvatar().training_condition([tensors], data.constants, draws, cfg)


def inferred(monkeypatch: pytest.MonkeyPatch, *words: object, chunk: int = 0) -> Condition:
    """The condition of a chunk of a run of `infer`, which ends there."""
    seen: list[Condition] = []
    build = OmniAvatar.build_condition

    def noting(self: OmniAvatar, encoded: Any) -> Condition:
        seen.append(build(self, encoded))
        if len(seen) == chunk + 1:
            raise UnusableFile("enough was seen")
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(OmniAvatar, "build_condition", noting)
        made = typed(
            "infer", "--size", "32x32", "--steps", "1", "-o", f"long_video.num_frames={FRAMES}", *words
        )
    assert "enough was seen" in made.output and len(seen) == chunk + 1, made.output
    return seen[chunk]


def require_equal(ours: Condition, theirs: Condition) -> None:
    assert ours.channels is not None and theirs.channels is not None
    assert torch.equal(ours.channels, theirs.channels)
    assert ours.fixed_mask is not None and theirs.fixed_mask is not None
    assert torch.equal(ours.fixed_mask, theirs.fixed_mask)
    given = theirs.fixed_mask
    assert ours.clean is not None and theirs.clean is not None
    assert torch.equal(ours.clean * given, theirs.clean * given)
    text: Mapping[str, Tensor] = theirs.text
    assert torch.equal(ours.text["prompt"], text["prompt"])
    assert torch.equal(ours.audio["features"], theirs.audio["features"])


@pytest.mark.parametrize(
    ("model", "rule"),
    repeats(
        [("cartoon-v2v", "first_keep"), ("cartoon-v2v", "legacy_two_step"), ("cartoon-65", "all")],
        [("cartoon-v2v", "all"), ("cartoon-65", "first_keep")],
    ),
)
def test_a_clip_of_a_video(
    model: str, rule: str, samples: Path, models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = samples / "000001"
    prefix = 1 if rule == "first_keep" else 0  # frames that a first chunk is given
    ours = trained_on(folder, model, f"data.mask_rule={rule}", f"train.prefix_frames={prefix}")
    theirs = inferred(monkeypatch, *dubbed(folder, model, rule, tmp_path))
    assert ours.channels is not None and ours.channels.shape[1] == (33 if model == "cartoon-v2v" else 49)
    require_equal(ours, theirs)


@pytest.mark.parametrize("rule", ["all", "first_keep"])
def test_a_later_chunk_of_a_video(
    rule: str, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a network that makes the very frames of the source: the second chunk, given 5 frames, is a clip
    that begins where it does, with a prefix of 5. Its reference is a frame elsewhere."""
    folder, start, overlap = samples / "000001", FRAMES - 5, 5
    with open_video(folder / "sub_clip.mp4") as reader:
        source = FittedFrames(reader, (32, 32), "crop").read(0, 17)
    tail = frames_tensor(source[start:FRAMES], torch.device("cpu"))
    monkeypatch.setattr(OmniAvatar, "advance", lambda *_: tail)
    words = ("--chunked", "-o", f"long_video.overlap_frames={overlap}")
    theirs = inferred(monkeypatch, *dubbed(folder, "cartoon-v2v", rule, tmp_path), *words, chunk=1)
    assert theirs.channels is not None
    elsewhere = theirs.channels[0, :16, :1]

    def from_there(*_: Any) -> tuple[ReadFrames, dict[str, np.ndarray]]:
        return ReadFrames(17, ((0, source[start : start + FRAMES]),)), {}

    def as_cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        features = tensors["audio_features"][start : start + FRAMES]
        return {**tensors, "audio_features": features, "references": elsewhere}

    monkeypatch.setattr(training_set, "read_sample", from_there)
    words = (f"data.mask_rule={rule}", f"train.prefix_frames={overlap}")
    ours = trained_on(folder, "cartoon-v2v", *words, changed=as_cut)
    assert ours.fixed_mask is not None and ours.fixed_mask.flatten().tolist() == [True, True, False]
    require_equal(ours, theirs)


def dubbed(folder: Path, model: str, rule: str, out: Path) -> tuple[object, ...]:
    """What `infer` is told of a sample."""
    return (
        "--model", model, "--video", folder / "sub_clip.mp4", "--audio", folder / "audio.wav",
        "--prompt", (folder / "prompt.txt").read_text().strip(), "-o", f"data.mask_rule={rule}",
        "--out", out / "x.mp4",
    )  # fmt: skip


def test_a_clip_from_an_image(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the size that is trained at: an image that is scaled is not rounded to whole
    numbers, as the frames of a video are."""
    folder = tmp_path / "samples/one"
    folder.mkdir(parents=True)
    drawn = clip(1, 17)
    small = np.stack([np.asarray(Image.fromarray(frame).resize((32, 32))) for frame in drawn.frames])
    write_clip(folder / "sub_clip.mp4", iter([small]))
    write_audio(folder / "audio.wav", drawn.speech.audio, 16_000)
    (folder / "prompt.txt").write_text("a person is talking")
    with open_video(folder / "sub_clip.mp4") as reader:
        Image.fromarray(reader.read(0, 1)[0]).save(tmp_path / "first.png")
    ours = trained_on(folder, "cartoon-i2v", "train.prefix_frames=1")
    theirs = inferred(
        monkeypatch, "--model", "cartoon-i2v", "--image", tmp_path / "first.png", "--chunked",
        "--audio", folder / "audio.wav", "--out", tmp_path / "x.mp4",
    )  # fmt: skip
    assert ours.channels is not None and ours.channels.shape[1] == 17
    require_equal(ours, theirs)


def test_a_frame_of_zeros_is_in_front_of_silence_as_well(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At an audio offset of 1: where the audio is silent, and where it was dropped."""
    write_audio(tmp_path / "silence.wav", np.zeros(9 * 640, np.float32), 16_000)
    Image.fromarray(clip(1, 1).frames[0]).save(tmp_path / "first.png")
    theirs = inferred(
        monkeypatch, "--model", "cartoon-i2v", "--image", tmp_path / "first.png", "--chunked",
        "--audio", tmp_path / "silence.wav", "--out", tmp_path / "x.mp4", "-o", "model.audio_offset=1",
    )  # fmt: skip
    words = ("train.prefix_frames=1", "train.audio_dropout=1", "model.audio_offset=1")
    ours = trained_on(samples / "000001", "cartoon-i2v", *words)
    for condition in (theirs, ours):
        shown = condition.audio["features"][0].abs().amax(1)
        assert shown[0] == 0 and shown[1:].min() > 0
