"""A source whose frames are numbered, through the chunks of OmniAvatar with 49 and 65 channels.

Networks note what they are given and make nothing: a code tells of which frames it is, and what of each is
erased. So every channel of a chunk can be read as frames of the source.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avatarctl.config import RunConfig
from avatarctl.errors import UsageError
from avatarctl.events import silent
from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.family import Condition, Guidance, Inputs, Modules, Source
from avatarctl.media import FittedFrames, LengthRule
from avatarctl.registry import configure
from avatarctl.sampling.chunks import sample_chunks
from avatarctl.sampling.denoise import Denoiser
from tests.families.watched import Witness

LENGTH, SIDE = 17, 16
LATENTS = (LENGTH + 3) // 4
MADE = -0.5  # what the decoder shows


@dataclass
class Numbered:
    """Frame j is j + 1 everywhere, so that it is told from a hole. ranges: what was read."""

    frames: int
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.frames, "read outside the source"
        self.ranges.append((start, stop))
        numbers = np.arange(start + 1, stop + 1, dtype=np.uint8)
        return np.broadcast_to(numbers[:, None, None, None], (stop - start, SIDE, SIDE, 3)).copy()


def number(value: float) -> int:
    """The source's frame of a pixel in [-1, 1]; -1 for one that was made, -2 for a hole."""
    return -1 if value == MADE else -2 if value == 0 else round((value + 1) * 127.5) - 1


