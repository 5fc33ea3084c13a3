"""A third family, defined here, makes a video with `avatarctl infer`: an object, a network and a row.

Three tables are all that it is written into, and no file of the product knows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest
import soundfile
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor, nn

from avatarctl import families, registry
from avatarctl.cli import app
from avatarctl.config import RunConfig
from avatarctl.errors import UsageError
from avatarctl.family import (
    Carry,
    Condition,
    Conventions,
    Decoder,
    FusedFamily,
    Guidance,
    Inputs,
    Modules,
    Prepared,
    Span,
    VideoPlan,
)
from avatarctl.flow_matching import shifted_sigmas
from avatarctl.loading import parts as loading
from avatarctl.timeline import FPS, SAMPLES_PER_FRAME, frames_of_samples, latent_frames

WINDOW, OVERLAP = 4, 2  # latent frames


class ThirdNetwork(nn.Module):
    """Draws the loudness of the audio: the latents it aims at are a constant per frame."""

    def __init__(self, attention_head_dim: int, num_attention_heads: int, out_channels: int) -> None:
        super().__init__()
        self.paint = nn.Parameter(torch.randn(out_channels))

    def forward(self, x: Tensor, t: Tensor, loudness: Tensor) -> Tensor:
        aim = self.paint.view(1, -1, 1, 1, 1) * loudness.view(1, 1, -1, 1, 1)
        return (x - aim) / (t / 1000).view(-1, 1, 1, 1, 1)


@dataclass
class ThirdState:
    image: Tensor  # [1, 16, 1, h, w]
    decoder: Decoder


class ThirdFamily:
    """Windows that get their own frames of audio; two guidance branches, the image is blended in."""

    name = "third"

    def takes(self, cfg: RunConfig) -> Literal["image", "video"]:
        return "image"

    def frame_size(self, image: tuple[int, int], cfg: RunConfig) -> tuple[int, int]:
        return 16, 16

    def guidance(self, cfg: RunConfig) -> Guidance:
        assert cfg.sampling.guidance_scale is not None
        return Guidance(cfg.sampling.guidance_scale)

    def conventions(self, cfg: RunConfig) -> Conventions:
        assert cfg.sampling.shift is not None
        return Conventions(0, mask_keep=1, hole=0.0, fps=FPS, sigma_shift=cfg.sampling.shift)

    def notices(self, cfg: RunConfig) -> tuple[str, ...]:
        return ("the third family paints loudness",)

    def plan(self, samples: int, cfg: RunConfig) -> VideoPlan:
        if cfg.long_video.strategy != "fused":
            raise UsageError(f"third makes long videos fused, not by {cfg.long_video.strategy}")
        frames = frames_of_samples(samples)
        latents = max(latent_frames(frames + 3), WINDOW)
        starts = [*range(0, latents - WINDOW, WINDOW - OVERLAP), latents - WINDOW]
        assert cfg.output.height is not None and cfg.output.width is not None

        def spans() -> Iterator[Span]:
            for index, start in enumerate(starts):
                audio = (4 * start * SAMPLES_PER_FRAME, 4 * (start + WINDOW) * SAMPLES_PER_FRAME)
                yield Span(index, start, WINDOW, audio, 0, 0)

        shape = (16, cfg.output.height // 8, cfg.output.width // 8)
        return VideoPlan("fused", spans, len(starts), frames, shape)

    def open(self, modules: Modules, inputs: Inputs, cfg: RunConfig) -> ThirdState:
        assert inputs.image is not None
        return ThirdState(modules.vae.encode(inputs.image.unsqueeze(2)), modules.vae.decoder())

    def encode(self, modules: Modules, inputs: Inputs, span: Span, state: ThirdState, carry: Carry) -> Tensor:
        wave = torch.from_numpy(inputs.waveform.read(*span.audio))
        return wave.view(span.frames, -1).square().mean(1).sqrt()

    def build_condition(self, encoded: Tensor) -> Condition:
        return Condition(None, None, None, {"loudness": encoded}, {})

    def noise_key(self, span: Span, inputs: Inputs) -> tuple[tuple[int, ...], int]:
        return (inputs.job,), span.start

    def branches(self, guidance: Guidance, step: int) -> tuple[str, ...]:
        return ("voiced", "silence")

    def prepare(
        self, dit: nn.Module, condition: Condition, branches: Sequence[str], state: ThirdState
    ) -> Prepared:
        voiced = condition.audio["loudness"]
        return Prepared(None, {"voiced": voiced, "silence": torch.zeros_like(voiced)})

    def predict(
        self, dit: nn.Module, x: Tensor, t: Tensor, prepared: Prepared, branches: Sequence[str],
        *, span: Span, step: int, state: ThirdState,
    ) -> dict[str, Tensor]:  # fmt: skip
        return {name: dit(x - state.image, t, prepared.branch[name]) for name in branches}

    def combine(self, velocities: Mapping[str, Tensor], guidance: Guidance, step: int) -> Tensor:
        silence = velocities["silence"]
        return silence + guidance.text * (velocities["voiced"] - silence)

    def advance(
        self, modules: Modules, state: ThirdState, span: Span, latents: Tensor, pixels: Tensor
    ) -> Carry:
        return None

    def decoder(self, modules: Modules, state: ThirdState) -> Decoder:
        return state.decoder

    def sigmas(self, steps: int, shift: float) -> Tensor:
        return shifted_sigmas(steps, shift)

    def fuse(self, new: Tensor, written: Tensor, span: Span, step: int, state: ThirdState) -> Tensor:
        shared = written.shape[2]
        return torch.cat([(written + new[:, :, :shared]) / 2, new[:, :, shared:]], dim=2)


ROW = registry.Row(
    "third-tiny", "model", "a family of a test", registry.WORKS, "package",
    family="third",
    network={
        **registry.ROWS["cartoon-i2v"].network,
        "dit": {"num_attention_heads": 1, "attention_head_dim": 8, "out_channels": 16},
    },
    defaults={
        "model.audio_offset": 0,
        "sampling.steps": 2,
        "sampling.guidance_scale": 2.0,
        "sampling.shift": 3.0,
        "long_video.strategy": "fused",
        "long_video.overlap_frames": 5,
        "runtime.dtype": "float32",
    },
    trained=False,
)  # fmt: skip


@pytest.fixture
def third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder beside a voice of 25 frames and an image, and the family known."""
    monkeypatch.setitem(families.FAMILIES, "third", ThirdFamily())
    monkeypatch.setitem(loading.TRANSFORMERS, "third", ThirdNetwork)
    monkeypatch.setitem(registry.ROWS, ROW.name, ROW)
    random = np.random.default_rng(0)
    for name, loudness in (("voice.wav", 0.1), ("loud.wav", 0.5)):
        soundfile.write(tmp_path / name, random.standard_normal(25 * 640) * loudness, 16_000)
    Image.fromarray(random.integers(0, 255, (20, 24, 3), np.uint8)).save(tmp_path / "face.png")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def infer(*words: str) -> Result:
    start = ["infer", "--model", ROW.name, "--image", "../face.png"]
    return CliRunner().invoke(app, [*start, *words], prog_name="avatarctl")


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray() for frame in container.decode(video=0)])


