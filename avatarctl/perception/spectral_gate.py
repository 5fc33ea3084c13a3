"""Speech out of a mix without a network: a gate on each band of the spectrum.

What stands still for a second or two, as chords and hum do, is taken for the floor of its band and
subtracted from the magnitude; speech moves and stays above it. Demo quality: drums, songs and a second voice
pass.

numpy alone. The spectra of about two seconds are alive at a time, whatever the length of the audio.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

__all__ = ["gate"]

Samples = NDArray[np.float32]
Spectra = NDArray[np.complex64]  # [frames, bands, channels]

_HOPS_PER_WINDOW: Final = 4
_HOP_SECONDS: Final = 0.016  # 256 samples at 16 kHz, so windows of 1024
_SQUARES: Final = 1.5  # sum of the squared periodic Hann windows that cover a sample, a quarter apart
_QUANTILE: Final = 0.30
_FLOOR_FACTOR: Final = 1.5
_LEAST_GAIN: Final = 0.05
_TOGETHER: Final = 8  # frames that share a floor
_APART: Final = (
    4  # frames from one that a floor is made of to the next: a window, so that they share no sample
)
_GROUPS: Final = 8  # of so many frames, on either side, whose spectra make a floor: 1 s


def gate(blocks: Iterable[Samples], rate: int) -> Iterator[Samples]:
    """Speech in a mix: float32 [n, channels] in blocks, as long as the mix; of one or two channels.

    floor: the 30th percentile of a band's magnitude within the 2 s around it, of the mean of the channels
    or of half their difference, whichever is louder; gain = clip((|mean| - 1.5 floor) / |mean|, 0.05, 1), for
    all channels alike. Windows are Hann on both sides, a quarter apart, and begin before the first sample, so
    that each sample is covered by four and nothing is divided by a window.
    """
    hop = round(rate * _HOP_SECONDS)
    size = hop * _HOPS_PER_WINDOW
    window = np.hanning(size + 1)[:-1, None].astype(np.float32)
    length = 0

    def counted() -> Iterator[Samples]:
        nonlocal length
        for block in blocks:
            length += len(block)
            yield block

    tail: Samples | None = None
    position = hop - size  # of what comes out next; negative in the zeros that stand in front
    for spectra in _gated(_spectra(counted(), window, hop)):
        joined = np.zeros(((len(spectra) - 1) * hop + size, spectra.shape[2]), np.float32)
        if spectra.any():
            frames = np.fft.irfft(spectra, size, axis=1) * (window / np.float32(_SQUARES))
            for number, frame in enumerate(frames):
                joined[number * hop : number * hop + size] += frame
        if tail is not None:
            joined[: len(tail)] += tail
        done, tail = joined[: len(spectra) * hop], joined[len(spectra) * hop :]
        # A gate is late by what it looks ahead: where `length` is not yet the end, `done` is before it.
        if len(piece := done[max(0, -position) : max(0, length - position)]):
            yield piece
        position += len(done)


def _spectra(blocks: Iterable[Samples], window: Samples, hop: int) -> Iterator[Spectra]:
    """Groups of `_TOGETHER` spectra, of a signal with zeros before and behind it; the last may be smaller."""
    size = len(window)
    rest: Samples | None = None
    for block in blocks:
        if rest is None:
            rest = np.zeros((size - hop, block.shape[1]), np.float32)
        rest = np.concatenate([rest, block])
        while len(rest) >= (_TOGETHER - 1) * hop + size:
            yield _transformed(rest[: (_TOGETHER - 1) * hop + size], window, hop)
            rest = rest[_TOGETHER * hop :]
    if rest is not None:
        behind = size - hop + -len(rest) % hop
        padded = np.concatenate([rest, np.zeros((behind, rest.shape[1]), np.float32)])
        count = (len(padded) - size) // hop + 1
        for first in range(0, count, _TOGETHER):
            last = min(first + _TOGETHER, count) - 1
            yield _transformed(padded[first * hop : last * hop + size], window, hop)


def _transformed(samples: Samples, window: Samples, hop: int) -> Spectra:
    if not samples.any():  # digital silence, which may last
        count = (len(samples) - len(window)) // hop + 1
        return np.zeros((count, len(window) // 2 + 1, samples.shape[1]), np.complex64)
    frames = sliding_window_view(samples, len(window), axis=0)[::hop].transpose(0, 2, 1)
    return np.fft.rfft(frames * window, axis=1).astype(np.complex64, copy=False)


def _gated(groups: Iterable[Spectra]) -> Iterator[Spectra]:
    """The spectra with what stands still taken out. A floor is made of `_GROUPS` groups on either side; those
    at both ends take the first and the last that is whole."""
    waiting: deque[Spectra] = deque()
    recent: deque[NDArray[np.float32]] = deque(maxlen=2 * _GROUPS + 1)
    for spectra in groups:
        waiting.append(spectra)
        recent.append(_magnitudes(spectra[::_APART]))
        if len(recent) == recent.maxlen:
            ready = [waiting.popleft() for _ in range(len(waiting) - _GROUPS)]
            yield from _above_floor(ready, recent)
    yield from _above_floor(waiting, recent)


def _above_floor(groups: Iterable[Spectra], recent: Iterable[NDArray[np.float32]]) -> Iterator[Spectra]:
    """Groups that share a floor; what is silent needs none."""
    floor = None
    for spectra in groups:
        if spectra.any():
            floor = _floor(recent) if floor is None else floor
            spectra = _subtracted(spectra, floor)
        yield spectra


def _magnitudes(spectra: Spectra) -> NDArray[np.float32]:
    """[1 or 2, frames, bands]: of the mean of the channels, and of half the difference of two."""
    if spectra.shape[2] == 1:
        return np.abs(spectra[None, ..., 0])
    left, right = spectra[..., 0], spectra[..., 1]
    magnitudes: NDArray[np.float32] = np.abs(np.stack([left + right, left - right]))
    return magnitudes / np.float32(2)


def _floor(recent: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    magnitudes = np.concatenate(list(recent), axis=1)
    rank = int(_QUANTILE * (magnitudes.shape[1] - 1))
    return np.partition(magnitudes, rank, axis=1)[:, rank].max(axis=0)


def _subtracted(spectra: Spectra, floor: NDArray[np.float32]) -> Spectra:
    magnitude = _magnitudes(spectra)[0]
    above = magnitude - np.float32(_FLOOR_FACTOR) * floor
    gain = np.divide(above, magnitude, out=np.zeros_like(magnitude), where=magnitude > 0)
    return spectra * np.clip(gain, _LEAST_GAIN, 1.0)[..., None]
