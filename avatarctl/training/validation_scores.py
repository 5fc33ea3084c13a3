"""What a validation says of a made clip: whether lips follow the audio, and how far it is from the truth.

Sources: spec/losses-and-eval.md 1.3, 1.4, 2.1, 6.1 and 6.2. The judge is StableSyncNet, so the numbers are
cosines in 0 to 1 and no Sync-C; the search over offsets is that of 6.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from avatarctl.conditioning.masking import keep_map
from avatarctl.conditioning.mel import frame_mel
from avatarctl.models.stable_syncnet import StableSyncNet
from avatarctl.timeline import SAMPLES_PER_FRAME
from avatarctl.training.frame_losses import ImageJudge, lpips_loss
from avatarctl.training.sync_loss import sync_starts

__all__ = ["FARTHEST", "as_tensor", "best_offset", "mouth_box", "mouth_lpips", "psnr", "sync_curve"]

FARTHEST: Final = 15
"""Frames by which audio is shifted either way (spec/losses-and-eval.md 6.1)."""

_AT_ONCE: Final = 16
"""Windows that the judge sees together."""
_SMALLEST_BOX: Final = 32
"""Pixels: LPIPS halves an image four times and wants something left."""
_MOST_PSNR: Final = 100.0

Array = np.ndarray


def as_tensor(frames: Tensor) -> Tensor:
    """uint8 [n, H, W, 3] -> float32 [1, 3, n, H, W] in [-1, 1]."""
    return frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@torch.no_grad()
def sync_curve(
    judge: StableSyncNet, frames: Tensor, audio: Callable[[int, int], Tensor], stride: int
) -> Tensor:
    """Mean cosine of a clip's windows with the audio that comes k frames later, float32 [31] for k from -15
    to 15: in time the largest stands in the middle.

    frames: aligned faces [1, 3, n, H, W] in [-1, 1]; audio: samples [start, stop) at 16 kHz of the recording
    whose sample 0 belongs to the first frame, zeros outside of it.

    Raises ValueError where no window is whole.
    """
    window = judge.frames
    starts = list(sync_starts(frames.shape[2], window, stride))
    if not starts:
        raise ValueError(f"{frames.shape[2]} frames hold no window of {window}")
    lower = judge.lower_faces(frames)
    faces = torch.cat([lower[:, :, start : start + window] for start in starts])
    wanted = sorted({start + k for start in starts for k in range(-FARTHEST, FARTHEST + 1)})
    pieces = [audio(first * SAMPLES_PER_FRAME, (first + window) * SAMPLES_PER_FRAME) for first in wanted]
    mels = frame_mel(torch.stack(pieces), window).to(frames)
    of_frames = torch.cat([judge.embed_faces(part) for part in faces.split(_AT_ONCE)])
    of_audio = torch.cat([judge.embed_audio(part) for part in mels.split(_AT_ONCE)])
    places = {first: place for place, first in enumerate(wanted)}
    return torch.stack([
        torch.stack([of_frames[i] @ of_audio[places[start + k]] for i, start in enumerate(starts)]).mean()
        for k in range(-FARTHEST, FARTHEST + 1)
    ]).float().cpu()  # fmt: skip


def best_offset(curve: Tensor) -> int:
    """Frames by which audio leads the lips at the best place of a curve; audio that lags by 3 gives -3
    (spec/losses-and-eval.md 6.1)."""
    return FARTHEST - int(curve.argmax())


def psnr(made: Array, truth: Array) -> float:
    """Mean over frames of the peak signal-to-noise ratio in dB, at most 100; both uint8 [n, H, W, 3]."""
    squared = (made.astype(np.float64) - truth.astype(np.float64)) ** 2
    error = np.maximum(squared.mean((1, 2, 3)), 255**2 / 10 ** (_MOST_PSNR / 10))
    return float((10 * np.log10(255**2 / error)).mean())


def mouth_box(mask: Tensor, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns around the hole of a mask, float [1, 1, h, w], in frames of `size`; at least 32 pixels
    either way where the frame has them."""
    hole = keep_map(mask, size)[0, 0] == 0
    return _side(hole.any(1)), _side(hole.any(0))


@torch.no_grad()
def mouth_lpips(judge: ImageJudge, made: Tensor, truth: Tensor, box: tuple[slice, slice] | None) -> Tensor:
    """Mean LPIPS over frames inside the box of a mask, a scalar; of the lower halves where there is none.
    Both [1, 3, n, H, W] in [-1, 1]."""
    if box is None:
        return lpips_loss(judge, made, truth)
    rows, columns = box
    ours, theirs = (rearrange(each[..., rows, columns], "1 c n h w -> n c h w") for each in (made, truth))
    pairs = zip(ours.split(_AT_ONCE), theirs.split(_AT_ONCE), strict=True)
    return torch.cat([judge(*pair) for pair in pairs]).mean()


def _side(hit: Tensor) -> slice:
    places = hit.nonzero().flatten().tolist()
    first, last = places[0], places[-1] + 1
    lacking = min(_SMALLEST_BOX, len(hit)) - (last - first)
    if lacking > 0:
        first = max(0, min(first - lacking // 2, len(hit) - (last - first) - lacking))
        last = first + min(_SMALLEST_BOX, len(hit))
    return slice(first, last)
