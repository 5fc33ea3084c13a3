"""Long video as overlapping windows that are fused in every step.

    for (window, step) in order: x = latents of the step before; latents = fuse(Euler(predict(x)))

Every window of a step reads the step before, so the order is free (sampling/window_order.py). Of each step
only the frames that somebody will still read are kept, noise is made again by frame and never kept, and
frames are decoded as soon as no window can change them: in wavefront order memory does not depend on the
length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from avatarctl.config import RunConfig
from avatarctl.family import FusedFamily, Inputs, Modules, Prepared, Span, VideoPlan
from avatarctl.sampling.denoise import Denoiser
from avatarctl.sampling.frame_block import FrameBlock
from avatarctl.sampling.window_order import pass_order

__all__ = ["sample_fused"]


@dataclass
class _Level:
    """Latents after one step: by absolute frame [B, C, h, w], in the dtype that they are kept in. Frame by
    frame, so that a frame that nobody reads any more is freed alone, and a long video is never copied."""

    dtype: torch.dtype
    first: int = 0
    frames: dict[int, Tensor] = field(default_factory=dict)

    def read(self, start: int, stop: int) -> Tensor:
        """Frames [start, stop) as float32 [B, C, stop - start, h, w]."""
        return torch.stack([self.frames[frame] for frame in range(start, stop)], dim=2).float()

    def written(self, span: Span, like: Tensor) -> Tensor:
        """What earlier windows wrote into a window's head, float32; no frames where nobody did."""
        stop = self.first + len(self.frames)
        return self.read(span.start, stop) if stop > span.start else like[:, :, :0]

    def write(self, span: Span, fused: Tensor) -> None:
        """All frames of a window; what stood in their places is replaced."""
        for frame, latents in enumerate(fused.unbind(2), span.start):
            self.frames[frame] = latents.to(self.dtype, copy=True)  # a view would keep the whole window

    def forget(self, frame: int) -> None:
        """Frees the frames before `frame`."""
        for each in range(self.first, frame):
            del self.frames[each]
        self.first = max(self.first, frame)


def sample_fused(
    denoise: Denoiser, modules: Modules, inputs: Inputs, plan: VideoPlan, cfg: RunConfig
) -> Iterator[FrameBlock]:
    """Blocks of finished frames in order, `plan.frames` in all."""
    family = cast(FusedFamily, denoise.family)
    spans = list(plan.spans())
    with torch.no_grad():
        state = family.open(modules, inputs, cfg)
        decoder = family.decoder(modules, state)
    levels = [_Level(getattr(torch, cfg.sampling.latents_dtype)) for _ in range(denoise.steps)]
    alive: dict[int, Prepared] = {}
    done = 0
    for window, step in pass_order(spans, denoise.steps, cfg.long_video.schedule):
        span = spans[window]
        # Frames from here on will still be read or written at this step.
        settled = spans[window + 1].start if window + 1 < len(spans) else span.start + span.frames
        with torch.no_grad():
            if step == 0:
                condition = family.build_condition(family.encode(modules, inputs, span, state, None))
                alive[window] = denoise.prepare(condition, state)
                key, first = family.noise_key(span, inputs)
                x = denoise.noise(cfg.runtime.seed, key, first, span.frames, plan.shape)
                x = x.to(modules.device)
                del condition
            else:
                x = levels[step - 1].read(span.start, span.start + span.frames)
                levels[step - 1].forget(settled)
            new = denoise.step(x, step, alive[window], span, state)
            levels[step].write(span, family.fuse(new, levels[step].written(span, new), span, step, state))
            del x, new
            if step + 1 < denoise.steps:
                continue
            del alive[window]
            finished = levels[step].read(levels[step].first, settled)
            levels[step].forget(settled)
            denoise.require_finite(finished, span)
            pixels = decoder.push(finished)[0, :, : plan.frames - done]
            del finished
        if pixels.shape[1] == 0:  # frames behind the end, of a window that reaches beyond it
            continue
        block = FrameBlock(window, done, pixels)
        done += pixels.shape[1]
        del pixels  # nothing here may hold the frames while the next windows are sampled
        yield block
        del block
