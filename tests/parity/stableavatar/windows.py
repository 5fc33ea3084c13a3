"""Windows, their audio and their cross-fade (spec/stableavatar.md e).

Plans are executed, not only computed: the real loop and family run with networks that note what they are
given. The recorded fusion runs with a network that is a formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avatarctl.conditioning.windows import blend_weights
from avatarctl.config import RunConfig
from avatarctl.errors import UsageError
from avatarctl.events import silent
from avatarctl.families.stableavatar import StableAvatar
from avatarctl.family import Inputs, Modules, Span
from avatarctl.models.stableavatar import PreparedStable
from avatarctl.sampling.denoise import Denoiser
from avatarctl.sampling.fused import sample_fused
from avatarctl.timeline import SAMPLES_PER_FRAME, latent_frames

from ..golden import Checks, Reader
from .building import run_setting
from .stand_ins import BRANCHES, SHIFT, Codec, Image, Text, reference_config

checks = Checks()

PLANS = "set4_window_plan.json"
FUSION = "set4_fusion.safetensors"
_GIVEN = ("plans.*.n_frames", "plans.*.clip_frames", "plans.*.overlap")
_LATENTS = 1e-5  # relative to the norm
# The same sums in the same order round to the same bfloat16.
_ROUNDED_LATENTS = 1e-7


@dataclass
class _Audio:
    """Silence and its encoder, noting which samples are read and how many are used."""

    width = token_width = 1
    read_spans: list[tuple[int, int]] = field(default_factory=list)
    used: list[int] = field(default_factory=list)

    def read(self, start: int, stop: int) -> Any:
        self.read_spans.append((start, stop))
        return torch.zeros(stop - start).numpy()

    def tokens(self, waveform: Tensor) -> Tensor:
        self.used.append(waveform.shape[-1])
        return torch.zeros(1, 2, 1)


class _Formula(nn.Module):
    """v_b = t / 1000 (A_b x + B_b (j + 1) / 10) for branch b and frame j of the window, as recorded."""

    def __init__(self, channels: int, factors: Sequence[float], offsets: Sequence[float]) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.channels, self.factors, self.offsets = channels, factors, offsets
        self.padded: list[int] = []  # latent frames that the token sequence of each call is as long as

    def forward(self, *args: Any, mode: str = "raw", **kwargs: Any) -> Any:
        return self._denoise(*args, **kwargs) if mode == "denoise" else PreparedStable()

    def _denoise(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        prepared: Mapping[str, Any],
        *,
        padded_frames: int | None = None,
        batched: bool = False,
    ) -> dict[str, Tensor]:
        x = hidden_states[:, : self.channels]
        self.padded.append(x.shape[2] if padded_frames is None else padded_frames)
        place = torch.arange(1.0, x.shape[2] + 1).view(1, 1, -1, 1, 1) / 10
        scale = timestep.view(-1, 1, 1, 1, 1) / 1000
        weights = dict(zip(BRANCHES, zip(self.factors, self.offsets, strict=True), strict=True))
        return {name: scale * (weights[name][0] * x + weights[name][1] * place) for name in prepared}


@dataclass
class _Run:
    """What a run of the loop asked for and gave."""

    audio: _Audio
    network: _Formula
    noises: list[tuple[int, int]]  # first frame and frames
    latents: Tensor


def _run(
    cfg: RunConfig, samples: int, init: Tensor, factors: Sequence[float], offsets: Sequence[float]
) -> _Run:
    """The loop of fused windows on the formula, from `init` [1, C, I, h, w]."""
    family, audio, noises = StableAvatar(), _Audio(), list[tuple[int, int]]()
    height, width = cfg.output.height, cfg.output.width
    assert height is not None and width is not None and cfg.sampling.steps is not None

    def noise(seed: int, key: Any, first: int, frames: int, shape: tuple[int, int, int]) -> Tensor:
        noises.append((first, frames))
        return init[:, :, first : first + frames].clone()

    network = _Formula(init.shape[1], factors, offsets)
    denoise = Denoiser(
        family, network, family.guidance(cfg), family.sigmas(cfg.sampling.steps, SHIFT).tolist(), noise=noise
    )
    nothing = torch.zeros(1, 1, 1)
    modules = Modules(
        dit=network,
        vae=Codec(),
        text=Text({"prompt": nothing, "negative": nothing}),
        audio=audio,
        image=Image(nothing),
        device=torch.device("cpu"),
    )
    inputs = Inputs(
        image=torch.zeros(1, 3, height, width),
        waveform=audio,
        samples=samples,
        mean=0.0,
        variance=0.0,
        prompt="prompt",
        negative_prompt="negative",
        job=0,
        emit=silent,
    )
    plan = replace(family.plan(samples, cfg), shape=tuple(init.shape[i] for i in (1, 3, 4)))
    blocks = [block.pixels for block in sample_fused(denoise, modules, inputs, plan, cfg)]
    return _Run(audio, network, noises, torch.cat(blocks, dim=1)[None])


def _cases(reader: Reader) -> list[str]:
    """Prefixes of the plans that the reference completed."""
    return [
        key.removesuffix(".windows.0.latent_start") for key in reader.keys("plans.*.windows.0.latent_start")
    ]


def _plan_config(reader: Reader, case: str) -> RunConfig:
    """On an image of 2 x 2 latents, one step."""
    return reference_config(
        clip_frames=reader.take(f"{case}.clip_frames"),
        overlap=reader.take(f"{case}.overlap"),
        text=3.0,
        audio=5.0,
        size=(16, 16),
        steps=1,
    )


def _observed_windows(spans: Sequence[Span], run: _Run) -> list[dict[str, int]]:
    """Rows of the recorded table, from what happened; the plan's own words must agree."""
    rows = []
    for span, (first, frames), used in zip(spans, run.noises, run.audio.used, strict=True):
        assert (span.start, span.frames) == (first, frames)
        assert span.audio[1] - span.audio[0] == used
        rows.append(
            {
                "latent_start": first,
                "latent_end": first + frames,
                "latent_frames": frames,
                "audio_start": span.audio[0],
                "audio_end": span.audio[1],
                "audio_samples": used,
            }
        )
    reads = run.audio.read_spans
    assert [row["audio_start"] for row in rows] == [start for start, _ in reads]
    assert [row["audio_end"] for row in rows] == [stop for _, stop in reads]
    return rows