def test_it_is_a_family() -> None:
    family: FusedFamily = ThirdFamily()
    assert family.name == ROW.family


def test_it_makes_a_video_that_its_run_file_repeats(third: Path) -> None:
    made = infer("--audio", "../voice.wav", "--size", "32x16", "--out", "a.mp4")
    assert made.exit_code == 0, made.stderr
    assert made.stdout == f"{third / 'a.mp4'}\n"
    assert f"model: {ROW.name}, untrained" in made.stderr and "paints loudness" in made.stderr
    assert frames_of(third / "a.mp4").shape == (25, 24, 32)  # yuv420p: 16 rows of luma and 8 of colour
    record = yaml.safe_load((third / "a.run.yaml").read_text(encoding="utf-8"))
    assert record["model"]["name"] == ROW.name and record["long_video"]["strategy"] == "fused"

    again = CliRunner().invoke(app, ["infer", "--config", "a.run.yaml", "--out", "b.mp4"])
    assert again.exit_code == 0, again.stderr
    np.testing.assert_array_equal(frames_of(third / "b.mp4"), frames_of(third / "a.mp4"))
    louder = infer("--audio", "../loud.wav", "--size", "32x16", "--out", "c.mp4")
    assert louder.exit_code == 0, louder.stderr
    assert (frames_of(third / "c.mp4") != frames_of(third / "a.mp4")).any()


@pytest.mark.parametrize("schedule", ["step", "wavefront"])
def test_both_orders_make_the_same_video(schedule: str, third: Path) -> None:
    words: tuple[Any, ...] = ("--audio", "../voice.wav", "--size", "16x16")
    assert infer(*words, "--out", "a.mp4").exit_code == 0
    assert infer(*words, "--schedule", schedule, "--out", "b.mp4").exit_code == 0
    np.testing.assert_array_equal(frames_of(third / "b.mp4"), frames_of(third / "a.mp4"))


def test_commands_know_it_by_its_row(third: Path) -> None:
    listed = CliRunner().invoke(app, ["models", "list"])
    assert f"{ROW.title}  [works, untrained]" in listed.stdout
    dry = infer("--audio", "../voice.wav", "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert "strategy: fused" in dry.stdout and "branches: voiced, silence" in dry.stdout


def test_its_refusals_reach_the_user(third: Path) -> None:
    refused = infer("--audio", "../voice.wav", "--chunked")
    assert refused.exit_code == 2 and not list(third.iterdir())
    assert refused.stderr.splitlines()[-1] == "error: third makes long videos fused, not by chunks"
