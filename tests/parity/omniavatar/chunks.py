"""Chunk plans, size buckets and the fit of an image (spec/omniavatar.md f.3, f.4).

The plans are executed, not computed: the real chunk loop and family run with networks that do nothing but
note what they are given.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from avatarctl.conditioning.chunks import plan_chunks
from avatarctl.conditioning.geometry import choose_bucket, chunk_frames, cover_size, fit_image
from avatarctl.config import LongVideo, Model, Output, RunConfig, Sampling
from avatarctl.events import silent
from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.family import Condition, Guidance, Inputs, Modules
from avatarctl.sampling.chunks import FrameBlock, sample_chunks
from avatarctl.sampling.denoise import Denoiser
from avatarctl.timeline import SAMPLES_PER_FRAME, latent_frames, reference_frames_of_samples
from tests.families.watched import Witness

from ..golden import Checks, Reader

checks = Checks()

PLANS = "chunk_plans.json"
BUCKETS = "size_buckets.json"
IMAGE = "resize_pad.safetensors"
_PLAN_INPUTS = ("*.samples", "*.image_size_wh", "*.max_tokens", "*.overlap", "*.max_hw")
_PLANNED = (
    "height",
    "width",
    "L",
    "T",
    "audio_frames",
    "padded_audio_frames",
    "padded_samples",
    "num_chunks",
)
_EXECUTED = (
    "index",
    "latent_frames",
    "fixed_latent_frames",
    "zero_audio_prefix",
    "audio_start",
    "audio_end",
    "audio_len",
    "mask_zero_latents",
    "y_channels",
)


def _cases(reader: Reader) -> list[str]:
    """Prefixes of the cases of a list."""
    return list(dict.fromkeys(key.split(".")[0] for key in reader.keys("*")))


def _config(reader: Reader, case: str) -> RunConfig:
    """A run under `compat reference`: offset 1, and the published frame count with its float rounding."""
    cfg = RunConfig(
        model=Model(channels=33, audio_offset=1, compat="reference"),
        sampling=Sampling(guidance_scale=1.0),
        long_video=LongVideo(
            max_tokens=reader.take(f"{case}.max_tokens"),
            max_size=reader.take(f"{case}.max_hw"),
            overlap_frames=reader.take(f"{case}.overlap"),
        ),
    )
    width, height = reader.take(f"{case}.image_size_wh")
    height, width = OmniAvatar().frame_size((height, width), cfg)
    return replace(cfg, output=Output(width=width, height=height))


@checks(PLANS, compares=tuple(f"*.{name}" for name in _PLANNED), needs=_PLAN_INPUTS)
def plans(reader: Reader) -> None:
    for case in _cases(reader):
        cfg, samples = _config(reader, case), reader.take(f"{case}.samples")
        audio = reference_frames_of_samples(samples)
        height, width = cfg.output.height, cfg.output.width
        length = chunk_frames(cfg.long_video.max_tokens, height, width)
        plan = plan_chunks(audio, length=length, overlap=cfg.long_video.overlap_frames, offset=1)
        planned = {
            "height": height,
            "width": width,
            "L": length,
            "T": latent_frames(length),
            "audio_frames": plan.audio_frames,
            "padded_audio_frames": plan.padded_frames,
            "padded_samples": plan.padded_frames * SAMPLES_PER_FRAME,
            "num_chunks": plan.count,
        }
        assert OmniAvatar().plan(samples, cfg).count == plan.count
        for name in _PLANNED:
            reader.compare(f"{case}.{name}", planned[name])


class _Unused(nn.Module):
    """In the transformer's place: asked to prepare the texts of a job, and for nothing else."""

    def forward(self, mode: str, text: torch.Tensor) -> None:
        assert mode == "prepare"


