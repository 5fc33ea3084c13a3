"""The sampling loop of one chunk, without VAE and encoders (spec/omniavatar.md f.5)."""

from __future__ import annotations

import re
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.family import Condition, Guidance, Span
from avatarctl.sampling.denoise import Denoiser

from ..golden import Checks, Reader
from .building import transformer

checks = Checks()

FILE = "denoise.safetensors"
_GIVEN = ("noise", "lat", "y", "context_positive", "context_negative", "audio_emb")
_NEEDS = ("state.*", *_GIVEN)
_LATENTS = 1e-3  # absolute, on latents up to 20


class _Tail:
    """Stands in for the VAE: the clean latents of the tail, whatever is encoded."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def encode(self, video: Any) -> Tensor:
        return self.latents


def _state(given: dict[str, Tensor]) -> Any:
    """What `OmniAvatar.open` makes once per job, with the recorded tensors in place of encoders."""
    return SimpleNamespace(
        reference=given["y"][:, :16, :1],
        features=SimpleNamespace(rows=lambda start, stop: given["audio_emb"]),
        text={"prompt": given["context_positive"], "negative": given["context_negative"]},
        text_ready={},
        silence_ready=None,
        rotary=None,
        source=None,
    )


def _span(frames: int, fixed: int) -> Span:
    return Span(index=1, start=0, frames=frames, audio=(0, 640 * (4 * frames - 3)), fixed=fixed, keep_from=0)


def _condition(given: dict[str, Tensor], fixed: int, state: Any) -> Condition:
    """The chunk's condition by the family's own code; without fixed frames, as recorded."""
    if not fixed:
        audio = {"features": given["audio_emb"]}
        return Condition(given["y"], clean=None, fixed_mask=None, audio=audio, text=state.text)
    family = OmniAvatar()
    modules: Any = SimpleNamespace(vae=_Tail(given["lat"][:, :, :fixed]))
    span, unused = _span(given["lat"].shape[2], fixed), cast(Any, None)
    return family.build_condition(family.encode(modules, unused, span, state, carry="tail"))


def _sample(reader: Reader, guidance: Guidance, steps: int, fixed: int) -> Tensor:
    family = OmniAvatar()
    given = {name: reader.take(name) for name in _GIVEN}
    state = _state(given)
    sigmas = family.sigmas(steps, float(reader.metadata["shift"])).tolist()
    denoise = Denoiser(family, transformer(reader), guidance, sigmas)
    span = _span(given["noise"].shape[2], fixed)
    return denoise(given["noise"], _condition(given, fixed, state), span, state)


def _scales(run: str) -> Guidance:
    """Guidance by the name of a run: nocfg, 2pass_cfg4.5..., 3pass_text4.5_audio3."""
    if run == "nocfg":
        return Guidance(1.0)
    if found := re.match(r"2pass_cfg([\d.]+)(_nofixed)?$", run):
        return Guidance(float(found[1]))
    if found := re.match(r"3pass_text([\d.]+)_audio([\d.]+)(_nofixed)?$", run):
        return Guidance(float(found[1]), float(found[2]))
    raise AssertionError(f"{run} is not the name of a known guidance")


def _runs(reader: Reader, pattern: str) -> list[str]:
    return [key.removeprefix("latents.") for key in reader.keys(f"latents.{pattern}")]


def _compare_runs(reader: Reader, *patterns: str) -> None:
    for run in (run for pattern in patterns for run in _runs(reader, pattern)):
        fixed = 0 if run.endswith("_nofixed") else int(reader.metadata["fixed_frame"])
        out = _sample(reader, _scales(run), int(reader.metadata["steps"]), fixed)
        reader.compare(f"latents.{run}", out, atol=_LATENTS)


@checks(FILE, compares=("y", "lat"), needs=("audio_emb", "context_*"))
def condition_of_a_chunk(reader: Reader) -> None:
    """The recorded channels and clean latents are what the family builds from a tail and a reference."""
    fixed = int(reader.metadata["fixed_frame"])
    if not fixed:
        pytest.skip(f"{FILE} was recorded without fixed frames")
    given = {name: reader.take(name) for name in _GIVEN}
    condition = _condition(given, fixed, _state(given))
    reader.compare("y", condition.channels)
    reader.compare("lat", condition.clean)
    assert condition.fixed_mask is not None
    frames = torch.arange(given["lat"].shape[2]).view(1, 1, -1, 1, 1)
    assert torch.equal(condition.fixed_mask, (frames < fixed).expand_as(condition.fixed_mask))


@checks(FILE, compares=("latents.nocfg*",), needs=_NEEDS)
def one_pass(reader: Reader) -> None:
    _compare_runs(reader, "nocfg*")


@checks(FILE, compares=("latents.nocfg",), needs=("state.*", "noise", "lat", "y", "context_positive"))
@torch.no_grad()
def one_pass_from_raw_inputs(reader: Reader) -> None:
    """The same through the forward that training uses, clamped and stepped here."""
    model, x = transformer(reader), reader.take("noise")
    y, context, audio = (reader.take(name) for name in ("y", "context_positive", "audio_emb"))
    fixed, steps = int(reader.metadata["fixed_frame"]), int(reader.metadata["steps"])
    shift = float(reader.metadata["shift"])
    clean = reader.take("lat")[:, :, :fixed]
    sigmas = [shift * (1 - i / steps) / (1 + (shift - 1) * (1 - i / steps)) for i in range(steps + 1)]
    for sigma, following in pairwise(sigmas):
        x = torch.cat([clean, x[:, :, fixed:]], dim=2)
        t = torch.full((len(x),), 1000 * sigma)
        x = x + (following - sigma) * model(torch.cat([x, y], dim=1), t, context, audio)
    reader.compare("latents.nocfg", torch.cat([clean, x[:, :, fixed:]], dim=2), atol=_LATENTS)


@checks(FILE, compares=("latents.2pass_cfg*[0-9]",), needs=_NEEDS)
def two_passes(reader: Reader) -> None:
    _compare_runs(reader, "2pass_cfg*[0-9]")


@checks(FILE, compares=("latents.3pass_*",), needs=_NEEDS)
def three_passes(reader: Reader) -> None:
    _compare_runs(reader, "3pass_*")


@checks(FILE, compares=("latents.*_nofixed",), needs=_NEEDS)
def no_fixed_frames(reader: Reader) -> None:
    _compare_runs(reader, "*_nofixed")


@checks(FILE, compares=("teacache.none.*.latents",), needs=_NEEDS)
def more_steps(reader: Reader) -> None:
    """Runs of more steps, recorded as what a step cache is measured against; guided like the others."""
    for key in reader.keys("teacache.none.*.latents"):
        named = re.fullmatch(r"teacache\.none\.(\d)pass(\d+)\.latents", key)
        assert named, f"{key} is not the name of a known run"
        passes, steps = named.groups()
        alike = [run for run in _runs(reader, f"{passes}pass_*") if not run.endswith("_nofixed")]
        if not alike:
            pytest.skip(f"{FILE} has no latents.{passes}pass_* to tell the guidance of {key}")
        out = _sample(reader, _scales(alike[0]), int(steps), int(reader.metadata["fixed_frame"]))
        reader.compare(key, out, atol=_LATENTS)
