"""The seams, driven by toy families: two loops are the product's, one stands here until a family needs it.

`sample_chunks` and `sample_fused` are product code. The causal loop is written out below
against the same protocol: a signature that could not carry it fails here (and in mypy, which reads
this file) before the family arrives. Networks are tiny and random; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
    Timesteps,
    TrainableFamily,
    VideoPlan,
)  # fmt: skip
from avatarctl.flow_matching import add_noise, shifted_sigmas, timesteps_of, velocity_target
from avatarctl.rng import generator, latent_noise
from avatarctl.sampling.chunks import sample_chunks
from avatarctl.sampling.denoise import Denoiser
from avatarctl.sampling.fused import sample_fused

SHAPE = (4, 2, 2)
STEPS = 3


class ToyDit(nn.Module):
    """Latents and a per-frame drive -> velocity; `past` is a key/value cache of the causal toy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv3d(SHAPE[0], SHAPE[0], 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, drive: Tensor, past: Tensor | None = None) -> Tensor:
        out = torch.tanh(self.mix(x)) + drive.view(1, 1, -1, 1, 1) - t.view(-1, 1, 1, 1, 1) / 1000
        return out if past is None else out + past.mean()


class ToyCodec:
    """One pixel frame per latent frame; remembers nothing between clips."""

    def encode(self, video: Tensor) -> Tensor:
        return video.mean(1, keepdim=True).expand(-1, SHAPE[0], -1, -1, -1) * 0.5

    def decoder(self) -> ToyDecoder:
        return ToyDecoder()


class ToyDecoder:
    def __init__(self) -> None:
        self.pushed = 0

    def push(self, latents: Tensor) -> Tensor:
        self.pushed += latents.shape[2]
        return latents[:, :3]


class ToyWave:
    def read(self, start: int, stop: int) -> np.ndarray:
        return np.sin(np.arange(start, stop, dtype=np.float32))


@dataclass
class ToyState:
    past: dict[int, list[Tensor]] = field(default_factory=dict)  # causal: one cache per step
    decoder: ToyDecoder | None = None
    prefills: int = 0