class _Codec:
    """8 pixels to a latent, no content."""

    def encode(self, video: Tensor) -> Tensor:
        batch, _, frames, height, width = video.shape
        return torch.zeros(batch, 16, latent_frames(frames), height // 8, width // 8)

    def decoder(self) -> _Codec:
        return self

    def push(self, latents: Tensor) -> Tensor:
        batch, _, frames, height, width = latents.shape
        return torch.zeros(batch, 3, 4 * frames - 3, 8 * height, 8 * width)


class _Counter:
    """Features that are their own frame number, counted from 1: 0 is a frame that gets no audio."""

    width = 1

    def features(self, waveform: Tensor, frames: int) -> Tensor:
        assert waveform.shape == (1, frames * SAMPLES_PER_FRAME)
        return torch.arange(1.0, frames + 1).view(1, frames, 1)


class _Text:
    text_len = 1

    def tokens(self, prompt: str) -> int:
        return 1

    def encode(self, prompt: str, device: torch.device) -> Tensor:
        return torch.zeros(1, 1, 1)


def _execute(cfg: RunConfig, samples: int) -> tuple[list[Condition], list[FrameBlock]]:
    """The chunk loop on an image of one latent: what each chunk was given and which frames it gave."""
    family = Witness()
    plan = replace(family.plan(samples, cfg), shape=(16, 1, 1))
    inputs = Inputs(
        image=torch.zeros(1, 3, 8, 8),
        waveform=SimpleNamespace(read=lambda start, stop: torch.zeros(stop - start).numpy()),
        samples=samples,
        mean=0.0,
        variance=1.0,
        prompt="",
        negative_prompt="",
        job=0,
        emit=silent,
    )
    modules = Modules(dit=_Unused(), vae=_Codec(), text=_Text(), audio=_Counter(), device=torch.device("cpu"))
    denoise = Denoiser(family, modules.dit, Guidance(1.0), family.sigmas(1, 5.0).tolist())
    blocks = list(sample_chunks(denoise, modules, inputs, plan, cfg))
    return family.seen, blocks


def _observed(index: int, condition: Condition) -> dict[str, int]:
    """A chunk's row of the recorded table, from its condition."""
    used = condition.audio["features"][0, :, 0].to(torch.int64).tolist()
    prefix = next(place for place, number in enumerate(used) if number)
    assert used[prefix:] == list(range(used[prefix], used[-1] + 1)), "frames of audio out of order"
    return {
        "index": index,
        "latent_frames": condition.channels.shape[2],
        "fixed_latent_frames": int(condition.fixed_mask.sum()),
        "zero_audio_prefix": prefix,
        "audio_start": used[prefix] - 1,
        "audio_end": used[-1],
        "audio_len": len(used),
        "mask_zero_latents": int((condition.channels[0, 16] == 0).sum()),
        "y_channels": condition.channels.shape[1],
    }


@checks(
    PLANS,
    compares=(
        *(f"*.chunks.*.{name}" for name in _EXECUTED),
        "*.frames_from_chunk",
        "*.output_frames",
    ),
    needs=_PLAN_INPUTS,
)
def executed_plans(reader: Reader) -> None:
    for case in _cases(reader):
        cfg, samples = _config(reader, case), reader.take(f"{case}.samples")
        conditions, blocks = _execute(cfg, samples)
        spans = list(OmniAvatar().plan(samples, cfg).spans())
        for index, (span, condition) in enumerate(zip(spans, conditions, strict=True)):
            observed = _observed(index, condition)
            assert (span.index, span.frames, span.fixed) == (
                index,
                observed["latent_frames"],
                observed["fixed_latent_frames"],
            )
            assert span.audio[1] - span.audio[0] == observed["audio_len"] * SAMPLES_PER_FRAME
            for name in _EXECUTED:
                reader.compare(f"{case}.chunks.{index}.{name}", observed[name])
        frames = [block.pixels.shape[1] for block in blocks]
        assert [block.first for block in blocks] == [sum(frames[:i]) for i in range(len(frames))]
        reader.compare(f"{case}.frames_from_chunk", frames)
        reader.compare(f"{case}.output_frames", sum(frames))


@checks(BUCKETS, compares=("*.selected_hw", "*.scaled_hw"), needs=("*.width", "*.height", "*.max_hw"))
def size_buckets(reader: Reader) -> None:
    for case in _cases(reader):
        height, width = reader.take(f"{case}.height"), reader.take(f"{case}.width")
        chosen = choose_bucket(height, width, reader.take(f"{case}.max_hw"))
        reader.compare(f"{case}.selected_hw", list(chosen))
        reader.compare(f"{case}.scaled_hw", list(cover_size(height, width, chosen)))


@checks(IMAGE, compares=("output",), needs=("image", "target_hw"))
def fitted_image(reader: Reader) -> None:
    target = tuple(reader.take("target_hw").tolist())
    reader.compare("output", fit_image(reader.take("image"), target), atol=1e-5)
