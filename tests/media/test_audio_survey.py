"""The first pass over audio: statistics, warnings, refusals."""

from __future__ import annotations

import statistics
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from avatarctl.errors import UnusableAudio
from avatarctl.media import audio_from_array, open_audio, survey

SPEECH = Path(__file__).resolve().parents[3] / "shared" / "media" / "speech_a.wav"


def noise(count: int, channels: int = 1, level: float = 0.2) -> np.ndarray:
    return (np.random.default_rng(1).standard_normal((count, channels)) * level).astype(np.float32)


def test_mean_and_variance_are_those_of_the_whole() -> None:
    samples = noise(100_003) + np.linspace(-0.3, 0.5, 100_003, dtype=np.float32)[:, None]
    found = survey(audio_from_array(samples, 16_000, "noise"))
    exact = samples[:, 0].astype(np.float64).tolist()
    assert found.mean == pytest.approx(statistics.fmean(exact), abs=1e-12)
    assert found.variance == pytest.approx(float(np.var(exact)), rel=1e-12)
    assert (found.samples, found.native_samples) == (100_003, 100_003)
    assert found.peak == float(np.abs(samples).max())


def test_variance_survives_a_large_offset() -> None:
    """A running sum of squares would lose all digits of the small part."""
    small = noise(200_000, level=1e-3)[:, 0]
    samples = (small + np.float32(900.0)).astype(np.float32)
    steps = [int(value) for value in samples * np.float32(2**14)]  # what float32 tells apart at 900
    assert [step / 2**14 for step in steps[:100]] == samples[:100].tolist()
    count = len(steps)
    exact = float(Fraction(count * sum(step**2 for step in steps) - sum(steps) ** 2, (count * 2**14) ** 2))
    found = survey(audio_from_array(samples, 16_000, "offset"))
    assert found.variance == pytest.approx(exact, rel=1e-9)


def test_statistics_are_of_the_mean_over_channels() -> None:
    samples = noise(32_000, 7)
    found = survey(audio_from_array(samples, 16_000, "seven"))
    assert found.variance == pytest.approx(float(np.var(samples.mean(axis=1, dtype=np.float64))), rel=1e-5)
    assert found.peak == float(np.abs(samples).max())


@pytest.mark.parametrize("count", [1, 320])
def test_short_audios_are_accepted(count: int) -> None:
    found = survey(audio_from_array(noise(count), 16_000, "short"))
    assert found.samples == count and np.isfinite(found.variance)


def test_no_samples_and_less_than_one_sample_are_refused() -> None:
    with pytest.raises(UnusableAudio, match="no samples"):
        survey(audio_from_array(noise(0), 16_000, "nothing"))
    with pytest.raises(UnusableAudio, match="too short: 1 samples at 96000 Hz"):
        survey(audio_from_array(noise(1), 96_000, "speck"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_samples_that_are_not_finite_are_counted_and_placed(bad: float, rate: int) -> None:
    samples = noise(rate * 4, 2)
    samples[rate * 2, 1] = bad
    samples[rate * 3 : rate * 3 + 5, 0] = np.nan
    with pytest.raises(UnusableAudio, match=r"voice: 6 samples are not finite .* first at 2\.000 s"):
        survey(audio_from_array(samples, rate, "voice"))


@pytest.mark.parametrize("value", [2e6, -2e6, 3e29])
def test_amplitudes_beyond_audio_are_refused(value: float) -> None:
    samples = noise(50_000)
    samples[40_000] = value
    with pytest.raises(UnusableAudio, match="amplitude out of range"):
        survey(audio_from_array(samples, 48_000, "huge"))


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (np.zeros(1_000, np.float32), "digital silence"),
        (np.full(1_000, 1e-42, np.float32), "as good as silent"),
        (np.clip(noise(10_000)[:, 0] * 8, -1, 1), "heavily clipped"),
        (noise(10_000)[:, 0] * 20, "times full scale"),
        (np.full(1_000, 0.8, np.float32), None),
        (noise(10_000)[:, 0], None),
        (np.clip(noise(10_000)[:, 0] * 2, -1, 1), None),
    ],
)
def test_warnings(samples: np.ndarray, said: str | None) -> None:
    found = survey(audio_from_array(samples, 16_000, "voice"))
    assert len(found.warnings) == (0 if said is None else 1)
    assert said is None or said in found.warnings[0]


def test_a_peak_above_full_scale_is_kept() -> None:
    samples = 3.0 * np.sin(np.arange(16_000) * 0.1).astype(np.float32)
    assert survey(audio_from_array(samples, 16_000, "loud")).variance == pytest.approx(4.5, rel=0.01)


def test_a_minute_of_stereo_takes_well_under_a_third_of_a_second() -> None:
    audio = audio_from_array(noise(48_000 * 60, 2), 48_000, "minute")
    fastest = min(_seconds(lambda: survey(audio)) for _ in range(3))
    assert fastest < 0.3


def _seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@pytest.mark.skipif(not SPEECH.is_file(), reason="../shared/media is absent")
def test_real_speech() -> None:
    found = survey(open_audio(SPEECH))
    assert found.samples == found.native_samples == 92_800
    assert found.warnings == () and 0.2 < found.peak < 0.4 and abs(found.mean) < 1e-3
