"""Wav2Vec2 features on the grid of pixel frames (spec/omniavatar.md b).

The convolution stack gives about 50 vectors per second; they are interpolated to exactly one per pixel frame
before the encoder sees them. With 640 samples per frame, F frames give 2F - 1 vectors and frame i falls
exactly on vector 2i, for every F: pieces of a recording share one grid.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Wav2Vec2Model

from avatarctl.timeline import SAMPLES_PER_FRAME

__all__ = ["FrameWav2Vec2", "normalise_waveform"]

_MINIMUM_SAMPLES = 400  # one output of the convolution stack


def normalise_waveform(waveform: Tensor, mean: float, variance: float) -> Tensor:
    """Zero mean and unit variance by the moments of the whole recording (population variance).

    1e-7 is wav2vec2's own guard; digital silence stays 0.
    """
    return (waveform - mean) / (variance + 1e-7) ** 0.5


class FrameWav2Vec2(Wav2Vec2Model):
    """`Wav2Vec2Model` with one feature vector per pixel frame."""

    @property
    def width(self) -> int:
        """Features per frame: the last layer, then the encoder's input and every layer."""
        return self.config.hidden_size * (self.config.num_hidden_layers + 2)

    @torch.no_grad()
    def features(self, waveform: Tensor, frames: int) -> Tensor:
        """Normalised sound [B, n] -> float32 [B, frames, width]: [h_last, h_0, h_1, ..., h_last].

        The encoder is bidirectional: an excerpt is not a slice of the whole (see models/encode.py).
        """
        if waveform.shape[-1] < frames * SAMPLES_PER_FRAME:
            raise ValueError(f"{frames} frames need {frames * SAMPLES_PER_FRAME} samples")
        if waveform.shape[-1] < _MINIMUM_SAMPLES:
            raise ValueError(f"{waveform.shape[-1]} samples are less than one feature window")

        def to_frame_grid(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return F.interpolate(output, size=frames, mode="linear", align_corners=True)

        # The interpolation belongs between two halves of the parent's forward; a hook is the only way in
        # that keeps every hidden state. It is removed at once, so calls of the plain model are untouched.
        handle = self.feature_extractor.register_forward_hook(to_frame_grid)
        try:
            out = self(waveform, output_hidden_states=True)
        finally:
            handle.remove()
        return torch.cat([out.last_hidden_state, *out.hidden_states], dim=-1).float()
