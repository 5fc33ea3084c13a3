"""How loud audio is, frame by frame: all that is known of a recording's mouth without looking at it."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from avatarctl.media import Audio, Waveform
from avatarctl.timeline import FPS, SAMPLES_PER_FRAME

__all__ = ["loudness"]

_RANGE: Final = 40.0  # dB below the loudest frame that count as silence
_SILENT: Final = -70.0  # dB below full scale, whatever the loudest is
_SMOOTH: Final = 5  # frames
_BLOCK: Final = 60 * FPS  # frames that are read at a time


def loudness(audio: Audio, frames: int) -> NDArray[np.float64]:
    """[frames], from 0 for silence to 1 for the loudest: dB over -40 of the loudest frame, the mean of five
    frames (spec/cartoon-world.md 6)."""
    level = []
    with Waveform(audio) as waveform:
        for start in range(0, frames, _BLOCK):
            stop = min(start + _BLOCK, frames)
            level.append(_levels(waveform.read(start * SAMPLES_PER_FRAME, stop * SAMPLES_PER_FRAME)))
    return _smoothed(np.concatenate(level)) / _RANGE


def _levels(samples: NDArray[np.floating]) -> NDArray[np.float64]:
    power = np.square(samples.reshape(-1, SAMPLES_PER_FRAME), dtype=np.float64).mean(1)
    return 10 * np.log10(power + 1e-12)


def _smoothed(level: NDArray[np.float64]) -> NDArray[np.float64]:
    """dB over the least that counts, of each frame and those around it that are there."""
    above = np.where(level < _SILENT, 0, np.maximum(level - level.max() + _RANGE, 0))
    half = _SMOOTH // 2
    total, there = (np.convolve(each, np.ones(_SMOOTH)) for each in (above, np.ones(len(above))))
    return (total / there)[half : half + len(above)]
