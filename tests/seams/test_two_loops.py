"""The two loops, driven by toy families through the protocol: no network, state or data of a real one.

Networks are tiny and random. What the real families make of the loops is tested with them (tests/families).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avatarctl.config import LongVideo, RunConfig
from avatarctl.events import silent
from avatarctl.family import (
    Carry,
    Condition,
    Conventions,
    Decoder,
    Family,
    FusedFamily,
    Guidance,
    Inputs,
    Modules,
    Prepared,
    Span,
    VideoPlan,
)  # fmt: skip
from avatarctl.flow_matching import shifted_sigmas
from avatarctl.rng import latent_noise
from avatarctl.sampling.chunks import sample_chunks
from avatarctl.sampling.denoise import Denoiser
from avatarctl.sampling.fused import sample_fused

SHAPE = (4, 2, 2)
STEPS = 3


class ToyDit(nn.Module):
    """Latents and a per-frame drive -> velocity."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv3d(SHAPE[0], SHAPE[0], 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, drive: Tensor) -> Tensor:
        return torch.tanh(self.mix(x)) + drive.view(1, 1, -1, 1, 1) - t.view(-1, 1, 1, 1, 1) / 1000


class ToyCodec:
    """One pixel frame per latent frame; remembers nothing between clips."""

    def encode(self, video: Tensor) -> Tensor:
        return video.mean(1, keepdim=True).expand(-1, SHAPE[0], -1, -1, -1) * 0.5

    def decoder(self) -> ToyDecoder:
        return ToyDecoder()


class ToyDecoder:
    def push(self, latents: Tensor) -> Tensor:
        return latents[:, :3]


class ToyWave:
    def read(self, start: int, stop: int) -> np.ndarray:
        return np.sin(np.arange(start, stop, dtype=np.float32))


class Toy:
    """Chunks of 5 frames that share one."""

    name = "toy"
    kind: Literal["chunks", "fused"] = "chunks"

    def takes(self, cfg: RunConfig) -> Literal["image", "video"]:
        return "image"

    def frame_size(self, image: tuple[int, int], cfg: RunConfig) -> tuple[int, int]:
        return 2, 2

    def guidance(self, cfg: RunConfig) -> Guidance:
        return Guidance(2.0)

    def notices(self, cfg: RunConfig) -> tuple[str, ...]:
        return ()

    def conventions(self, cfg: RunConfig) -> Conventions:
        return Conventions(audio_offset=0, mask_keep=0, hole=0.0, fps=25, sigma_shift=5.0)

    def spans(self, frames: int) -> Iterator[Span]:
        for index, start in enumerate(range(0, frames - 1, 4)):
            yield Span(index, start, 5, (start * 10, (start + 5) * 10), min(index, 1), min(index, 1))

    def plan(self, samples: int, cfg: RunConfig) -> VideoPlan:
        frames = samples // 10
        return VideoPlan(self.kind, lambda: self.spans(frames), len(list(self.spans(frames))), frames, SHAPE)

    def open(self, modules: Modules, inputs: Inputs, cfg: RunConfig) -> None:
        return None

    def encode(
        self, modules: Modules, inputs: Inputs, span: Span, state: None, carry: Carry
    ) -> tuple[Span, Tensor, Tensor | None]:
        wave = torch.from_numpy(inputs.waveform.read(*span.audio)).view(span.frames, 10).mean(1)
        return span, wave, None if carry is None else modules.vae.encode(carry)

    def build_condition(self, encoded: tuple[Span, Tensor, Tensor | None]) -> Condition:
        span, wave, given = encoded
        mask = torch.zeros(1, 1, span.frames, 1, 1, dtype=torch.bool)
        clean = torch.zeros(1, SHAPE[0], span.frames, *SHAPE[1:])
        if given is not None:
            mask[:, :, : span.fixed] = True
            clean[:, :, : span.fixed] = given
        return Condition(None, clean, mask, {"wave": wave}, {})

    def noise_key(self, span: Span, inputs: Inputs) -> tuple[tuple[int, ...], int]:
        return (inputs.job, span.index), 0

    def branches(self, guidance: Guidance, step: int) -> tuple[str, ...]:
        return ("full", "negative")

    def prepare(self, dit: nn.Module, condition: Condition, branches: Sequence[str], state: None) -> Prepared:
        wave = condition.audio["wave"]
        return Prepared(None, {name: wave if name == "full" else torch.zeros_like(wave) for name in branches})

    def predict(
        self, dit: nn.Module, x: Tensor, t: Tensor, prepared: Prepared, branches: Sequence[str],
        *, span: Span, step: int, state: None,
    ) -> dict[str, Tensor]:  # fmt: skip
        return {name: dit(x, t, prepared.branch[name]) for name in branches}

    def combine(self, velocities: Mapping[str, Tensor], guidance: Guidance, step: int) -> Tensor:
        negative = velocities["negative"]
        return negative + guidance.text * (velocities["full"] - negative)

    def advance(self, modules: Modules, state: None, span: Span, latents: Tensor, pixels: Tensor) -> Carry:
        return pixels[:, :, -1:]

    def decoder(self, modules: Modules, state: None) -> Decoder:
        return modules.vae.decoder()

    def sigmas(self, steps: int, shift: float) -> Tensor:
        return shifted_sigmas(steps, shift)


