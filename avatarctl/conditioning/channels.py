"""Input channels of the transformers: 16 of noisy latents, then what a model is conditioned on.

The family that uses a layout names its specification.

layouts 33, 49, 65                                   layout 36, of image-to-video models
16-31  reference latent, repeated   33, 49, 65       16-19  mask: 1 = given, 0 = generate
32     mask: 0 = given, 1 = generate                 20-35  latents of the masked video
33-48  latents of the masked video      49, 65
49-64  latents of the reference sequence    65
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from einops import repeat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "MASK4_KEEP",
    "MASK_GENERATE",
    "MASK_KEEP",
    "condition_channels",
    "first_frame_channels",
    "given_frames",
    "mask_channel",
]

MASK_KEEP, MASK_GENERATE = 0, 1
MASK4_KEEP = 1
"""Of layout 36, the opposite of the others."""

_MASK4_CHANNELS = 4  # one per pixel frame of a latent frame


def given_frames(counts: Sequence[int], frames: int, device: torch.device) -> Tensor:
    """bool [B, 1, frames, 1, 1]: true on the first `counts[b]` latent frames of sample b, which are given."""
    import torch

    places = torch.arange(frames, device=device)
    first = torch.tensor(counts, device=device)
    return (places < first[:, None])[:, None, :, None, None]


def mask_channel(given: Tensor, keep: Tensor) -> Tensor:
    """[B, 1, T, h, w] in the dtype of `keep`: 0 on given latent frames and where pixels are kept, else 1.

    given: of `given_frames`. keep: [B or 1, 1, h, w] of `masking.keep_map` at latent size; zeros where a
    model makes whole frames. A kept pixel does not give the latent: only `given` says what is frozen.
    """
    import torch

    made = torch.where(keep > 0, MASK_KEEP, MASK_GENERATE).to(keep.dtype).unsqueeze(2)
    return torch.where(given, torch.full_like(made, MASK_KEEP), made)


def condition_channels(
    reference: Tensor,
    mask: Tensor,
    masked_video: Tensor | None = None,
    reference_sequence: Tensor | None = None,
) -> Tensor:
    """Channels 16 and up of layouts 33, 49 and 65: [B, 17 | 33 | 49, T, h, w].

    reference: [B, 16, 1, h, w], repeated over time; mask: [B, 1, T, h, w]; the others [B, 16, T, h, w].
    """
    import torch

    if reference_sequence is not None and masked_video is None:
        raise ValueError("a reference sequence needs a masked video in front of it")
    repeated = repeat(reference, "b c 1 h w -> b c t h w", t=mask.shape[2])
    parts = [repeated, mask, masked_video, reference_sequence]
    return torch.cat([part for part in parts if part is not None], dim=1)


def first_frame_channels(masked_video: Tensor) -> Tensor:
    """Channels 16 and up of layout 36, [B, 20, T, h, w], for a video of which the first frame is given.

    masked_video: [B, 16, T, h, w], latents of a video that holds nothing behind that frame.
    """
    import torch

    batch, _, frames, height, width = masked_video.shape
    mask = masked_video.new_full((batch, _MASK4_CHANNELS, frames, height, width), 1 - MASK4_KEEP)
    mask[:, :, 0] = MASK4_KEEP
    return torch.cat([mask, masked_video], dim=1)
