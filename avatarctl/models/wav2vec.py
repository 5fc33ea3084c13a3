"""Wav2Vec2 features on the grid of pixel frames (spec/omniavatar.md b).

The convolution stack gives about 50 vectors per second; they are interpolated to exactly one per pixel frame
before the encoder sees them. With 640 samples per frame, F frames give 2F - 1 vectors and frame i falls
exactly on vector 2i, for every F: pieces of a recording share one grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Wav2Vec2Model

from avatarctl.timeline import SAMPLES_PER_FRAME

__all__ = ["FrameWav2Vec2", "RecordingMoments", "normalise_waveform"]

_MINIMUM_SAMPLES = 400  # one output of the convolution stack


def normalise_waveform(waveform: Tensor, mean: float, variance: float) -> Tensor:
    """Zero mean and unit variance by the moments of the whole recording (population variance).

    1e-7 is wav2vec2's own guard; digital silence stays 0.
    """
    return (waveform - mean) / (variance + 1e-7) ** 0.5


@dataclass(frozen=True)
class RecordingMoments:
    """Mean and population variance, each float32 [C], of the first convolution over a whole recording."""

    mean: Tensor
    variance: Tensor


class FrameWav2Vec2(Wav2Vec2Model):
    """`Wav2Vec2Model` with one feature vector per pixel frame."""

    @property
    def width(self) -> int:
        """Features per frame: the last layer, then the encoder's input and every layer."""
        return self.config.hidden_size * (self.config.num_hidden_layers + 2)

    @property
    def token_width(self) -> int:
        """Features per token of `tokens`."""
        return int(self.config.hidden_size)

    def forward(self, *inputs: Any, **more: Any) -> Any:
        """In its own precision, whatever autocast is around it, on the device of its input: where its
        parameters are says nothing."""
        waveform = next(each for each in (*inputs, *more.values()) if isinstance(each, Tensor))
        with torch.autocast(waveform.device.type, enabled=False):
            return super().forward(*inputs, **more)

    @torch.no_grad()
    def tokens(self, waveform: Tensor) -> Tensor:
        """Normalised audio [B, n] -> float32 [B, L, token_width]: the last hidden state on the encoder's own
        grid, floor((n - 400) / 320) + 1 tokens."""
        if waveform.shape[-1] < _MINIMUM_SAMPLES:
            raise ValueError(f"{waveform.shape[-1]} samples are less than one feature window")
        return self(waveform).last_hidden_state.float()

    @torch.no_grad()
    def features(self, waveform: Tensor, frames: int, moments: RecordingMoments | None = None) -> Tensor:
        """Normalised audio [B, n] -> float32 [B, frames, width]: [h_last, h_0, h_1, ..., h_last].

        The encoder is bidirectional: an excerpt is not a slice of the whole. `moments` of the whole
        recording bring an excerpt close to it (see models/encode.py).
        """
        if waveform.shape[-1] < frames * SAMPLES_PER_FRAME:
            raise ValueError(f"{frames} frames need {frames * SAMPLES_PER_FRAME} samples")
        if waveform.shape[-1] < _MINIMUM_SAMPLES:
            raise ValueError(f"{waveform.shape[-1]} samples are less than one feature window")

        def to_frame_grid(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return F.interpolate(output, size=frames, mode="linear", align_corners=True)

        def normalise(norm: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            assert isinstance(norm, nn.GroupNorm) and moments is not None
            return F.batch_norm(
                inputs[0], moments.mean, moments.variance, norm.weight, norm.bias, eps=norm.eps
            )

        with _hooked(self.feature_extractor, to_frame_grid):
            if moments is None:
                out = self(waveform, output_hidden_states=True)
            else:
                with _hooked(self.feature_extractor.conv_layers[0].layer_norm, normalise):
                    out = self(waveform, output_hidden_states=True)
        return torch.cat([out.last_hidden_state, *out.hidden_states], dim=-1).float()

    @torch.no_grad()
    def recording_moments(
        self, read: Callable[[int, int], Tensor], samples: int, block: int
    ) -> RecordingMoments | None:
        """Moments over a recording of `samples`, read as [1, n] in blocks of about `block` samples.

        The published encoder normalises its first convolution over time per channel (group norm with one
        group per channel): over a window instead of the recording, that one layer changes every feature by
        percents. None for encoders that normalise per time step.
        """
        first_layer = self.feature_extractor.conv_layers[0]
        if not isinstance(getattr(first_layer, "layer_norm", None), nn.GroupNorm):
            return None
        conv = first_layer.conv
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        outputs = (samples - kernel) // stride + 1

        def sums(first: int) -> Tensor:
            last = min(first + block // stride, outputs)
            waveform = read(first * stride, (last - 1) * stride + kernel)
            with torch.autocast(waveform.device.type, enabled=False):
                values = conv(waveform.unsqueeze(1))[0]
            return torch.stack([each.sum(1, dtype=torch.float64) for each in (values, values.square())])

        mean, square = reduce(torch.add, map(sums, range(0, outputs, block // stride))) / outputs
        return RecordingMoments(mean.float(), (square - mean**2).clamp(min=0).float())


@contextmanager
def _hooked(module: nn.Module, hook: Callable[[nn.Module, Any, Tensor], Tensor]) -> Iterator[None]:
    """A forward hook for one call: the way into the middle of the parent's forward that keeps every
    hidden state. It is removed at once, so calls of the plain model are untouched. It comes before other
    hooks: weights that came for this call alone leave behind it."""
    handle = module.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()