@checks(
    PLANS,
    compares=("plans.*.windows.*", "plans.*.seq_len", "plans.*.frames_per_window"),
    needs=("plans.*.n_samples",),
)
def plans(reader: Reader) -> None:
    for case in _cases(reader):
        cfg, samples = _plan_config(reader, case), reader.take(f"{case}.n_samples")
        spans = list(StableAvatar().plan(samples, cfg).spans())
        run = _run(
            cfg, samples, torch.zeros(1, 4, spans[-1].start + spans[-1].frames, 2, 2), (0,) * 3, (0,) * 3
        )
        reader.compare(f"{case}.frames_per_window", spans[0].frames)
        # Latents of 2 x 2 are one token a frame.
        assert len(set(run.network.padded)) == 1
        reader.compare(f"{case}.seq_len", run.network.padded[0])
        rows = _observed_windows(spans, run)
        recorded = {key.split(".")[3] for key in reader.keys(f"{case}.windows.*")}
        assert recorded == {str(index) for index in range(len(rows))}, f"{case}: {len(rows)} windows"
        for index, row in enumerate(rows):
            for name, value in row.items():
                reader.compare(f"{case}.windows.{index}.{name}", value)


@checks(PLANS, compares=("plans.*.latent_frames_total",), needs=(*_GIVEN, "plans.*.status"))
def lengths(reader: Reader) -> None:
    """Also of the plans on which the reference breaks down (spec/stableavatar.md e.3): ours end,
    and cover every frame."""
    complete = _cases(reader)
    for key in reader.keys("plans.*.n_frames"):
        case = key.removesuffix(".n_frames")
        assert reader.take(f"{case}.status") == "ok" or case not in complete
        cfg, frames = _plan_config(reader, case), reader.take(key)
        shared, whole = reader.take(f"{case}.overlap"), latent_frames(reader.take(f"{case}.clip_frames"))
        if shared == 1 or shared >= whole:
            with pytest.raises(UsageError):
                StableAvatar().plan(frames * SAMPLES_PER_FRAME, cfg)
            reader.compare(f"{case}.latent_frames_total", (frames - 1) // 4 + 1)
            continue
        spans = list(StableAvatar().plan(frames * SAMPLES_PER_FRAME, cfg).spans())
        assert spans[0].start == 0
        assert all(later.start <= span.start + span.frames for span, later in pairwise(spans))
        reader.compare(f"{case}.latent_frames_total", spans[-1].start + spans[-1].frames)


@checks(PLANS, compares=("blend_weights_current_window.*",))
def weights(reader: Reader) -> None:
    for key in reader.keys("blend_weights_current_window.*"):
        _, frames, scheme = key.split(".")
        reader.compare(key, torch.tensor(blend_weights(int(frames), scheme), dtype=torch.float64), atol=1e-6)


@checks(FUSION, compares=("*.final",), needs=("init",))
def fusion(reader: Reader) -> None:
    formula = reader.folder.open(PLANS)
    stated = {name: run_setting(reader, name) for name in ("n_frames", "clip_frames", "overlap", "steps")}
    init = reader.take("init")
    for key in reader.keys("*.final"):
        scheme, storage = key.removesuffix(".final").split(".")
        cfg = reference_config(
            clip_frames=stated["clip_frames"],
            overlap=stated["overlap"],
            text=run_setting(reader, "text_guide_scale"),
            audio=run_setting(reader, "audio_guide_scale"),
            size=(8 * init.shape[3], 8 * init.shape[4]),
            steps=stated["steps"],
            latents_dtype={"fp32": "float32", "bf16round": "bfloat16"}[storage],
        )
        for schedule in ("step", "wavefront"):
            ordered = replace(cfg, long_video=replace(cfg.long_video, blend=scheme, schedule=schedule))
            samples = stated["n_frames"] * SAMPLES_PER_FRAME
            factors, offsets = (formula.take(f"denoiser.{name}") for name in "AB")
            latents = _run(ordered, samples, init, factors, offsets).latents
            tolerance = _LATENTS if storage == "fp32" else _ROUNDED_LATENTS
            reader.compare(key, latents, relative_l2=tolerance)


@checks(PLANS, compares=(), needs=("denoiser.A", "denoiser.B"))
def formula(reader: Reader) -> None:
    """The numbers of the network that `fusion` runs: one per branch."""
    for name in ("denoiser.A", "denoiser.B"):
        assert len(reader.take(name)) == len(BRANCHES)
