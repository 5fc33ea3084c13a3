"""The built-in sample: a face that is drawn and a voice that is synthesised, both from a seed.

Nothing is stored and nothing is downloaded, and the result is nobody's likeness and nobody's voice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avatarctl.media import Audio, StillImage, audio_from_array, image_from_array

__all__ = ["VOICE_RATE", "face_pixels", "sample_audio", "sample_image", "voice_samples"]

VOICE_RATE = 16_000

_SKIN = ("#f6d3bd", "#e8b796", "#c98d68", "#8d5a3d")
_HAIR = ("#3a2a25", "#6b3f2a", "#b0703a", "#2b2f45")
_SHIRT = ("#3f7d8c", "#b65f4d", "#5f6fa8", "#6d8f5a")
_BACKGROUND = (("#bfe0ea", "#f3e7d3"), ("#d9d3ee", "#f6e3df"), ("#cfe6d2", "#f5efcf"))

# F1, F2, F3 in Hz of five vowels (rounded from textbook values for an adult speaker).
_VOWELS = {
    "a": (780.0, 1250.0, 2550.0),
    "e": (500.0, 1850.0, 2550.0),
    "i": (300.0, 2250.0, 2950.0),
    "o": (500.0, 900.0, 2450.0),
    "u": (330.0, 780.0, 2300.0),
}
_BANDWIDTHS = (80.0, 100.0, 140.0)
_HARMONIC_LIMIT = 7_000.0  # Hz; below the Nyquist frequency, so that no harmonic folds back


def sample_image(seed: int = 0) -> StillImage:
    """The drawn face as an image of 256 x 256 pixels."""
    return image_from_array(face_pixels(seed=seed), "built-in face")


def sample_audio(seconds: float = 4.0, seed: int = 0) -> Audio:
    """The synthesised voice as mono audio at 16 kHz."""
    return audio_from_array(voice_samples(seconds, seed), VOICE_RATE, "built-in voice")


def face_pixels(size: int = 256, seed: int = 0) -> NDArray[np.uint8]:
    """A frontal cartoon face, `[size, size, 3]` RGB; the seed chooses its colours.

    Everything is an ellipse whose edge is one pixel soft, painted back to front in coordinates that
    run from 0 to 1 over the image.
    """
    rng = np.random.default_rng(seed)
    skin, hair, shirt = (_rgb(rng.choice(colours)) for colours in (_SKIN, _HAIR, _SHIRT))
    top, bottom = (_rgb(colour) for colour in _BACKGROUND[rng.integers(len(_BACKGROUND))])
    white, dark, lips = _rgb("#fdfbf8"), _rgb("#33272a"), 0.55 * skin + 0.45 * _rgb("#b23a48")
    axis = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(axis, axis, indexing="ij")
    canvas = top + (bottom - top) * y[..., None]

    def ellipse(cx: float, cy: float, rx: float, ry: float, tilt: float = 0.0) -> NDArray[np.float64]:
        u = (x - cx) * np.cos(tilt) + (y - cy) * np.sin(tilt)
        v = (y - cy) * np.cos(tilt) - (x - cx) * np.sin(tilt)
        level = (u / rx) ** 2 + (v / ry) ** 2 - 1
        slope = 2 * np.hypot(u / rx**2, v / ry**2) + 1e-9
        return np.clip(0.5 - size * level / slope, 0, 1)  # level / slope: distance to the edge

    def paint(colour: NDArray[np.float64], cover: NDArray[np.float64], strength: float = 1.0) -> None:
        canvas[...] += (strength * cover)[..., None] * (colour - canvas)

    paint(white, ellipse(0.5, 0.44, 0.42, 0.42), 0.25)
    head = ellipse(0.5, 0.45, 0.262, 0.295)
    paint(hair, head)
    paint(hair, ellipse(0.5, 0.58, 0.255, 0.235))
    paint(shirt, ellipse(0.5, 1.06, 0.36, 0.25))
    paint(0.88 * skin, ellipse(0.5, 0.80, 0.082, 0.12))
    for side in (-1, 1):
        paint(0.93 * skin, ellipse(0.5 + side * 0.205, 0.53, 0.032, 0.052))
    paint(skin, ellipse(0.5, 0.5, 0.205, 0.265))
    paint(hair, head * ellipse(0.43, 0.255, 0.26, 0.115, -0.22))
    paint(hair, head * ellipse(0.64, 0.27, 0.13, 0.10, 0.55))
    for side in (-1, 1):
        eye = ellipse(0.5 + side * 0.088, 0.495, 0.046, 0.034)
        paint(lips, ellipse(0.5 + side * 0.118, 0.60, 0.048, 0.030), 0.22)
        paint(dark, ellipse(0.5 + side * 0.088, 0.490, 0.049, 0.036))
        paint(white, eye)
        paint(0.5 * shirt, eye * ellipse(0.5 + side * 0.086, 0.497, 0.025, 0.027))
        paint(dark, eye * ellipse(0.5 + side * 0.086, 0.497, 0.014, 0.015))
        paint(white, ellipse(0.494 + side * 0.086, 0.488, 0.008, 0.008))
        paint(hair, ellipse(0.5 + side * 0.090, 0.425, 0.050, 0.011, side * 0.06))
    nose = ellipse(0.5, 0.572, 0.024, 0.022)
    paint(0.80 * skin, nose * (1 - ellipse(0.5, 0.564, 0.024, 0.022)))
    paint(lips, ellipse(0.5, 0.662, 0.074, 0.034))
    paint(0.45 * lips, ellipse(0.5, 0.660, 0.058, 0.017))
    paint(white, ellipse(0.5, 0.660, 0.058, 0.017) * ellipse(0.5, 0.645, 0.050, 0.013), 0.9)
    return np.round(canvas).astype(np.uint8)


def voice_samples(seconds: float = 4.0, seed: int = 0) -> NDArray[np.float32]:
    """A voice that says a few open syllables, mono float32 `[seconds * 16000]` with a peak of 0.5.

    Source and filter: the harmonics of a gliding pitch, weighted by three resonances that move from
    vowel to vowel, under one envelope per syllable with pauses between the phrases.
    """
    rng = np.random.default_rng(seed)
    count = round(seconds * VOICE_RATE)
    time = np.arange(count) / VOICE_RATE
    loudness, formants = _syllables(time, rng)
    pitch = 150 * (1 + 0.10 * np.sin(2 * np.pi * 0.45 * time + 0.6) + 0.012 * np.sin(2 * np.pi * 5.3 * time))
    phase = 2 * np.pi * np.cumsum(pitch) / VOICE_RATE
    voice = np.zeros(count)
    for harmonic in range(1, 1 + int(_HARMONIC_LIMIT / pitch.min()) if count else 1):
        frequency = harmonic * pitch
        gain = (frequency < _HARMONIC_LIMIT) / harmonic
        for centre, width in zip(formants, _BANDWIDTHS, strict=True):
            gain = gain * centre**2 / np.hypot(centre**2 - frequency**2, width * frequency)
        voice += gain * np.sin(harmonic * phase)
    voice = (voice + 0.02 * rng.standard_normal(count)) * loudness
    return (0.5 * voice / max(float(np.abs(voice).max(initial=0.0)), 1e-9)).astype(np.float32)


def _syllables(
    time: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """Envelope in 0..1 and three formant tracks in Hz, all of `time`'s length."""
    loudness = np.zeros_like(time)
    centres, vowels = [], []
    start, end = 0.04, float(time[-1]) if time.size else 0.0
    while end - start > 0.08:
        length = min(rng.uniform(0.15, 0.30), end - start)
        inside = np.clip((time - start) / length, 0, 1)
        loudness += rng.uniform(0.6, 1.0) * np.sin(np.pi * inside) ** 0.8
        centres.append(start + length / 2)
        vowels.append(_VOWELS[str(rng.choice(list(_VOWELS)))])
        start += length + (rng.uniform(0.18, 0.35) if rng.random() < 0.2 else 0.02)
    if not vowels:
        return loudness, [np.full_like(time, formant) for formant in _VOWELS["a"]]
    return loudness, [np.interp(time, centres, track) for track in zip(*vowels, strict=True)]


def _rgb(text: str) -> NDArray[np.float64]:
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float64)
