"""LPIPS and TREPA as losses of a clip (spec/losses-and-eval.md 2.1 and 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from avatarctl.models.videomae import VideoMae

__all__ = ["ImageJudge", "TrepaMode", "lpips_loss", "trepa_distance", "trepa_loss"]

TrepaMode = Literal["windows", "full"]

Remember = Callable[..., Tensor]
"""Calls a function of tensors, perhaps so that its activations are made again in the backward pass."""

_FRAMES_AT_ONCE: Final = 8


class ImageJudge(Protocol):
    """Two batches of images [N, 3, H, W] in [-1, 1] -> a distance for each pair, [N]."""

    def __call__(self, images: Tensor, others: Tensor, /) -> Tensor: ...


def lpips_loss(judge: ImageJudge, frames: Tensor, real: Tensor, remember: Remember | None = None) -> Tensor:
    """Mean distance over the frames, [B]: of the lower halves, rows H // 2 and below, at their own size.

    frames, real: [B, 3, n, H, W] in [-1, 1].
    """
    call = remember or _plainly
    lower = [
        rearrange(each[..., each.shape[-2] // 2 :, :], "b c n h w -> n b c h w") for each in (frames, real)
    ]
    parts = []
    for ours, theirs in zip(*(each.split(_FRAMES_AT_ONCE) for each in lower), strict=True):
        flat = [rearrange(each, "n b c h w -> (n b) c h w") for each in (ours, theirs)]
        parts.append(rearrange(call(judge, *flat), "(n b) -> n b", b=len(frames)))
    return torch.cat(parts).mean(0)


def trepa_loss(encoder: VideoMae, frames: Tensor, real: Tensor, mode: TrepaMode) -> Tensor:
    """Distance of the features of two clips, [B]; both [B, 3, n, H, W] in [-1, 1], n at least the encoder's.

    windows: mean over windows of the encoder's own length, one behind the other; frames that fill no window
    are not seen. full: the clip in one piece, as the public trainer has it, outside of what the encoder was
    trained for and at a cost that grows with the square of its length (spec/losses-and-eval.md 3.2).

    Raises ValueError for clips that are too short.
    """
    if frames.shape[2] < encoder.frames:
        raise ValueError(f"{frames.shape[2]} frames are fewer than the encoder's {encoder.frames}")
    if mode == "full":
        return trepa_distance(*_features(encoder, frames, real))
    whole = frames.shape[2] // encoder.frames * encoder.frames
    pairs = zip(*(each[:, :, :whole].split(encoder.frames, dim=2) for each in (frames, real)), strict=True)
    return torch.stack([trepa_distance(*_features(encoder, *pair)) for pair in pairs]).mean(0)


def trepa_distance(features: Tensor, of_real: Tensor) -> Tensor:
    """Mean squared difference of the unit vectors, [B]; both [B, width].

    With width 1408 it is at most 4 / 1408, which is why the weight is 10.
    """
    return (F.normalize(features, dim=1) - F.normalize(of_real, dim=1)).square().mean(1)


def _features(encoder: VideoMae, frames: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        of_real = encoder(real)
    return encoder(frames), of_real


def _plainly(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return function(*inputs)
