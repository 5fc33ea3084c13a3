"""Guidance over the steps of one window (spec/stableavatar.md d)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from avatarctl.events import silent
from avatarctl.families.stableavatar import StableAvatar
from avatarctl.family import Condition, Inputs, Modules, Span
from avatarctl.sampling.denoise import Denoiser
from avatarctl.timeline import SAMPLES_PER_FRAME, pixel_frames

from ..golden import Checks, Reader
from .building import META, padded_text, setting, transformer
from .stand_ins import BRANCHES, SHIFT, Codec, Image, Text, reference_config

checks = Checks()

FILE = "set3_guidance.safetensors"
_RELATIVE = 1e-5  # of the norm
_NEEDS = ("init", "y", "context_pos", "context_neg", "clip_fea", "vocal_embeddings")


def _scales(reader: Reader, run: str) -> tuple[float, float]:
    """(text, audio) of a run, `s0` and so on."""
    text, audio = reader.folder.open(META).take(f"{reader.file}.scales.{run.removeprefix('s')}")
    return float(text), float(audio)


def _compare_run(reader: Reader, run: str, *, batched: bool) -> None:
    """Every step with the family's own opening, branches and combination; channels and audio as recorded."""
    family, dit = StableAvatar(), transformer(reader)
    init, (text, audio) = reader.take("init"), _scales(reader, run)
    frames, height, width = init.shape[2:]
    cfg = reference_config(
        clip_frames=setting(reader, "clip_frames"),
        overlap=0,
        text=text,
        audio=audio,
        size=(8 * height, 8 * width),
        batch_branches=batched,
    )
    state = family.open(*_opened(reader, dit, frames, cfg), cfg)
    condition = Condition(
        channels=reader.take("y"),
        clean=None,
        fixed_mask=None,
        audio={"tokens": reader.take("vocal_embeddings")},
        text=_texts(reader),
        extra={"image": state.image},
    )
    steps = len(reader.keys(f"{run}.step*.latents"))
    denoise = Denoiser(family, dit, family.guidance(cfg), family.sigmas(steps, SHIFT).tolist())
    # The recorded batch has all three, also where one has no weight and our own run leaves it out.
    every = family.prepare(dit, condition, BRANCHES, state)
    prepared = denoise.prepare(condition, state)
    span = Span(index=0, start=0, frames=frames, audio=(0, 0), fixed=0, keep_from=0)
    x = init
    for step in range(steps):
        t = torch.full((1,), 1000 * denoise.sigmas[step])
        with torch.no_grad():
            velocities = family.predict(dit, x, t, every, BRANCHES, span=span, step=step, state=state)
        _compare(reader, f"{run}.step{step}.preds", torch.cat([velocities[name] for name in BRANCHES]))
        guided = family.combine(velocities, denoise.guidance, step)
        _compare(reader, f"{run}.step{step}.guided", guided)
        x = denoise.step(x, step, prepared, span, state)
        _compare(reader, f"{run}.step{step}.latents", x)
    _compare(reader, f"{run}.final", x)


def _compare(reader: Reader, key: str, actual: Tensor) -> None:
    reader.compare(key, actual, relative_l2=_RELATIVE)


def _texts(reader: Reader) -> dict[str, Tensor]:
    """Both contexts, also where a run leaves one out."""
    return {"prompt": padded_text(reader, "context_pos"), "negative": padded_text(reader, "context_neg")}


def _opened(reader: Reader, dit: Any, frames: int, cfg: Any) -> tuple[Modules, Inputs]:
    modules = Modules(
        dit=dit,
        vae=Codec(),
        text=Text(_texts(reader)),
        audio=None,
        image=Image(reader.take("clip_fea")),
        device=torch.device("cpu"),
    )
    inputs = Inputs(
        image=torch.zeros(1, 3, cfg.output.height, cfg.output.width),
        waveform=None,
        samples=SAMPLES_PER_FRAME * pixel_frames(frames),
        mean=0.0,
        variance=0.0,
        prompt="prompt",
        negative_prompt="negative",
        job=0,
        emit=silent,
    )
    return modules, inputs


def _runs(reader: Reader) -> list[str]:
    return [key.removesuffix(".final") for key in reader.keys("s[0-9]*.final")]


@checks(FILE, compares=("s[0-9]*.*",), needs=_NEEDS)
def three_passes(reader: Reader) -> None:
    for run in _runs(reader):
        _compare_run(reader, run, batched=False)


@checks(FILE, compares=("s[0-9]*.*",), needs=_NEEDS)
def three_passes_in_a_batch(reader: Reader) -> None:
    for run in _runs(reader):
        _compare_run(reader, run, batched=True)
