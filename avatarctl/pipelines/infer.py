"""A checked job -> frames -> a video file that grows while it is made."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from avatarctl.errors import AvatarctlError, EnvironmentMissing, NotYetSupported, OutputRefused
from avatarctl.events import Emit, Notice, OutputFinished, Planned, SpanFinished, Stage, silent
from avatarctl.family import Inputs, Modules
from avatarctl.loading.modules import load_modules, resolve_device
from avatarctl.media import BackgroundWriter, Soundtrack, VideoWriter, Waveform, partial_path
from avatarctl.models.attention import choose_attention
from avatarctl.models.encode import image_tensor
from avatarctl.pipelines.job import Job, JobPlan
from avatarctl.registry import Row
from avatarctl.rng import latent_noise
from avatarctl.sampling.chunks import sample_chunks
from avatarctl.sampling.denoise import Denoiser, NoiseSource
from avatarctl.sampling.frame_block import FrameBlock
from avatarctl.sampling.fused import sample_fused
from avatarctl.timeline import FPS

__all__ = ["FrameBlock", "environment_problems", "generate", "load", "write_video"]


# The loop of each kind of plan, and what people call one of its spans.
_UNITS = {"chunks": "chunk", "fused": "window", "causal": "block"}
_LOOPS = {"chunks": sample_chunks, "fused": sample_fused}


def _never() -> bool:
    return False


def load(row: Row, plan: JobPlan, *, emit: Emit = silent) -> Modules:
    """The networks of a run on its device. Raises WeightsMissing, ExtraMissing, EnvironmentMissing."""
    emit(Stage("loading the model"))
    return load_modules(row, plan.cfg, resolve_device(plan.cfg.runtime.device), emit)


def environment_problems(row: Row, plan: JobPlan) -> tuple[str, ...]:
    """What this machine lacks for a run, one line each: device, attention kernel. Loads no weight."""
    runtime = plan.cfg.runtime
    try:
        device = resolve_device(runtime.device)
        dtype = getattr(torch, runtime.dtype or "float32")
        choose_attention(runtime.attention, device, dtype, row.network["dit"]["attention_head_dim"])
    except EnvironmentMissing as missing:
        return (str(missing),)
    return ()


def generate(
    row: Row,
    job: Job,
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
    cfg, family = plan.cfg, plan.family
    if plan.plan.kind not in _LOOPS:
        raise NotYetSupported(f"sampling by {plan.plan.kind} has no code yet", where="long_video.strategy")
    assert cfg.sampling.steps is not None and cfg.sampling.shift is not None
    assert cfg.output.width is not None and cfg.output.height is not None
    modules = modules or load(row, plan, emit=emit)
    device = next(modules.dit.parameters()).device
    denoise = Denoiser(
        family=family,
        dit=modules.dit,
        guidance=family.guidance(cfg),
        sigmas=family.sigmas(cfg.sampling.steps, cfg.sampling.shift),
        noise=noise,
        unit=_UNITS[plan.plan.kind],
        emit=emit,
        should_stop=should_stop,
    )
    emit(
        Planned(
            spans=plan.plan.count,
            unit=_UNITS[plan.plan.kind],
            steps=cfg.sampling.steps,
            frames=plan.plan.frames,
            fps=FPS,
            width=cfg.output.width,
            height=cfg.output.height,
        )
    )
    with Waveform(job.audio, lead_samples=plan.lead_samples) as waveform:
        inputs = Inputs(
            image=image_tensor(job.image.pixels, (cfg.output.height, cfg.output.width), cfg.input.fit).to(
                device
            ),
            waveform=waveform,
            samples=plan.samples,
            mean=plan.mean,
            variance=plan.variance,
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            job=job.key,
            emit=emit,
        )
        emit(Stage("sampling"))
        yield from _LOOPS[plan.plan.kind](denoise, modules, inputs, plan.plan, cfg)


def write_video(
    row: Row,
    job: Job,
    plan: JobPlan,
    path: Path,
    *,
    emit: Emit = silent,
    should_stop: Callable[[], bool] = _never,
) -> OutputFinished:
    """Make the video of a job at `path`, by way of `NAME.partial.mp4`.

    A run that ends early with finished chunks leaves the playable part and names it in the error; without
    any it leaves nothing. Raises what `generate` raises, OutputRefused (also where the output is an
    input) and WriteFailed.
    """
    output = plan.cfg.output
    assert output.width is not None and output.height is not None
    started = time.monotonic()
    _refuse_inputs(job, path)
    writer = VideoWriter(
        path,
        width=output.width,
        height=output.height,
        fps=FPS,
        soundtrack=Soundtrack(job.audio, plan.audio_delay),
        crf=output.crf,
        overwrite=output.overwrite,
    )
    encoder = BackgroundWriter(writer)

    def stop_asked() -> bool:
        encoder.check()
        return should_stop()

    try:
        for notice in writer.notices:
            emit(Notice(notice, "warning"))
        modules = load(row, plan, emit=emit)
        loaded = first_frame = time.monotonic()
        frames = 0
        for block in generate(row, job, plan, modules=modules, emit=emit, should_stop=stop_asked):
            encoder.write(_to_bytes(block.pixels))
            if frames == 0:
                first_frame = time.monotonic()
            frames += block.pixels.shape[1]
            emit(SpanFinished(block.span, frames))
            del block  # its pixels need not live while the next chunk is sampled
        encoder.finish()
    except BaseException as error:
        _abandon(encoder, error, emit)
        raise
    finished = OutputFinished(
        path=str(path.absolute()),
        frames=frames,
        seconds_to_first_frame=first_frame - started,
        frames_per_second=frames / (time.monotonic() - loaded),
    )
    emit(finished)
    return finished


def _refuse_inputs(job: Job, path: Path) -> None:
    """An output, growing or finished, must not be a file that the job reads."""
    for name in (job.image.name, job.audio.name):
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
