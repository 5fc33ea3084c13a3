"""How far the mouths of a clip are from its audio, as a loss (spec/losses-and-eval.md 1.3, 1.5, 1.6 and 1.7).

The frames must be aligned faces: the judge was trained on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from avatarctl.conditioning.mel import frame_mel
from avatarctl.models.stable_syncnet import StableSyncNet
from avatarctl.timeline import SAMPLES_PER_FRAME

__all__ = ["SUPERVISED_FRAMES", "SYNC_HINTS", "SyncMode", "sync_cosines", "sync_loss", "sync_starts"]

SyncMode = Literal["prob", "logits"]

SUPERVISED_FRAMES: Final = 80
"""Frames of a clip that are judged at most, its first (spec/losses-and-eval.md 1.5)."""

SYNC_HINTS: Final[dict[SyncMode, str]] = {
    "prob": "0.693 is a cosine of 0.5, which is chance; 0 is the best",
    "logits": "0.474 is a cosine of 0.5, which is chance; 0.313 is the best",
}
"""What the numbers of a mode mean, beside the mean cosine (spec/losses-and-eval.md 1.5)."""

_COSINE_GUARD: Final = 1e-8


def sync_starts(frames: int, window: int, stride: int) -> range:
    """First frames of the windows of a clip: whole ones only, among its first `SUPERVISED_FRAMES`."""
    return range(0, min(frames, SUPERVISED_FRAMES) - window + 1, stride)


def sync_cosines(
    judge: StableSyncNet,
    frames: Tensor,
    waveform: Tensor,
    stride: int,
    remember: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Cosine of every sample and window, float32 [B, windows], in 0 to 1.

    frames: aligned faces [B, 3, n, H, W] in [-1, 1]; waveform: [B, 640 n] at 16 kHz, of exactly these frames.
    Each window sees the samples of its own frames alone, counted in integers.
    remember: how the judge is called, for one that computes activations again in the backward pass.

    Raises ValueError where the audio is of other frames, or no window is whole.
    """
    count = frames.shape[2]
    if waveform.shape != (len(frames), count * SAMPLES_PER_FRAME):
        raise ValueError(f"audio of shape {list(waveform.shape)} does not belong to {count} frames")
    starts = sync_starts(count, judge.frames, stride)
    if not starts:
        raise ValueError(f"{count} frames hold no window of {judge.frames}")

    def cosine(part: Tensor, mel: Tensor) -> Tensor:
        of_frames, of_audio = judge(judge.lower_faces(part), mel)
        return F.cosine_similarity(of_frames, of_audio, dim=1, eps=_COSINE_GUARD)

    call = remember or (lambda function, *inputs: function(*inputs))
    cosines = []
    for start in starts:
        stop = start + judge.frames
        samples = waveform[:, start * SAMPLES_PER_FRAME : stop * SAMPLES_PER_FRAME]
        mel = frame_mel(samples, judge.frames).to(frames)
        cosines.append(call(cosine, frames[:, :, start:stop], mel))
    return torch.stack(cosines, dim=1)


def sync_loss(cosines: Tensor, mode: SyncMode) -> Tensor:
    """Binary cross-entropy of "they fit", for each cosine.

    prob takes the cosine as the probability, as the judge was trained: -ln c, at most 100. logits takes it as
    a logit, as the public trainer does: ln(1 + e^-c), never below 0.3133.
    """
    fits = torch.ones_like(cosines)
    if mode == "prob":
        # Rounding may carry a cosine past 1.
        return F.binary_cross_entropy(cosines.clamp(0, 1), fits, reduction="none")
    return F.binary_cross_entropy_with_logits(cosines, fits, reduction="none")
