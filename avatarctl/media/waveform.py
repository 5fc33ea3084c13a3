"""Audio as the models read it (16 kHz mono, by sample position) and as the output plays it."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from fractions import Fraction
from types import TracebackType
from typing import Self

import numpy as np
import soxr

from avatarctl.media.audio_readers import BLOCK_SAMPLES, Audio, Samples

__all__ = ["MODEL_RATE", "Soundtrack", "Waveform", "model_signal", "to_mono"]

MODEL_RATE = 16_000
"""Samples per second that the audio encoders expect (Wav2Vec2: spec/omniavatar.md b.1)."""

_KEPT = 3 * MODEL_RATE  # what is kept behind a request, whatever its length


def to_mono(block: Samples) -> Samples:
    """float32 [n]: the mean over the channels of [n, channels].

    Column by column: about four times faster than `mean` for a few channels, and each sample's sum
    has the same order whatever the length of the block.
    """
    channels = block.shape[1]
    mono = block[:, 0].astype(np.float32)
    for channel in range(1, channels):
        mono += block[:, channel]
    return mono / np.float32(channels) if channels > 1 else mono


def model_signal(blocks: Iterable[Samples], rate: int) -> Iterator[Samples]:
    """Blocks [n, channels] at `rate` as blocks [m] of 16 kHz mono, aligned with the input.

    soxr in its HQ setting (librosa's, spec/omniavatar.md b.1), streaming, float32: the concatenation equals
    `soxr.resample` of the whole to the bit, in values and in length. 16 kHz mono passes unchanged.
    """
    if rate == MODEL_RATE:
        for block in blocks:
            yield to_mono(block)
        return
    stream = soxr.ResampleStream(rate, MODEL_RATE, 1, dtype="float32", quality="HQ")
    for block in blocks:
        if len(resampled := stream.resample_chunk(to_mono(block))):
            yield resampled
    if len(resampled := stream.resample_chunk(np.zeros(0, np.float32), last=True)):
        yield resampled


class Waveform:
    """16 kHz mono samples of audio by absolute position, read forward with bounded memory.

    The signal starts at position `lead_samples`; everything outside it, on both sides, is zero.
    The last request and about three seconds behind its end are kept, so that fused windows decode
    nothing twice. Reading further back starts the audio over: the same samples, later. A position has the
    same value to the bit whatever is read before it and in whatever slices.
    """

    def __init__(self, audio: Audio, lead_samples: int = 0) -> None:
        if lead_samples < 0:
            raise ValueError(f"lead_samples is {lead_samples}, it cannot be negative")
        self.audio = audio
        self.lead_samples = lead_samples
        self._kept: deque[Samples] = deque()
        self._source: Iterator[Samples] | None = None
        self._begin = self._end = 0  # of what is kept, counted from the start of the audio
        self._closed = False

    def read(self, start: int, stop: int) -> Samples:
        """float32 [stop - start] from position `start` on; positions may be negative or past the end.

        Raises UnusableAudio when the audio turns out to be damaged, ValueError when stop < start.
        """
        if stop < start:
            raise ValueError(f"read from {start} to {stop} goes backwards")
        if self._closed:
            raise ValueError("read from a closed Waveform")
        window = np.zeros(stop - start, np.float32)
        first, last = max(start - self.lead_samples, 0), max(stop - self.lead_samples, 0)
        if first == last:
            return window
        if self._source is None or first < self._begin:
            self._restart()
        self._pull(first, last)
        position = self._begin
        for piece in self._kept:
            low, high = max(first, position), min(last, position + len(piece))
            if low < high:
                to = low + self.lead_samples - start
                window[to : to + high - low] = piece[low - position : high - position]
            position += len(piece)
        self._drop(min(last, first + _KEPT))
        return window

    def close(self) -> None:
        """Close the file behind the audio; reading afterwards is an error."""
        self._stop()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pull(self, first: int, last: int) -> None:
        """Decode up to position `last`, forgetting on the way what lies far before `first`."""
        assert self._source is not None
        while self._end < last and (piece := next(self._source, None)) is not None:
            self._kept.append(piece)
            self._end += len(piece)
            self._drop(first)

    def _drop(self, position: int) -> None:
        while self._kept and self._begin + len(self._kept[0]) <= position - _KEPT:
            self._begin += len(self._kept.popleft())

    def _restart(self) -> None:
        self._stop()
        self._source = model_signal(self.audio.blocks(), self.audio.rate)

    def _stop(self) -> None:
        if isinstance(self._source, Generator):
            self._source.close()
        self._source = None
        self._kept.clear()
        self._begin = self._end = 0


class Soundtrack:
    """The user's own audio for the output file: native rate and channels, started later by a delay.

    `delay_seconds` is exact and becomes `round(delay_seconds * rate)` samples of silence, so that a
    shift of one frame (1/25 s) stays one frame at every rate.
    """

    def __init__(self, audio: Audio, delay_seconds: Fraction = Fraction(0)) -> None:
        if delay_seconds < 0:
            raise ValueError(f"delay_seconds is {delay_seconds}, it cannot be negative")
        self.audio = audio
        self.delay_samples = round(delay_seconds * audio.rate)

    @property
    def rate(self) -> int:
        """Samples per second."""
        return self.audio.rate

    @property
    def channels(self) -> int:
        return self.audio.channels

    def blocks(self) -> Iterator[Samples]:
        """float32 [n, channels] from the start: the delay as zeros, then the audio."""
        for start in range(0, self.delay_samples, BLOCK_SAMPLES):
            yield np.zeros((min(BLOCK_SAMPLES, self.delay_samples - start), self.channels), np.float32)
        yield from self.audio.blocks()
