"""Voices of the cartoon world: what they say and how the mouth moves, from a seed (spec/cartoon-world.md 1).

Speech is a sequence of 13 symbols. Each has resonances, a loudness and a shape of the mouth; the vocal tract
moves at 400 steps a second, smoothed as real mouths are (co-articulation). Audio is 16 kHz, and frame i of
the mouth is its shape at the moment of sample 640 i.

A voice speaks without end, and everything is made second by second from what was drawn so far: the beginning
of a longer speech is the same speech, and its memory does not grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
from numpy.typing import NDArray

from avatarctl.timeline import FPS, SAMPLE_RATE

__all__ = ["SYMBOLS", "Speech", "Voice", "draw_voice", "speak", "speech"]

Array = NDArray[np.floating]
Generator = np.random.Generator

# Formants in Hz, opening 0 to 1, spread from -1 (round) to 1 (wide).
_VOWELS: Final = {
    "a": ((820, 1250, 2600), 1.00, 0.15),
    "e": ((520, 1900, 2550), 0.55, 0.65),
    "i": ((290, 2350, 3000), 0.28, 1.00),
    "o": ((520, 880, 2500), 0.62, -0.60),
    "u": ((320, 700, 2300), 0.26, -1.00),
}
# Formants, opening, loudness.
_SONORANTS: Final = {
    "m": ((250, 1000, 2200), 0.00, 0.25),
    "n": ((280, 1600, 2500), 0.14, 0.28),
    "l": ((360, 1200, 2700), 0.30, 0.40),
}
# Band of the noise in Hz, opening, loudness.
_NOISES: Final = {
    "f": ((1500, 7500), 0.06, 0.10),
    "s": ((4800, 7800), 0.14, 0.22),
    "sh": ((2200, 5200), 0.18, 0.25),
}
_NEUTRAL: Final = (500, 1500, 2500)

SYMBOLS: Final = (*_VOWELS, *_SONORANTS, *_NOISES, "p", "pause")
"""All that a voice can say: vowels, sonorants, noises, a stop, and a pause."""

_CONSONANTS: Final = tuple(SYMBOLS.index(name) for name in (*_SONORANTS, *_NOISES, "p"))
_STOP: Final = SYMBOLS.index("p")
_PAUSE: Final = SYMBOLS.index("pause")

_STEPS: Final = 400  # of the vocal tract, a second; a block of speech is one second
_HOP: Final = SAMPLE_RATE // _STEPS
_MARGIN: Final = 40  # steps on either side of a block that the smoothing looks at
_MOUTH_MS: Final = (70, 50)
_VOICING_MS: Final = (25,)
_FORMANT_MS: Final = (50,)
_LEVEL_SECONDS: Final = 3  # of speech by which the loudness of a voice is set
_CLOSING: Final = 0.2  # s of pause at the end of a sentence

_RESONANCES: Final = ((90, 1.0), (120, 0.6), (180, 0.35))  # width in Hz and strength of each formant
_MOST_HARMONICS: Final = 60
_HIGHEST: Final = 7000  # Hz; below half the sample rate, so that no harmonic folds back
_NOISE_WINDOW: Final = 256  # samples, overlapping by half; a second holds 125 of its hops
_BURST_STEPS: Final = 6  # 15 ms of noise with which a stop ends
_BURST: Final = 0.15


def _column(field: str) -> Array:
    """Of every symbol: its opening, spread or voicing."""
    values = dict.fromkeys(SYMBOLS, 0.0)
    for name, (_, opening, spread) in _VOWELS.items():
        values[name] = {"opening": opening, "spread": spread, "voicing": 1.0}[field]
    for name, (_, opening, loudness) in _SONORANTS.items():
        values[name] = {"opening": opening, "spread": 0.0, "voicing": loudness}[field]
    for name, (_, opening, _) in _NOISES.items():
        values[name] = opening if field == "opening" else 0.0
    return np.array(list(values.values()))


_OPENING, _SPREAD, _VOICING = map(_column, ("opening", "spread", "voicing"))
_FORMANTS: Final = np.array([(_VOWELS | _SONORANTS).get(name, (_NEUTRAL,))[0] for name in SYMBOLS], float)


@dataclass(frozen=True)
class Voice:
    """How somebody speaks. pitch in Hz; formants: factor of all formants; tilt: fall of the overtones;
    breath: share of noise; speed: of the syllables; gain: loudness (RMS); background: noise, times gain."""

    pitch: float
    formants: float
    tilt: float
    breath: float
    speed: float
    gain: float
    background: float


@dataclass(frozen=True)
class Speech:
    """audio float32 [640 frames]; opening, spread float32 [frames]; symbol int64 [frames], into `SYMBOLS`."""

    audio: NDArray[np.float32]
    opening: NDArray[np.float32]
    spread: NDArray[np.float32]
    symbol: NDArray[np.int64]


_NO_TRACK: Final = np.zeros(0, np.float32)
_NOTHING: Final = Speech(_NO_TRACK, _NO_TRACK, _NO_TRACK, np.zeros(0, np.int64))


def draw_voice(seed: int) -> Voice:
    """The voice of a seed; high voices have high formants."""
    rng = np.random.default_rng([seed, 1])
    pitch = float(np.exp(rng.uniform(np.log(90), np.log(280))))
    formants = 0.8 + 0.45 * np.log(pitch / 90) / np.log(280 / 90) + rng.normal(0, 0.06)
    return Voice(
        pitch=pitch,
        formants=float(np.clip(formants, 0.8, 1.25)),
        tilt=rng.uniform(0.6, 1.4),
        breath=rng.uniform(0.0, 0.25),
        speed=rng.uniform(0.8, 1.3),
        gain=rng.uniform(0.03, 0.15),
        background=10 ** rng.uniform(-4, -2),
    )


def speech(seed: int, frames: int, *, closing: bool = False) -> Speech:
    """What the voice of a seed says in its first `frames` frames. closing: it ends in a pause."""
    parts = list(speak(seed, frames, closing=closing)) or [_NOTHING]
    fields = ("audio", "opening", "spread", "symbol")
    return Speech(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def speak(seed: int, frames: int, *, closing: bool = False) -> Iterator[Speech]:
    """The same in parts of a second, the last of them shorter."""
    voice = draw_voice(seed)
    last = frames * _STEPS // FPS - round(_CLOSING * _STEPS) if closing else None
    seconds = _sounding(seed, voice, last)
    first = [next(seconds) for _ in range(_LEVEL_SECONDS)]
    level = np.sqrt(np.mean(np.concatenate([audio for audio, _ in first]) ** 2)) + 1e-6
    rng = np.random.default_rng([seed, 8])
    for done, (audio, mouth) in enumerate(chain(first, seconds)):
        count = min(FPS, frames - done * FPS)
        if count <= 0:
            return
        noise = rng.standard_normal(len(audio)) * voice.background
        loud = ((audio / level + noise) * voice.gain).astype(np.float32)
        at = np.arange(count) * (_STEPS // FPS)
        yield Speech(
            loud[: count * SAMPLE_RATE // FPS],
            mouth.opening[at].astype(np.float32),
            mouth.spread[at].astype(np.float32),
            mouth.symbol[at],
        )


@dataclass(frozen=True)
class _Tract:
    """One second of the vocal tract and `_MARGIN` steps on either side of it, before smoothing."""

    symbols: NDArray[np.int64]
    emphasis: Array

    def smoothed(self, track: Array, milliseconds: tuple[int, ...], following: int = 0) -> Array:
        """The second of a track under Hann windows, one after the other, and `following` steps more."""
        for length in milliseconds:
            window = np.hanning(max(3, round(length / 1000 * _STEPS)) + 2)[1:-1]
            track = np.convolve(track, window / window.sum(), mode="same")
        return track[_MARGIN : _MARGIN + _STEPS + following]

    @property
    def opening(self) -> Array:
        return self.smoothed(_OPENING[self.symbols] * (0.35 + 0.65 * self.emphasis), _MOUTH_MS)

    @property
    def spread(self) -> Array:
        return self.smoothed(_SPREAD[self.symbols], _MOUTH_MS)

    @property
    def symbol(self) -> NDArray[np.int64]:
        return self.symbols[_MARGIN : _MARGIN + _STEPS]


def _sounding(seed: int, voice: Voice, last: int | None) -> Iterator[tuple[Array, _Tract]]:
    """(audio [16000] at any level, the vocal tract) of each second."""
    throat, hiss = _Throat(seed, voice), _Hiss(seed)
    for tract in _tracts(seed, voice.speed, last):
        voicing = tract.smoothed(_VOICING[tract.symbols] * tract.emphasis**1.5, _VOICING_MS, following=1)
        formants = [tract.smoothed(track, _FORMANT_MS) for track in _FORMANTS[tract.symbols].T]
        audio = throat.second(voicing, np.stack(formants, 1) * voice.formants)
        yield audio + hiss.second(tract, voicing * voice.breath), tract


def _tracts(seed: int, speed: float, last: int | None) -> Iterator[_Tract]:
    """Every second of what is said; before the beginning, and from step `last` on, it is a pause."""
    symbols = np.full(_MARGIN, _PAUSE)
    emphasis = np.ones(_MARGIN)
    syllables = _syllables(np.random.default_rng([seed, 6]), speed)
    start = -_MARGIN  # the step at which the arrays begin
    while True:
        while len(symbols) < _STEPS + 2 * _MARGIN + 1:
            symbol, steps, stress = next(syllables)
            symbols = np.append(symbols, [symbol] * steps)
            emphasis = np.append(emphasis, [stress] * steps)
        seen = symbols[: _STEPS + 2 * _MARGIN + 1].copy()
        if last is not None:
            seen[max(0, last - start) :] = _PAUSE
        yield _Tract(seen, emphasis[: len(seen)])
        symbols, emphasis, start = symbols[_STEPS:], emphasis[_STEPS:], start + _STEPS


def _syllables(rng: Generator, speed: float) -> Iterator[tuple[int, int, float]]:
    """(symbol, steps, emphasis): now and then a pause, mostly a consonant, always a vowel."""
    while True:
        emphasis = rng.uniform(0.55, 1.15)
        if rng.random() < 0.13:
            yield _PAUSE, _steps(rng.uniform(0.12, 0.40)), emphasis
        if rng.random() < 0.75:
            yield int(rng.choice(_CONSONANTS)), _steps(rng.uniform(0.05, 0.11) / speed), emphasis
        yield int(rng.integers(len(_VOWELS))), _steps(rng.uniform(0.10, 0.26) / speed), emphasis


def _steps(seconds: float) -> int:
    return max(1, round(seconds * _STEPS))


class _Throat:
    """Overtones of a gliding pitch under three resonances; the phase goes on from second to second."""

    def __init__(self, seed: int, voice: Voice) -> None:
        rng = np.random.default_rng([seed, 5])
        self._voice = voice
        self._glides = [
            (0.10, rng.uniform(0.3, 0.9), rng.random()),
            (0.05, rng.uniform(1.5, 3.0), rng.random()),
        ]
        highest = voice.pitch * np.exp(sum(depth for depth, _, _ in self._glides))
        self._harmonics = range(1, 1 + min(_MOST_HARMONICS, int(_HIGHEST / highest)))
        self._done, self._turns = 0, 0.0

    def second(self, voicing: Array, formants: Array) -> Array:
        """voicing [401], formants [400, 3] in Hz -> [16000]."""
        seconds = (self._done * _STEPS + np.arange(_STEPS + 1)) / _STEPS
        glide = sum(depth * np.sin(2 * np.pi * (rate * seconds + turn)) for depth, rate, turn in self._glides)
        pitch = self._voice.pitch * np.exp(glide)
        turns = self._turns + np.cumsum(_per_sample(pitch)) / SAMPLE_RATE
        self._done, self._turns = self._done + 1, float(turns[-1] % 1)
        wave = np.exp(2j * np.pi * turns)
        power, audio = np.ones_like(wave), np.zeros(len(turns))
        ends = np.append(formants, formants[-1:], axis=0)
        for k in self._harmonics:
            power = power * wave
            strength = sum(
                loud / (1 + ((k * pitch - ends[:, index]) / width) ** 2)
                for index, (width, loud) in enumerate(_RESONANCES)
            )
            fall = (self._voice.pitch * k / 500 + 0.5) ** -self._voice.tilt
            audio += _per_sample(voicing * strength * fall) * power.imag
        return audio


class _Hiss:
    """Noise shaped by what is said, in windows that overlap by half."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 7])
        self._tail = np.zeros(_NOISE_WINDOW // 2)

    def second(self, tract: _Tract, breath: Array) -> Array:
        """breath [401] -> [16000]."""
        hop = _NOISE_WINDOW // 2
        at = np.arange(SAMPLE_RATE // hop) * hop // _HOP
        now, soon = tract.symbols[_MARGIN + at], tract.symbols[_MARGIN + at + _BURST_STEPS]
        gains = _SHAPES[now] * tract.emphasis[_MARGIN + at, None] ** 1.5
        gains[(now == _STOP) & (soon != _STOP)] = _BURST
        gains = gains + _BURST * breath[at, None] / (1 + _FREQUENCIES / 2500)
        spectrum = np.fft.rfft(self._rng.standard_normal((len(at), _NOISE_WINDOW)), axis=1) * gains
        pieces = np.fft.irfft(spectrum, axis=1) * np.hanning(_NOISE_WINDOW)
        audio = pieces[:, :hop].ravel() + np.concatenate([self._tail, pieces[:-1, hop:].ravel()])
        self._tail = pieces[-1, hop:]
        return audio


_FREQUENCIES: Final = np.fft.rfftfreq(_NOISE_WINDOW, 1 / SAMPLE_RATE)


def _band(name: str) -> Array:
    if name not in _NOISES:
        return np.zeros_like(_FREQUENCIES)
    (low, high), _, loudness = _NOISES[name]
    return loudness / (1 + np.exp((low - _FREQUENCIES) / 300)) / (1 + np.exp((_FREQUENCIES - high) / 300))


_SHAPES: Final = np.stack([_band(name) for name in SYMBOLS])


def _per_sample(track: Array) -> Array:
    """A track [401] drawn as lines between its points: [16000]."""
    part = np.arange(_HOP) / _HOP
    return (track[:-1, None] + np.diff(track)[:, None] * part).ravel()
