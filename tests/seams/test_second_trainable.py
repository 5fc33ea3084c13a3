"""A family of a test goes through both commands that prepare samples: other artifacts, two masks for each
frame, tokens for each clip. No file of the product knows it, so nothing there is one family's by accident.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from avatarctl import families, registry
from avatarctl.cli import app
from avatarctl.data.artifacts import read_artifact
from avatarctl.demo.clips import clip
from avatarctl.media import write_clip
from tests.families.toy_family import FRAMES, ROW, ToyFamily


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that one video of 20 frames becomes samples in, and the family known."""
    monkeypatch.setitem(families.FAMILIES, "toy", ToyFamily())
    monkeypatch.setitem(registry.ROWS, ROW.name, ROW)
    drawn = clip(4, 20)
    (tmp_path / "videos").mkdir()
    write_clip(tmp_path / "videos/v.mp4", iter([drawn.frames]), audio=drawn.speech.audio)
    return tmp_path / "samples"


def prepare(command: str, samples: Path, *words: str) -> Result:
    base = [command, "--model", ROW.name, "--data", str(samples), "--artifact-dtype", "float32"]
    return CliRunner().invoke(app, [*base, *words])


def names(samples: Path) -> list[str]:
    return sorted(path.relative_to(samples).as_posix() for path in samples.rglob("*.safetensors"))


def test_its_own_artifacts_are_made_by_both_commands(samples: Path) -> None:
    videos = str(samples.parent / "videos")
    made = prepare("precompute-latents", samples, "--from-videos", videos, "--window", "9")
    assert made.exit_code == 0, made.output
    made = prepare("precompute-audio", samples)
    assert made.exit_code == 0, made.output
    own = [
        f"v.mp4/{start}/{name}.safetensors"
        for start in ("000000", "000009")
        for name in ("clip_tokens", "face_stills", "stills")
    ]
    (words,) = [name for name in names(samples) if name.endswith(".words.safetensors")]
    assert names(samples) == sorted([*own, words, "_dataset/constants/hush.safetensors"])
    stills = read_artifact(samples / own[2], "stills")
    assert stills.shape == (16, FRAMES, 2, 4)
    assert torch.equal(stills, read_artifact(samples / own[1], "face_stills"))  # no masks: all of it shows


def test_a_mask_of_its_own_rebuilds_what_reads_it(samples: Path) -> None:
    videos = str(samples.parent / "videos")
    assert prepare("precompute-latents", samples, "--from-videos", videos, "--window", "9").exit_code == 0
    folder = samples / "v.mp4/000009"
    before = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    (folder / "face_masks").mkdir()
    black = np.zeros((16, 32), np.uint8)
    Image.fromarray(black).save(folder / "face_masks/frame_1.png")
    made = prepare("precompute-latents", samples)
    assert made.exit_code == 0, made.output
    assert [path.name for path in before if path.read_bytes() != before[path]] == ["face_stills.safetensors"]
    hidden = read_artifact(folder / "face_stills.safetensors", "face_stills")
    stills = read_artifact(folder / "stills.safetensors", "stills")
    same = [torch.equal(hidden[:, frame], stills[:, frame]) for frame in range(FRAMES)]
    assert same == [True, False, True, True, True]


def test_what_it_refuses_fails_a_sample(samples: Path) -> None:
    videos = str(samples.parent / "videos")
    assert prepare("precompute-latents", samples, "--from-videos", videos, "--window", "9").exit_code == 0
    drawn = clip(4, 4)
    (samples / "short").mkdir()
    write_clip(samples / "short/sub_clip.mp4", iter([drawn.frames]))
    (samples / "short/audio.wav").write_bytes((samples / "v.mp4/000000/audio.wav").read_bytes())
    made = prepare("precompute-latents", samples)
    assert made.exit_code == 7 and "short: 4 frames, and 5 are needed" in made.stderr


def test_a_run_says_what_nobody_prepares_yet(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Untrainable:
        name = "toy"

    monkeypatch.setitem(families.FAMILIES, "toy", Untrainable())
    refused = prepare("precompute-audio", samples)
    assert refused.exit_code == 2 and "nothing is prepared for toy-tiny yet" in refused.stderr
