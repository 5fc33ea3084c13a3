"""The decoder of the VAE with a gradient, for losses on frames.

Sources: spec/omniavatar.md g.5, spec/losses-and-eval.md 4.2.

`models/vae.py` decodes for people, without a gradient. Here the frames are those of the whole clip, bit for
bit, and only a window of them is part of the graph.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from avatarctl.models.vae import WanVae
from avatarctl.timeline import latent_frames, pixel_frames

__all__ = ["VaeGradient", "decode_with_gradient"]

VaeGradient = Literal["full", "checkpoint"]

Caches = list[Any]
"""What every causal convolution kept of the latent frame before: a tensor, a word, or None."""


def decode_with_gradient(
    vae: WanVae, latents: Tensor, start: int, frames: int, mode: VaeGradient = "checkpoint"
) -> Tensor:
    """Pixel frames start .. start + frames - 1 of a clip, float32 [B, 3, frames, 8h, 8w] in [-1, 1].

    latents: the whole clip from its first frame on, normalised, [B, C, T, h, w].
    mode: full keeps all activations; checkpoint keeps what passes between latent frames, and makes the others
    again in the backward pass, with the same numbers.

    The latent frames before the window are decoded without a gradient: the window's frames are right, and
    its gradient ends at the first latent frame that belongs to it. Pixels outside [-1, 1] have none either.
    Raises ValueError for a window that is not inside the clip.
    """
    whole = pixel_frames(latents.shape[2])
    if not 0 <= start < start + frames <= whole:
        raise ValueError(f"{frames} frames from {start} are not inside a clip of {whole}")
    # Pixel frame f belongs to latent frame ceil(f / 4).
    first, last = latent_frames(start), latent_frames(start + frames - 1)
    caches: Caches = [None] * vae.vae._cached_conv_counts["decoder"]
    with torch.no_grad():
        for index in range(first):
            _, caches = _one_frame(vae, latents[:, :, index : index + 1], caches, index == 0)
    parts = []
    for index in range(first, last + 1):
        inputs = (vae, latents[:, :, index : index + 1], caches, index == 0)
        if mode == "checkpoint" and torch.is_grad_enabled():
            part, caches = checkpoint(_one_frame, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            part, caches = _one_frame(*inputs)
        parts.append(part)
    before = start - (pixel_frames(first) if first else 0)
    decoded = torch.cat(parts, dim=2)[:, :, before : before + frames]
    return decoded.clamp(-1, 1)  # not in place: the gradient needs what was there


def _one_frame(vae: WanVae, latents: Tensor, caches: Caches, is_first: bool) -> tuple[Tensor, Caches]:
    """One latent frame and what the next one needs. The caches that were given are left as they are: a
    second pass over the frame reads them again."""
    kept = list(caches)
    mean, std = vae._statistics(latents)
    hidden = vae.vae.post_quant_conv((latents * std + mean).to(vae._dtype))
    decoded = vae.vae.decoder(hidden, feat_cache=kept, feat_idx=[0], first_chunk=is_first)
    return decoded.to(torch.promote_types(decoded.dtype, torch.float32)), kept
