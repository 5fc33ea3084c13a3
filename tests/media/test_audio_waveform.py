"""16 kHz mono by position, and the user's own audio for the output."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import soxr

from avatarctl.media import Audio, Soundtrack, Waveform, audio_from_array, survey


def noise(count: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, channels)) * 0.2).astype(np.float32)


class Counted(Audio):
    """Passes another audio through and counts how often it is started and how much is decoded."""

    def __init__(self, inner: Audio) -> None:
        self.name, self.rate, self.channels, self._inner = inner.name, inner.rate, inner.channels, inner
        self.passes = self.decoded = 0

    def blocks(self) -> Iterator[np.ndarray]:
        self.passes += 1
        for block in self._inner.blocks():
            self.decoded += len(block)
            yield block

    def sha256(self) -> str:
        return self._inner.sha256()


class Endless(Audio):
    """Ten hours of quiet noise that nobody could hold."""

    name, rate, channels = "endless", 48_000, 2

    def blocks(self) -> Iterator[np.ndarray]:
        block = noise(32_768, 2)
        for _ in range(36_000 * 48_000 // 32_768):
            yield block.copy()

    def sha256(self) -> str:
        return "0" * 64


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 44_101, 192_000])
@pytest.mark.parametrize("channels", [1, 2, 7])
def test_resampling_equals_one_shot_soxr(rate: int, channels: int) -> None:
    samples = noise(rate * 3 + 17, channels)
    expected = soxr.resample(samples.mean(axis=1, dtype=np.float64).astype(np.float32), rate, 16_000, "HQ")
    audio = audio_from_array(samples, rate, "noise")
    assert survey(audio).samples == len(expected)
    with Waveform(audio) as waveform:
        decoded = waveform.read(0, len(expected))
        # The mean over channels may differ in its last bit; the resampling itself adds nothing.
        assert np.abs(decoded - expected).max() <= (0 if channels == 1 else 1e-6)
        assert not waveform.read(len(expected), len(expected) + 100).any()


@pytest.mark.parametrize("rate", [8_000, 44_100, 96_000])
def test_resampling_does_not_shift(rate: int) -> None:
    """The lag against a signal computed at 16 kHz, below a tenth of a sample."""
    time = lambda at: np.arange(2 * at) / at  # noqa: E731
    burst = lambda t: np.exp(-(((t - 1.0) / 0.005) ** 2)) * np.cos(2 * np.pi * 700 * (t - 1.0))  # noqa: E731
    audio = audio_from_array((burst(time(rate)) * 0.5).astype(np.float32), rate, "burst")
    with Waveform(audio) as waveform:
        decoded = waveform.read(0, 32_000)
    expected = burst(time(16_000)) * 0.5
    assert np.abs(decoded - expected).max() < 2e-3  # a tenth of a sample would be 0.014
    correlation = np.correlate(decoded, expected[8_000:24_000], "valid")
    assert int(np.argmax(correlation)) == 8_000


def test_content_above_8_khz_is_removed() -> None:
    tone = (0.5 * np.sin(2 * np.pi * 11_000 * np.arange(96_000) / 48_000)).astype(np.float32)
    found = survey(audio_from_array(tone, 48_000, "tone"))
    assert found.variance < 1e-6 and found.peak > 0.49


def test_sixteen_kilohertz_mono_is_untouched() -> None:
    samples = noise(50_000)
    with Waveform(audio_from_array(samples, 16_000, "noise")) as waveform:
        assert (waveform.read(0, 50_000) == samples[:, 0]).all()


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("lead", [0, 4_800])
def test_any_slicing_gives_the_same_bits(rate: int, lead: int) -> None:
    audio = audio_from_array(noise(rate * 20, 2), rate, "noise")
    with Waveform(audio) as waveform:
        signal = waveform.read(0, 320_000)
    padded = np.concatenate([np.zeros(50_000 + lead, np.float32), signal, np.zeros(100_000, np.float32)])
    draw = np.random.default_rng(5)
    with Waveform(audio, lead_samples=lead) as waveform:
        position = -40_000
        for _ in range(60):  # forwards with overlap, sometimes far ahead, sometimes back
            start = position + int(draw.integers(-30_000, 30_000))
            stop = start + int(draw.integers(0, 90_000))
            start, stop = max(start, -50_000), min(max(start, -50_000, stop), 320_000 + lead + 90_000)
            start = min(start, stop)
            assert (waveform.read(start, stop) == padded[50_000 + start : 50_000 + stop]).all()
            position = 0 if stop > 400_000 else stop


def test_overlapping_windows_decode_once_and_going_back_starts_over() -> None:
    audio = Counted(audio_from_array(noise(48_000 * 60), 48_000, "noise"))
    with Waveform(audio) as waveform:
        for start in range(0, 900_000, 60_000):
            waveform.read(start - 16_000, start + 60_000 + 16_000)
        assert audio.passes == 1
        assert audio.decoded <= 48_000 * 60
        waveform.read(0, 1_000)
        assert audio.passes == 2


def test_windows_that_overlap_by_more_than_three_seconds_decode_once() -> None:
    audio = Counted(audio_from_array(noise(16_000 * 60), 16_000, "noise"))
    with Waveform(audio) as waveform:
        for start in range(0, 16_000 * 40, 16_000):
            waveform.read(start, start + 16_000 * 15)
    assert audio.passes == 1


def test_only_what_is_asked_for_is_decoded() -> None:
    audio = Counted(audio_from_array(noise(16_000 * 60), 16_000, "noise"))
    with Waveform(audio) as waveform:
        assert not waveform.read(-500, 0).any()
        assert audio.decoded == 0
        waveform.read(0, 10)
    assert audio.decoded <= 40_000


def test_memory_stays_flat_over_ten_hours() -> None:
    tracemalloc.start()
    try:
        with Waveform(Endless()) as waveform:
            waveform.read(0, 16_000)
            for start in range(0, 16_000 * 120, 16_000):
                waveform.read(start, start + 32_000)
            waveform.read(16_000 * 1_200, 16_000 * 1_201)  # far ahead: nothing on the way is kept
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20


def test_misuse() -> None:
    audio = audio_from_array(noise(100), 16_000, "noise")
    waveform = Waveform(audio)
    with pytest.raises(ValueError, match="backwards"):
        waveform.read(5, 4)
    assert waveform.read(5, 5).shape == (0,)
    waveform.close()
    with pytest.raises(ValueError, match="closed"):
        waveform.read(0, 1)
    with pytest.raises(ValueError, match="negative"):
        Waveform(audio, lead_samples=-1)


@pytest.mark.parametrize(("rate", "zeros"), [(16_000, 640), (44_100, 1_764), (11_025, 441), (22_050, 882)])
def test_a_soundtrack_is_the_native_audio_later(rate: int, zeros: int) -> None:
    samples = noise(rate, 2)
    track = Soundtrack(audio_from_array(samples, rate, "noise"), Fraction(1, 25))
    decoded = np.concatenate(list(track.blocks()))
    assert (track.rate, track.channels, track.delay_samples) == (rate, 2, zeros)
    assert decoded.dtype == np.float32 and not decoded[:zeros].any() and (decoded[zeros:] == samples).all()
    assert (np.concatenate(list(track.blocks())) == decoded).all()


def test_a_soundtrack_without_delay_and_with_a_long_one() -> None:
    audio = audio_from_array(noise(1_000, 6), 48_000, "noise")
    assert sum(map(len, Soundtrack(audio).blocks())) == 1_000
    blocks = list(Soundtrack(audio, Fraction(60)).blocks())
    assert sum(map(len, blocks)) == 60 * 48_000 + 1_000
    assert max(map(len, blocks)) < 100_000
    with pytest.raises(ValueError, match="negative"):
        Soundtrack(audio, Fraction(-1))