class Codec:
    """Latent t is the last pixel frame of its group, the upper left pixel in channel 0 and the lower right in
    channel 1: kept and erased by the mask of these tests. coded: frames of every call."""

    def __init__(self) -> None:
        self.coded: list[int] = []

    def encode(self, video: Tensor) -> Tensor:
        self.coded.append(video.shape[2])
        latents = torch.zeros(1, 16, (video.shape[2] + 3) // 4, SIDE // 8, SIDE // 8)
        for channel, corner in enumerate((0, -1)):
            latents[:, channel] = video[0, 0, ::4, corner, corner, None, None]
        return latents

    def decoder(self) -> Codec:
        return self

    def push(self, latents: Tensor) -> Tensor:
        return torch.full((1, 3, 4 * latents.shape[2] - 3, SIDE, SIDE), MADE)


class Idle(nn.Module):
    def forward(self, mode: str, text: Tensor) -> None:
        assert mode == "prepare"


@dataclass
class Run:
    seen: list[Condition]
    frames: int
    source: Numbered
    codec: Codec

    def shown(self, chunk: int, channels: slice, corner: int = 0) -> list[int]:
        """Of each latent the frame that is shown in its kept (0) or erased (1) corner."""
        condition = self.seen[chunk].channels
        assert condition is not None
        return [number(float(value)) for value in condition[0, channels][corner, :, 0, 0]]


def config(channels: int, rule: str = "all", overlap: int = 5, *more: str) -> RunConfig:
    return configure(
        "model.name=cartoon-v2v", f"model.channels={channels}", f"long_video.num_frames={LENGTH}",
        f"long_video.overlap_frames={overlap}", f"data.mask_rule={rule}", "sampling.steps=1",
        f"output.width={SIDE}", f"output.height={SIDE}", *more,
    )  # fmt: skip


def run(
    cfg: RunConfig, frames: int, audio: int, length: Literal["pingpong", "hold", "video"] = "pingpong"
) -> Run:
    """frames: of the source; audio: frames of it."""
    family, source, codec = Witness(), Numbered(frames), Codec()
    plan = family.plan(640 * audio, cfg)
    keep = torch.ones(1, 1, SIDE, SIDE)
    keep[..., SIDE // 2 :, SIDE // 2 :] = 0
    fitted = FittedFrames(source, (SIDE, SIDE))
    inputs = Inputs(
        image=None,
        waveform=SimpleNamespace(read=lambda start, stop: np.zeros(stop - start, np.float32)),
        samples=640 * audio,
        mean=0.0,
        variance=1.0,
        prompt="",
        negative_prompt="",
        job=0,
        emit=silent,
        source=Source(LengthRule(fitted, plan.frames, length), keep, fitted),
    )
    text = SimpleNamespace(
        text_len=1, tokens=lambda prompt: 1, encode=lambda prompt, device: torch.zeros(1, 1, 1)
    )
    voice = SimpleNamespace(width=1, features=lambda waveform, frames, moments=None: torch.ones(1, frames, 1))
    modules: Any = Modules(dit=Idle(), vae=codec, text=text, audio=voice, device=torch.device("cpu"))  # type: ignore[arg-type]
    denoise = Denoiser(family, modules.dit, Guidance(1.0), family.sigmas(1, 5.0).tolist())
    made = sum(block.pixels.shape[1] for block in sample_chunks(denoise, modules, inputs, plan, cfg))
    return Run(family.seen, made, source, codec)


REFERENCE, MASK, MASKED, SEQUENCE = slice(0, 16), 16, slice(17, 33), slice(33, 49)


@pytest.mark.parametrize("rule", ["all", "first_keep", "legacy_two_step"])
@pytest.mark.parametrize("overlap", [1, 5, 13])
def test_every_chunk_is_shown_the_frames_of_its_time(rule: str, overlap: int) -> None:
    chunks, hop = 5, LENGTH - overlap
    seen = run(config(65, rule, overlap), frames=120, audio=LENGTH + (chunks - 1) * hop)
    assert len(seen.seen) == chunks
    for chunk in (0, chunks // 2, chunks - 1):
        first = chunk * hop
        own = [first + 4 * t for t in range(LATENTS)]
        holes = [-2] * LATENTS
        if rule != "all" and chunk:
            own[0] = -1  # the frame that the rule keeps is the one given
        if rule == "first_keep":
            holes[0] = own[0]
        if rule == "legacy_two_step":  # its first latent is that of the frame with its hole
            assert own[0] == (-1 if chunk else 0)
        assert seen.shown(chunk, REFERENCE) == [0] * LATENTS
        assert seen.shown(chunk, MASKED) == own
        assert seen.shown(chunk, MASKED, corner=1) == holes
        behind = min(first + LENGTH, 120 - LENGTH)
        assert seen.shown(chunk, SEQUENCE) == [behind + 4 * t for t in range(LATENTS)]


@pytest.mark.parametrize("rule", ["all", "first_keep", "legacy_two_step"])
def test_what_is_given_is_frozen_and_nothing_else(rule: str) -> None:
    seen = run(config(49, rule, overlap=5), frames=60, audio=41)
    for chunk, condition in enumerate(seen.seen):
        given = 2 if chunk else 1 if rule == "first_keep" else 0
        assert condition.fixed_mask is not None and condition.channels is not None
        assert condition.fixed_mask.flatten().tolist() == [t < given for t in range(LATENTS)]
        mask = condition.channels[0, MASK]
        assert (mask[:given] == 0).all()
        assert (mask[given:, -1, -1] == 1).all() and (mask[given:, 0, 0] == 0).all()
        assert condition.clean is not None
        clean = [number(float(value)) for value in condition.clean[0, 0, :given, 0, 0]]
        assert clean == ([-1] * given if chunk else [0] * given)
        assert condition.channels.shape[1] == 33


@pytest.mark.parametrize("length", ["pingpong", "hold", "video"])
@pytest.mark.parametrize("frames", [1, 2, 6, 17, 33, 300])
def test_a_source_of_any_length(frames: int, length: Any) -> None:
    audio = 45
    seen = run(config(65), frames=frames, audio=audio, length=length)
    assert seen.frames == audio
    turn = [*range(frames), *range(frames - 2, 0, -1)] * 60
    for chunk in range(len(seen.seen)):
        places = [12 * chunk + 4 * t for t in range(LATENTS)]
        expected = [turn[place] if length == "pingpong" else min(place, frames - 1) for place in places]
        assert seen.shown(chunk, MASKED) == expected
        # Padded with its last latent where the source has fewer frames than a chunk.
        sequence = seen.shown(chunk, SEQUENCE)
        last = min(LENGTH, frames) - 1 & ~3
        if frames < LENGTH:
            assert sequence == [min(4 * t, last) for t in range(LATENTS)]


@pytest.mark.parametrize("audio", range(1, 201))
def test_one_to_two_hundred_frames_of_audio(audio: int) -> None:
    cfg = config(49)
    if audio not in (1, 16, 17, 18, 29, 30, 100, 199, 200):  # the plan alone
        plan = OmniAvatar().plan(640 * audio, cfg)
        spans = list(plan.spans())
        assert plan.frames == audio and plan.count == len(spans) == 1 + max(0, -(-(audio - LENGTH) // 12))
        assert all(span.audio == (640 * 4 * span.start, 640 * (4 * span.start + LENGTH)) for span in spans)
        assert [span.fixed for span in spans] == [0] + [2] * (plan.count - 1)
        return
    seen = run(cfg, frames=240, audio=audio)
    assert seen.frames == audio
    end = LENGTH + 12 * (len(seen.seen) - 1)
    # The first frame, then each once, up to the end of the last chunk.
    read = [frame for first, last in seen.source.ranges for frame in range(first, last)]
    assert read == list(range(end))


def test_only_what_a_chunk_needs_is_coded() -> None:
    short = run(config(49), frames=100, audio=LENGTH + 2 * 12).codec.coded
    assert sorted(short) == sorted([1, *[LENGTH] * 3, *[5] * 2])  # reference; masked; what is given
    # A sequence of the same last frames is coded once.
    long = run(config(65), frames=30, audio=LENGTH + 2 * 12).codec.coded
    assert sorted(long) == sorted([1, *[LENGTH] * 3, *[5] * 2, LENGTH])


def test_without_channels_for_it_there_is_no_reference_sequence() -> None:
    seen = run(config(49), frames=200, audio=20)
    assert max(last for _, last in seen.source.ranges) == LENGTH + 12


def test_what_a_model_of_video_has_not() -> None:
    family = OmniAvatar()
    for asked, key in (("model.compat=reference", "model.compat"), ("model.audio_offset=1", "audio_offset")):
        cfg = config(49)
        section, name = asked.partition("=")[0].split(".")
        value: Any = 1 if name == "audio_offset" else "reference"
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
        with pytest.raises(UsageError, match=key):
            family.plan(6400, cfg)
    still = configure("output.width=64", "output.height=64")
    for name, value in (("mask", "m.png"), ("mask_rule", "first_keep")):
        with pytest.raises(UsageError, match=f"data.{name}"):
            family.plan(6400, replace(still, data=replace(still.data, **{name: value})))
    with pytest.raises(UsageError, match=r"output\.length"):
        family.plan(6400, replace(still, output=replace(still.output, length="hold")))


def test_the_size_is_that_of_training_clips() -> None:
    assert OmniAvatar().frame_size((1080, 1920), config(49, "all", 5, "data.width=80", "data.height=48")) == (
        48,
        80,
    )
