"""A mix whose parts are known: a voice of the cartoon world, chords of held tones, clicks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avatarctl.demo.voices import speech

Wave = NDArray[np.floating]


def voice(seed: int, frames: int) -> Wave:
    """16 kHz."""
    return speech(seed, frames).audio.astype(np.float64)


def music(length: int, rate: int, seconds: float = 4.0) -> Wave:
    """A chord of five tones and their overtones for `seconds` each, RMS 1."""
    time = np.arange(length) / rate
    chord = (time // seconds).astype(int) % 4
    root = np.array([220.0, 174.6, 261.6, 196.0])[chord]
    wave = sum(
        np.sin(2 * np.pi * root * ratio * over * time + ratio) / over
        for ratio in (1, 1.26, 1.498, 2, 2.52)
        for over in (1, 2, 3)
    )
    return wave / np.sqrt((wave**2).mean())


def clicks(length: int, rate: int) -> Wave:
    """Bursts of 10 ms, two a second, peak about 1."""
    wave = np.zeros(length)
    burst = np.random.default_rng(7).standard_normal(rate // 100) * np.exp(
        -np.arange(rate // 100) * 400 / rate
    )
    for first in range(rate // 3, length - len(burst), rate // 2):
        wave[first : first + len(burst)] += burst / 2
    return wave


def mixed(spoken: Wave, rate: int, seconds: float = 4.0) -> Wave:
    """Music 3 dB below the voice, and clicks as loud as it."""
    level = np.sqrt((spoken**2).mean())
    return (
        spoken
        + level * 10 ** (-3 / 20) * music(len(spoken), rate, seconds)
        + level * clicks(len(spoken), rate)
    )


def si_sdr(given: Wave, wanted: Wave) -> float:
    """Scale-invariant ratio of signal to distortion in dB (Le Roux et al., arXiv 1811.02508, equation 2)."""
    target = (given @ wanted) / (wanted @ wanted) * wanted
    return float(10 * np.log10((target @ target) / ((given - target) @ (given - target))))
