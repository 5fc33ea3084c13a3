"""Levels that separation goes by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avatarctl.data.mixes import Mix
from avatarctl.data.separate import Separation
from avatarctl.media.audio_readers import Audio, Samples
from avatarctl.perception.separation import SpectralGate


class Told(SpectralGate):
    """Gives the mix back, and keeps what it was told."""

    peak = 0.0

    def speech(self, audio: Audio, peak: float) -> Iterator[Samples]:
        self.peak = peak
        return self.mix(audio)


@pytest.mark.parametrize(("channels", "expected"), [(1, 0.9), (2, 0.9), (6, 0.15)])
def test_the_peak_is_that_of_what_is_separated(channels: int, expected: float, tmp_path: Path) -> None:
    """With six channels that is their mean: speech in one of them alone is a sixth as loud in it, and a
    network is to get it at 0.9."""
    wave = np.zeros((8000, channels))
    wave[100:7000, channels // 2] = 0.9 * np.sin(np.arange(6900) / 3)
    soundfile.write(tmp_path / "mix.wav", wave, 16_000, "FLOAT")
    told = Told()
    mix = Mix("mix", tmp_path / "mix.wav", tmp_path / "vocal.wav")
    (done,) = Separation(told, lambda event: None, lambda: False).run([mix])
    assert done.state == "done" and told.peak == pytest.approx(expected, rel=1e-3)
