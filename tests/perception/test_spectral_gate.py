"""What the gate takes away, and what it leaves."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from avatarctl.perception.spectral_gate import gate
from tests.perception.mixes import mixed, si_sdr, voice


def pieces(whole: NDArray[np.floating], size: int) -> Iterator[NDArray[np.float32]]:
    wave = whole.astype(np.float32).reshape(len(whole), -1)
    return (wave[first : first + size] for first in range(0, len(wave), size))


def gated(wave: NDArray[np.floating], rate: int = 16_000, size: int = 32_768) -> NDArray[np.float32]:
    blocks = list(gate(pieces(wave, size), rate))
    return np.concatenate([np.zeros((0, wave.reshape(len(wave), -1).shape[1]), np.float32), *blocks])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("seconds", [2.0, 4.0, 60.0])
def test_speech_comes_out_of_chords_and_clicks(seed: int, seconds: float) -> None:
    spoken = voice(seed, 300)
    mix = mixed(spoken, 16_000, seconds)
    assert si_sdr(mix, spoken) < 3.5
    assert si_sdr(gated(mix)[:, 0], spoken) >= si_sdr(mix, spoken) + 4


@pytest.mark.parametrize("seed", range(3))
def test_speech_alone_stays(seed: int) -> None:
    spoken = voice(seed, 300)
    given = gated(spoken)[:, 0]
    assert si_sdr(given, spoken) > 20
    assert 0.9 < np.sqrt((given**2).mean() / (spoken**2).mean()) <= 1.0


def test_a_held_tone_loses_26_db() -> None:
    """The least gain is 0.05; what stands still gets just that."""
    time = np.arange(5 * 16_000) / 16_000
    tone = np.sin(2 * np.pi * 437 * time)
    inner = gated(tone)[8000:-8000, 0]
    assert np.abs(inner).max() == pytest.approx(0.05, rel=0.02)


def test_no_samples_no_blocks() -> None:
    assert list(gate(iter(()), 16_000)) == []


@pytest.mark.parametrize("length", [1, 255, 256, 1024, 2047, 2048, 2049, 40_000])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_as_long_as_the_mix_in_whatever_blocks(length: int, rate: int) -> None:
    mix = np.random.default_rng(0).uniform(-1, 1, (length, 2))
    whole = gated(mix, rate)
    assert whole.shape == mix.shape and np.isfinite(whole).all()
    np.testing.assert_allclose(gated(mix, rate, 1000), whole, atol=1e-6)


def test_digital_silence_stays_silent() -> None:
    with np.errstate(all="raise"):
        assert not gated(np.zeros(20_000)).any()


def test_both_sides_of_stereo_have_one_gain() -> None:
    """Wide music is found by the difference of the channels; who talks on one side only is not lost."""
    spoken = voice(0, 300)
    one_side = np.stack([spoken, np.zeros_like(spoken)], axis=1)
    given = gated(one_side)
    assert not given[:, 1].any() and si_sdr(given[:, 0], spoken) > 15
    wide = 0.5 * (mixed(spoken, 16_000) - spoken)
    mix = np.stack([spoken + wide, spoken - wide], axis=1)
    assert si_sdr(gated(mix)[:, 0], spoken) >= si_sdr(mix[:, 0], spoken) + 4


def test_memory_does_not_depend_on_the_length() -> None:
    def peak(blocks: int) -> int:
        block = np.random.default_rng(0).uniform(-1, 1, (8192, 2)).astype(np.float32)
        tracemalloc.start()
        try:
            for _ in gate((block for _ in range(blocks)), 16_000):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(24) < 1.02 * peak(6)
