"""Long video in chunks: each starts from the tail of the one before.

    for span: condition(carry); prepare; for step: clamp, predict, combine, Euler; decode; carry = advance

Only one chunk is alive at a time, so memory does not grow with the length of the video.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from avatarctl.config import RunConfig
from avatarctl.family import Carry, Inputs, Modules, VideoPlan
from avatarctl.sampling.denoise import Denoiser
from avatarctl.sampling.frame_block import FrameBlock

__all__ = ["sample_chunks"]


def sample_chunks(
    denoise: Denoiser, modules: Modules, inputs: Inputs, plan: VideoPlan, cfg: RunConfig
) -> Iterator[FrameBlock]:
    """Blocks of finished frames in order, `plan.frames` in all."""
    family = denoise.family
    with torch.no_grad():
        state = family.open(modules, inputs, cfg)
    carry: Carry = None
    done = 0
    for span in plan.spans():
        with torch.no_grad():
            condition = family.build_condition(family.encode(modules, inputs, span, state, carry))
            carry = None
            key, first = family.noise_key(span, inputs)
            noise = denoise.noise(cfg.runtime.seed, key, first, span.frames, plan.shape).to(modules.device)
            latents = denoise(noise, condition, span, state)
            del condition, noise
            pixels = family.decoder(modules, state).push(latents)
            carry = family.advance(modules, state, span, latents, pixels)
        block = FrameBlock(span.index, done, pixels[0, :, span.keep_from :][:, : plan.frames - done])
        done += block.pixels.shape[1]
        # Nothing here may hold the frames while the next chunk is sampled.
        del pixels, latents
        yield block
        del block