class Toy:
    """What the three toys share; `kind` and the spans are all that differs in the plan."""

    name = "toy"
    kind: Any = "chunks"

    def frame_size(self, image: tuple[int, int], cfg: RunConfig) -> tuple[int, int]:
        return 2, 2

    def guidance(self, cfg: RunConfig) -> Guidance:
        return Guidance(2.0)

    def notices(self, cfg: RunConfig) -> tuple[str, ...]:
        return ()

    def conventions(self, cfg: RunConfig) -> Conventions:
        return Conventions(audio_offset=0, mask_keep=0, hole=0.0, fps=25, sigma_shift=5.0)

    def spans(self, frames: int) -> Iterator[Span]:
        """Chunks of 5 frames that share one."""
        for index, start in enumerate(range(0, frames - 1, 4)):
            yield Span(index, start, 5, (start * 10, (start + 5) * 10), min(index, 1), min(index, 1))

    def plan(self, samples: int, cfg: RunConfig) -> VideoPlan:
        frames = samples // 10
        return VideoPlan(self.kind, lambda: self.spans(frames), len(list(self.spans(frames))), frames, SHAPE)

    def open(self, modules: Modules, inputs: Inputs, cfg: RunConfig) -> ToyState:
        return ToyState()

    def encode(
        self, modules: Modules, inputs: Inputs, span: Span, state: ToyState, carry: Carry
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

    def prepare(
        self, dit: nn.Module, condition: Condition, branches: Sequence[str], state: ToyState
    ) -> Prepared:
        wave = condition.audio["wave"]
        return Prepared(None, {name: wave if name == "full" else torch.zeros_like(wave) for name in branches})

    def predict(
        self, dit: nn.Module, x: Tensor, t: Tensor, prepared: Prepared, branches: Sequence[str],
        *, span: Span, step: int, state: ToyState,
    ) -> dict[str, Tensor]:  # fmt: skip
        return {name: dit(x, t, prepared.branch[name]) for name in branches}

    def combine(self, velocities: Mapping[str, Tensor], guidance: Guidance, step: int) -> Tensor:
        negative = velocities["negative"]
        return negative + guidance.text * (velocities["full"] - negative)

    def advance(
        self, modules: Modules, state: ToyState, span: Span, latents: Tensor, pixels: Tensor
    ) -> Carry:
        return pixels[:, :, -1:]

    def decoder(self, modules: Modules, state: ToyState) -> Decoder:
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

    def fuse(self, new: Tensor, written: Tensor, span: Span, step: int, state: ToyState) -> Tensor:
        shared = written.shape[2]
        ramp = (torch.arange(shared) + 1).view(1, 1, -1, 1, 1) / (shared + 1)
        return torch.cat([written * (1 - ramp) + new[:, :, :shared] * ramp, new[:, :, shared:]], dim=2)


class ToyCausal(Toy):
    """Blocks of 3 frames that attend to the past of the same step."""

    kind = "causal"

    def spans(self, frames: int) -> Iterator[Span]:
        for index, start in enumerate(range(0, frames, 3)):
            yield Span(index, start, 3, (start * 10, (start + 3) * 10), 0, 0)

    def open(self, modules: Modules, inputs: Inputs, cfg: RunConfig) -> ToyState:
        return ToyState(decoder=ToyDecoder(), prefills=1)

    def branches(self, guidance: Guidance, step: int) -> tuple[str, ...]:
        return ("full",)

    def predict(
        self, dit: nn.Module, x: Tensor, t: Tensor, prepared: Prepared, branches: Sequence[str],
        *, span: Span, step: int, state: ToyState,
    ) -> dict[str, Tensor]:  # fmt: skip
        past = state.past.setdefault(step, [])
        out = dit(x, t, prepared.branch["full"], torch.cat(past, dim=2) if past else None)
        past.append(out)
        return {"full": out}

    def combine(self, velocities: Mapping[str, Tensor], guidance: Guidance, step: int) -> Tensor:
        return velocities["full"]

    def advance(
        self, modules: Modules, state: ToyState, span: Span, latents: Tensor, pixels: Tensor
    ) -> Carry:
        state.prefills += 1
        return None

    def decoder(self, modules: Modules, state: ToyState) -> Decoder:
        assert state.decoder is not None
        return state.decoder


class ToyTrained(Toy):
    """The training half of the protocol."""

    def sample_timesteps(self, keys: Sequence[int], frames: int) -> Timesteps:
        ids = torch.tensor([int(torch.randint(1000, (), generator=generator(0, "t", key))) for key in keys])
        sigma = 1 - ids / 1000
        return Timesteps(ids, timesteps_of(sigma), sigma, torch.ones_like(sigma))

    def draw(self, condition: Condition, keys: Sequence[int]) -> Condition:
        heard = torch.tensor(
            [float(torch.rand((), generator=generator(0, "drop", key)) > 0.5) for key in keys]
        )
        return replace(condition, audio={"wave": condition.audio["wave"] * heard.view(-1, 1)})

    def training_forward(self, dit: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        drives = condition.audio["wave"]
        return torch.cat([dit(x[i : i + 1], t[i : i + 1], drives[i]) for i in range(len(x))])

    def loss(
        self, velocity: Tensor, target: Tensor, condition: Condition, timesteps: Timesteps
    ) -> tuple[Tensor, dict[str, Tensor]]:
        each = ((velocity - target) ** 2).flatten(1).mean(1) * timesteps.weight
        return each.mean(), {"flow": each.detach()}


def causal(
    family: Family, denoise: Denoiser, modules: Modules, inputs: Inputs, plan: VideoPlan, cfg: RunConfig
) -> tuple[Tensor, Any]:
    """open, prefill; for span: prepare(audio); for step: predict with that step's past; decode; advance."""
    state = family.open(modules, inputs, cfg)
    carry: Carry = None
    frames = []
    for span in plan.spans():
        condition = family.build_condition(family.encode(modules, inputs, span, state, carry))
        key, first = family.noise_key(span, inputs)
        latents = denoise(latent_noise(0, key, first, span.frames, plan.shape), condition, span, state)
        frames.append(family.decoder(modules, state).push(latents))
        carry = family.advance(modules, state, span, latents, frames[-1])
    return torch.cat(frames, dim=2), state


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
        Toy().build_condition(Toy().encode(modules, inputs, list(plan.spans())[1], ToyState(), None)),
        list(plan.spans())[1],
        ToyState(),
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


def test_causal_keeps_one_past_per_step_and_one_decoder_per_job() -> None:
    denoise, modules, inputs, plan = parts(ToyCausal(), 120)
    frames, state = causal(ToyCausal(), denoise, modules, inputs, plan, RunConfig())
    assert frames.shape[2] == 12 and state.decoder.pushed == 12
    assert {step: len(past) for step, past in state.past.items()} == {0: 4, 1: 4, 2: 4}
    assert state.prefills == 1 + plan.count


def test_training_draws_belong_to_the_sample_not_to_the_batch() -> None:
    family: TrainableFamily = ToyTrained()
    dit, keys = ToyDit(), [3, 1, 4]
    clean = torch.randn(3, SHAPE[0], 5, *SHAPE[1:], generator=generator(0, "clean"))
    noise = torch.randn(clean.shape, generator=generator(0, "noise"))
    condition = Condition(None, clean, None, {"wave": torch.ones(3, 5)}, {})

    def losses(rows: list[int]) -> Tensor:
        chosen = [keys[row] for row in rows]
        times = family.sample_timesteps(chosen, 5)
        drawn = family.draw(replace(condition, audio={"wave": condition.audio["wave"][rows]}), chosen)
        noisy = add_noise(clean[rows], noise[rows], times.sigma)
        v = family.training_forward(dit, noisy, times.t, drawn)
        return family.loss(v, velocity_target(clean[rows], noise[rows]), drawn, times)[1]["flow"]

    together = losses([0, 1, 2])
    assert torch.allclose(together, torch.cat([losses([2]), losses([0]), losses([1])])[[1, 2, 0]])


def test_each_toy_satisfies_the_protocol() -> None:
    families: list[Family] = [Toy(), ToyFused(), ToyCausal(), ToyTrained()]
    assert [family.plan(120, RunConfig()).kind for family in families] == [
        "chunks",
        "fused",
        "causal",
        "chunks",
    ]