class ToyFused(Toy):
    """Windows of 6 frames over the whole video, blended over 2."""

    kind = "fused"
    overlap = 2

    def spans(self, frames: int) -> Iterator[Span]:
        for index, start in enumerate(range(0, frames - self.overlap, 4)):
            yield Span(index, start, 6, (start * 10, (start + 6) * 10), 0, 0)

    def noise_key(self, span: Span, inputs: Inputs) -> tuple[tuple[int, ...], int]:
        return (inputs.job,), span.start

    def fuse(self, new: Tensor, written: Tensor, span: Span, step: int, state: None) -> Tensor:
        shared = written.shape[2]
        ramp = (torch.arange(shared) + 1).view(1, 1, -1, 1, 1) / (shared + 1)
        return torch.cat([written * (1 - ramp) + new[:, :, :shared] * ramp, new[:, :, shared:]], dim=2)


def parts(family: Family, samples: int) -> tuple[Denoiser, Modules, Inputs, VideoPlan]:
    modules = Modules(dit=ToyDit(), vae=ToyCodec(), text=None, audio=None, device=torch.device("cpu"))  # type: ignore[arg-type]
    inputs = Inputs(torch.zeros(1, 3, 2, 2), ToyWave(), samples, 0.0, 1.0, "", "", job=7, emit=silent)
    sigmas = family.sigmas(STEPS, 5.0).tolist()
    cfg = RunConfig()
    denoise = Denoiser(family, modules.dit, family.guidance(cfg), sigmas)
    return denoise, modules, inputs, family.plan(samples, cfg)


def test_chunks_give_every_frame_once_and_start_from_the_carry() -> None:
    denoise, modules, inputs, plan = parts(Toy(), 170)
    blocks = list(sample_chunks(denoise, modules, inputs, plan, RunConfig()))
    assert [block.first for block in blocks] == [0, 5, 9, 13]
    assert sum(block.pixels.shape[1] for block in blocks) == plan.frames == 17
    # A chunk sampled without its carry must differ: the tail really is what the next one starts from.
    alone = denoise(
        latent_noise(RunConfig().runtime.seed, (7, 1), 0, 5, SHAPE),
        Toy().build_condition(Toy().encode(modules, inputs, list(plan.spans())[1], None, None)),
        list(plan.spans())[1],
        None,
    )
    assert not torch.allclose(alone[0, :3, 1:], blocks[1].pixels)


@pytest.mark.parametrize("samples", [60, 100, 260])
def test_fused_is_the_same_in_step_and_in_wavefront_order(samples: int) -> None:
    family: FusedFamily = ToyFused()
    denoise, modules, inputs, plan = parts(family, samples)
    frames = {}
    for schedule in ("step", "wavefront"):
        cfg = replace(RunConfig(), long_video=LongVideo(schedule=schedule))
        blocks = list(sample_fused(denoise, modules, inputs, plan, cfg))
        assert [block.first for block in blocks] == list(range(0, plan.frames - 2, 4))
        frames[schedule] = torch.cat([block.pixels for block in blocks], dim=1)
    assert frames["step"].shape[1] == plan.frames
    assert torch.equal(frames["step"], frames["wavefront"])
    # The first window alone must differ behind the frames that it shares: the others are blended in.
    alone = list(sample_fused(denoise, modules, inputs, family.plan(60, RunConfig()), RunConfig()))
    assert torch.equal(alone[0].pixels[:, :4], frames["step"][:, :4]) == (plan.count == 1)
