"""Input channels of the OmniAvatar layouts (spec/omniavatar.md g.3).

0-15   noisy latents                       33, 49, 65 channels
16-31  reference latent, repeated          33, 49, 65
32     mask: 0 = given, 1 = generate       33, 49, 65
33-48  latents of the masked video             49, 65
49-64  latents of the reference sequence           65
"""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor

__all__ = ["LAYOUTS", "MASK_GENERATE", "MASK_KEEP", "condition_channels", "prefix_mask"]

LAYOUTS = (33, 49, 65)
MASK_KEEP, MASK_GENERATE = 0, 1


def prefix_mask(reference: Tensor, frames: int, fixed: int) -> Tensor:
    """[B, 1, frames, h, w] in the dtype of `reference`: 0 on the first `fixed` latent frames, else 1."""
    batch, _, _, height, width = reference.shape
    mask = reference.new_full((batch, 1, frames, height, width), MASK_GENERATE)
    mask[:, :, :fixed] = MASK_KEEP
    return mask


def condition_channels(
    reference: Tensor,
    mask: Tensor,
    masked_video: Tensor | None = None,
    reference_sequence: Tensor | None = None,
) -> Tensor:
    """Channels 16 and up: [B, 17 | 33 | 49, T, h, w].

    reference: [B, 16, 1, h, w], repeated over time; mask: [B, 1, T, h, w]; the others [B, 16, T, h, w].
    """
    if reference_sequence is not None and masked_video is None:
        raise ValueError("a reference sequence needs a masked video in front of it")
    repeated = repeat(reference, "b c 1 h w -> b c t h w", t=mask.shape[2])
    parts = [repeated, mask, masked_video, reference_sequence]
    return torch.cat([part for part in parts if part is not None], dim=1)
