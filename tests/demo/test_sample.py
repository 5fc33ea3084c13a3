"""The built-in sample is the same for everybody, and is what its name says: a face and a voice."""

from __future__ import annotations

import numpy as np
import pytest

from avatarctl.demo.sample import face_pixels, sample_audio, sample_image, voice_samples

RATE = 16_000


@pytest.mark.parametrize("size", [64, 256])
def test_the_face_is_an_rgb_image_of_the_size_that_was_asked(size: int) -> None:
    face = face_pixels(size)
    assert (face.shape, face.dtype) == ((size, size, 3), np.uint8)


def test_the_face_depends_on_the_seed_alone() -> None:
    assert np.array_equal(face_pixels(seed=3), face_pixels(seed=3))
    assert not np.array_equal(face_pixels(seed=0), face_pixels(seed=1))


@pytest.mark.parametrize("seed", range(6))
def test_the_face_has_the_parts_of_a_face_where_they_belong(seed: int) -> None:
    face = face_pixels(200, seed).astype(int)
    cheek, shirt, corner = face[108, 80], face[192, 100], face[4, 4]
    eye_row = face[99, 62:100].sum(-1)
    assert eye_row.max() > 690 and eye_row.min() < 200, "white of the eye and pupil"
    assert np.abs(face[132, 100] - cheek).sum() > 120, "the mouth differs from the cheek"
    assert np.abs(face[60, 100] - cheek).sum() > 40, "so does the hair over the forehead"
    assert min(np.abs(cheek - shirt).sum(), np.abs(cheek - corner).sum()) > 60


def test_the_edges_are_soft_and_agree_between_sizes() -> None:
    large = face_pixels(512).astype(float).reshape(64, 8, 64, 8, 3).mean(axis=(1, 3))
    assert np.abs(large - face_pixels(64)).mean() < 2.0


@pytest.mark.parametrize("seconds", [0.0, 1 / RATE, 0.2, 1.0, 4.0])
def test_the_voice_has_the_length_that_was_asked(seconds: float) -> None:
    voice = voice_samples(seconds)
    assert (voice.shape, voice.dtype) == ((round(seconds * RATE),), np.float32)
    assert np.isfinite(voice).all()


@pytest.mark.parametrize("seconds", [0.2, 4.0])
def test_the_voice_is_loud_but_never_clips(seconds: float) -> None:
    assert np.abs(voice_samples(seconds)).max() == pytest.approx(0.5, abs=1e-6)


def test_the_voice_depends_on_the_seed_alone() -> None:
    assert np.array_equal(voice_samples(1.0, seed=2), voice_samples(1.0, seed=2))
    assert not np.array_equal(voice_samples(1.0, seed=0), voice_samples(1.0, seed=1))


@pytest.mark.parametrize("seed", range(4))
def test_the_voice_comes_in_syllables_with_pauses_and_ends_in_silence(seed: int) -> None:
    voice = voice_samples(4.0, seed).reshape(-1, RATE // 200)  # pieces of 5 ms
    loudness = np.convolve(np.sqrt((voice**2).mean(axis=1)), np.ones(4) / 4, "same")
    loud = loudness > 0.15 * loudness.max()
    syllables = np.count_nonzero(np.diff(loud.astype(int)) == 1)
    assert 6 <= syllables <= 26
    assert np.abs(voice[-1]).max() < 0.2 * np.abs(voice).max(), "the last syllable is not cut off"


def test_the_voice_is_voiced_at_the_pitch_of_a_person() -> None:
    voice = voice_samples(4.0)
    loudest = int(np.argmax(np.convolve(voice**2, np.ones(1024), "valid")))
    piece = voice[loudest : loudest + 1024].astype(float)
    correlation = np.correlate(piece, piece, "full")[1023:]
    lags = np.arange(RATE // 300, RATE // 80)
    best = lags[np.argmax(correlation[lags])]
    assert 120 < RATE / best < 180
    assert correlation[best] > 0.6 * correlation[0]


def test_the_voice_has_no_energy_close_to_half_the_sample_rate() -> None:
    power = np.abs(np.fft.rfft(voice_samples(4.0))) ** 2
    assert power[len(power) * 15 // 16 :].sum() < 1e-4 * power.sum(), "a folded harmonic would be here"


def test_image_and_audio_are_what_the_loaders_would_give() -> None:
    image, audio = sample_image(), sample_audio()
    assert np.array_equal(image.pixels, face_pixels())
    assert (audio.rate, audio.channels) == (RATE, 1)
    assert np.array_equal(np.concatenate(list(audio.blocks()))[:, 0], voice_samples())
    assert (image.sha256, audio.sha256()) == (sample_image().sha256, sample_audio().sha256())
