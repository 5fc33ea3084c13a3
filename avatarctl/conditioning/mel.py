"""Audio -> the mel spectrogram that StableSyncNet was trained on (spec/losses-and-eval.md 1.4 and 1.6)."""

from __future__ import annotations

import functools
import math
from typing import Final

import torch
from torch import Tensor

from avatarctl.timeline import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME

__all__ = ["MEL_BANDS", "frame_mel", "mel_columns", "mel_filters", "mel_spectrogram", "pre_emphasis"]

MEL_BANDS: Final = 80
_WINDOW: Final = 800
"""Samples of a Fourier window; the Hann window has the same length."""
_HOP: Final = 200
_LOWEST, _HIGHEST = 55.0, 7600.0
"""Hertz."""
_PRE_EMPHASIS: Final = 0.97
_FLOOR_DB, _REFERENCE_DB, _LIMIT = -100.0, 20.0, 4.0

# Slaney's mel scale: linear below 1 kHz, then 27 steps for every factor of 6.4.
_HERTZ_PER_MEL: Final = 200.0 / 3
_KNEE_HERTZ: Final = 1000.0
_KNEE: Final = _KNEE_HERTZ / _HERTZ_PER_MEL
_LOG_STEP: Final = math.log(6.4) / 27


def mel_columns(frames: int) -> int:
    """Columns of the spectrogram that belong to `frames` video frames: ceil(16 / 5 frames), 52 for 16."""
    return -(-frames * SAMPLE_RATE // (FPS * _HOP))


def mel_spectrogram(waveform: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Audio at 16 kHz [..., n] -> [..., 80, 1 + n // 200] of `dtype`, in -4 to 4; digital silence is -4.

    Before the Fourier windows 400 zeros stand on both sides. The default agrees with the published front end
    to 3e-7, float32 to 2e-5.
    """
    emphasised = pre_emphasis(waveform).to(dtype)
    window = torch.hann_window(_WINDOW, periodic=True, dtype=dtype, device=waveform.device)
    padded = torch.nn.functional.pad(emphasised, (_WINDOW // 2, _WINDOW // 2))
    spectrum = torch.fft.rfft(padded.unfold(-1, _WINDOW, _HOP) * window, dim=-1).abs()  # [..., columns, 401]
    bands = mel_filters().to(spectrum) @ spectrum.transpose(-1, -2)
    decibels = 20 * torch.log10(bands.clamp(min=10 ** (_FLOOR_DB / 20))) - _REFERENCE_DB
    return (2 * _LIMIT * (decibels - _FLOOR_DB) / -_FLOOR_DB - _LIMIT).clamp(-_LIMIT, _LIMIT)


def frame_mel(waveform: Tensor, frames: int) -> Tensor:
    """Audio [..., n] -> float32 [..., 1, 80, ceil(16 / 5 frames)]: the spectrogram of this piece alone.

    A piece of `frames` whole frames fills it. What a shorter one leaves is 0, the middle of the scale and not
    silence, as in the published trainer (spec/losses-and-eval.md 1.5).
    """
    if waveform.shape[-1] > frames * SAMPLES_PER_FRAME:
        raise ValueError(f"{waveform.shape[-1]} samples are more than {frames} frames")
    mel, columns = mel_spectrogram(waveform), mel_columns(frames)
    lacking = max(columns - mel.shape[-1], 0)
    return torch.nn.functional.pad(mel[..., :columns], (0, lacking)).unsqueeze(-3).float()


def pre_emphasis(waveform: Tensor) -> Tensor:
    """y[n] = x[n] - 0.97 x[n - 1], nothing before the first sample: float64 [..., n]."""
    samples = waveform.double()
    return samples - _PRE_EMPHASIS * torch.nn.functional.pad(samples[..., :-1], (1, 0))


@functools.cache
def mel_filters() -> Tensor:
    """Triangles over the bins of a window, float64 [80, 401], each with the area 1 (Slaney)."""
    bins = torch.linspace(0, SAMPLE_RATE / 2, _WINDOW // 2 + 1, dtype=torch.float64)
    edges = _hertz(torch.linspace(_mel(_LOWEST), _mel(_HIGHEST), MEL_BANDS + 2, dtype=torch.float64))
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)


def _mel(hertz: float) -> float:
    if hertz < _KNEE_HERTZ:
        return hertz / _HERTZ_PER_MEL
    return _KNEE + math.log(hertz / _KNEE_HERTZ) / _LOG_STEP


def _hertz(mel: Tensor) -> Tensor:
    logarithmic = _KNEE_HERTZ * torch.exp(_LOG_STEP * (mel - _KNEE))
    return torch.where(mel < _KNEE, mel * _HERTZ_PER_MEL, logarithmic)
