"""A checked job -> frames -> a video file that grows while it is made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from einops import rearrange

from avatarctl.conditioning.masking import mask_tensor
from avatarctl.errors import AvatarctlError, NotYetSupported, OutputRefused
from avatarctl.events import Emit, Notice, OutputFinished, Planned, SpanFinished, Stage, silent
from avatarctl.family import Inputs, Modules, Source
from avatarctl.loading.modules import PARTS, Part, SomeModules, load_parts
from avatarctl.loading.placed import PlacedModules, is_full
from avatarctl.media import (
    BackgroundWriter,
    FittedFrames,
    LengthRule,
    Soundtrack,
    VideoWriter,
    Waveform,
    partial_path,
)
from avatarctl.models.device import resolve_device
from avatarctl.models.encode import image_tensor
from avatarctl.pipelines.job import Job, JobPlan
from avatarctl.rng import latent_noise
from avatarctl.sampling.chunks import sample_chunks
from avatarctl.sampling.denoise import Denoiser, NoiseSource
from avatarctl.sampling.frame_block import FrameBlock
from avatarctl.sampling.fused import sample_fused
from avatarctl.timeline import FPS

__all__ = ["FrameBlock", "generate", "load", "write_video"]


# The loop of each kind of plan, and what people call one of its spans.
_UNITS = {"chunks": "chunk", "fused": "window", "causal": "block"}
_LOOPS = {"chunks": sample_chunks, "fused": sample_fused}


def _never() -> bool:
    return False


@overload
def load(plan: JobPlan, parts: None = None, *, emit: Emit = silent) -> Modules: ...


@overload
def load(plan: JobPlan, parts: Collection[Part], *, emit: Emit = silent) -> SomeModules: ...


def load(
    plan: JobPlan, parts: Collection[Part] | None = None, *, emit: Emit = silent
) -> Modules | SomeModules:
    """The networks of a run on its device: all of them, or those of the names in `parts`, where touching
    another raises AttributeError.

    Raises WeightsMissing, ExtraMissing, EnvironmentMissing, UnusableWeights; ValueError for a name that is
    no part.
    """
    if unknown := set(parts or ()) - set(PARTS):
        raise ValueError(f"no parts of a run: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    plan.require_weights()
    emit(Stage("loading the model"))
    wanted = PARTS if parts is None else parts
    device = resolve_device(plan.cfg.runtime.device)
    if not is_full(plan.cfg.memory):

        def read(part: Part, place: torch.device) -> Any:
            held = plan.transformer
            return load_parts(
                plan.row, plan.sources, held, plan.cfg, (part,), place, emit, computes=device
            ).get(part)

        return PlacedModules(wanted, read, plan.cfg.memory, device, emit)
    made = load_parts(plan.row, plan.sources, plan.transformer, plan.cfg, wanted, device, emit)
    return Modules(**made, device=device) if parts is None else SomeModules(wanted, made.get, device)


def generate(
    plan: JobPlan,
    *,
    modules: Modules | None = None,
    noise: NoiseSource = latent_noise,
    emit: Emit = silent,
    should_stop: Callable[[], bool] = _never,
) -> Iterator[FrameBlock]:
    """Finished frames, one block per chunk or window. Networks are loaded unless they are given.

    noise: where a span's initial noise comes from, called as `rng.latent_noise`.

    Raises what `load` raises before the first block, Interrupted at the next step once `should_stop`
    returns true.
    """
    cfg, family, job, video = plan.cfg, plan.family, plan.job, plan.video
    if video.kind not in _LOOPS:
        raise NotYetSupported(f"sampling by {video.kind} has no code yet", where="long_video.strategy")
    assert cfg.sampling.steps is not None and cfg.sampling.shift is not None
    assert cfg.output.width is not None and cfg.output.height is not None
    modules = modules or load(plan, emit=emit)
    denoise = Denoiser(
        family=family,
        dit=modules.later("dit") if isinstance(modules, PlacedModules) else modules.dit,
        guidance=family.guidance(cfg),
        sigmas=family.sigmas(cfg.sampling.steps, cfg.sampling.shift).tolist(),
        noise=noise,
        unit=_UNITS[video.kind],
        emit=emit,
        should_stop=should_stop,
    )
    emit(
        Planned(
            spans=video.count,
            unit=_UNITS[video.kind],
            steps=cfg.sampling.steps,
            frames=video.frames,
            fps=FPS,
            width=cfg.output.width,
            height=cfg.output.height,
        )
    )
    with Waveform(job.audio, lead_samples=plan.lead_samples) as waveform:
        inputs = Inputs(
            image=_image(plan, modules),
            waveform=waveform,
            samples=plan.samples,
            mean=plan.mean,
            variance=plan.variance,
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            job=job.key,
            emit=emit,
            source=_source(plan),
        )
        emit(Stage("sampling"))
        yield from _LOOPS[video.kind](denoise, modules, inputs, video, cfg)


def _image(plan: JobPlan, modules: Modules) -> torch.Tensor | None:
    cfg, image = plan.cfg, plan.job.image
    if image is None:
        return None
    assert cfg.output.width is not None and cfg.output.height is not None
    fitted = image_tensor(image.pixels, (cfg.output.height, cfg.output.width), cfg.input.fit)
    return fitted.to(modules.device)


def _source(plan: JobPlan) -> Source | None:
    """The video of a job as the network sees it. Chunks and a reference sequence read through the same
    frames, so that what both need is decoded once."""
    cfg, video = plan.cfg, plan.job.video
    if video is None:
        return None
    assert cfg.output.width is not None and cfg.output.height is not None and plan.mask is not None
    fitted = FittedFrames(video, (cfg.output.height, cfg.output.width), cfg.input.fit)
    frames = LengthRule(fitted, plan.video.frames, cfg.output.length)
    return Source(frames, mask_tensor(plan.mask), fitted)


def write_video(
    plan: JobPlan,
    path: Path,
    *,
    emit: Emit = silent,
    should_stop: Callable[[], bool] = _never,
    watch: Callable[[np.ndarray], None] | None = None,
    modules: Modules | None = None,
    seen: Callable[[Modules | SomeModules], None] | None = None,
) -> OutputFinished:
    """Make the video of a plan at `path`, by way of `NAME.partial.mp4`.

    modules: loaded unless they are given. watch: is given the frames as they are written, uint8 [n, H, W, 3].
    seen: is given the networks before they work.

    A run that ends early with finished chunks leaves the playable part and names it in the error; without
    any it leaves nothing. Raises what `generate` raises, OutputRefused (also where the output is an
    input) and WriteFailed.
    """
    output = plan.cfg.output
    assert output.width is not None and output.height is not None
    started = time.monotonic()
    plan.require_weights()  # before an output is begun
    plan.require_host()
    _refuse_inputs(plan.job, plan.cfg.data.mask, path)
    writer = VideoWriter(
        path,
        width=output.width,
        height=output.height,
        fps=FPS,
        soundtrack=Soundtrack(plan.job.audio, plan.audio_delay),
        crf=output.crf,
        overwrite=output.overwrite,
    )
    encoder = BackgroundWriter(writer)
    told = writer.notices

    def stop_asked() -> bool:
        encoder.check()
        return should_stop()

    try:
        for notice in told:
            emit(Notice(notice, "warning"))
        modules = modules or load(plan, emit=emit)
        if seen is not None:
            seen(modules)
        loaded = first_frame = time.monotonic()
        frames = 0
        for block in generate(plan, modules=modules, emit=emit, should_stop=stop_asked):
            pixels = _to_bytes(block.pixels)
            encoder.write(pixels)
            if watch is not None:
                watch(pixels)
            if frames == 0:
                first_frame = time.monotonic()
            frames += block.pixels.shape[1]
            emit(SpanFinished(block.span, frames))
            del block  # its pixels need not live while the next chunk is sampled
        encoder.finish()
    except BaseException as error:
        _abandon(encoder, error, emit)
        raise
    for notice in writer.notices[len(told) :]:
        emit(Notice(notice, "warning"))
    finished = OutputFinished(
        path=str(path.absolute()),
        frames=frames,
        seconds_to_first_frame=first_frame - started,
        frames_per_second=frames / (time.monotonic() - loaded),
    )
    emit(finished)
    return finished


def _refuse_inputs(job: Job, mask: str | None, path: Path) -> None:
    """An output, growing or finished, must not be a file that the job reads."""
    for name in filter(None, (job.visual.name, job.audio.name, mask)):
        for output in (path, partial_path(path)):
            with contextlib.suppress(OSError):  # one of the two is no file
                if output.samefile(name):
                    raise OutputRefused(f"writing it would destroy the input {name}", where=output)


def _abandon(encoder: BackgroundWriter, error: BaseException, emit: Emit) -> None:
    kept = encoder.abandon()
    if kept is None:
        return
    part = f"the finished part, {encoder.frames_written} frames, is kept as {kept}"
    if isinstance(error, AvatarctlError) and error.fix is None:
        error.fix = part
    else:
        emit(Notice(part, "warning"))


def _to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """[3, n, H, W] in [-1, 1] -> uint8 [n, H, W, 3], rounded to nearest."""
    frames = rearrange(pixels, "c n h w -> n h w c")
    return ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
