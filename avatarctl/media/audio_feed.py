"""A soundtrack as AAC can carry it, pulled in pieces of any size."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import soxr

__all__ = ["AAC_RATES", "AudioBlocks", "AudioFeed"]

Samples = npt.NDArray[np.float32]

AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
"""Sampling frequencies of ISO/IEC 14496-3, table 1.18."""

# Which loudspeaker a channel number means, as WAV files have it.
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 8: "7.1"}
_NOT_NUMBERS = "the soundtrack holds values that are no numbers (NaN or infinity); they are muted or clipped"


class AudioBlocks(Protocol):
    """Audio that can be read once from its beginning: `rate` in Hz, blocks float32 [n, channels]."""

    @property
    def rate(self) -> int: ...
    @property
    def channels(self) -> int: ...
    def blocks(self) -> Iterator[Samples]: ...


class AudioFeed:
    """Reads `source` lazily and hands out any number of samples at a time.

    Rate and channels are kept where AAC has them; other rates are resampled to the nearest one
    (by ratio), other channel counts mixed to stereo. Samples beyond ±1 are clipped, samples that
    are no numbers become silence. What was changed is in `.notices`, one line each.
    """

    def __init__(self, source: AudioBlocks) -> None:
        self.rate = min(AAC_RATES, key=lambda rate: max(rate / source.rate, source.rate / rate))
        self.channels = source.channels if source.channels in _LAYOUTS else 2
        self.layout = _LAYOUTS[self.channels]
        self.notices: list[str] = []
        self._source_channels = source.channels
        self._mix = None if self.channels == source.channels else _stereo_mix(source.channels)
        self._blocks: Iterator[Samples] | None = source.blocks()
        self._rest: Samples = np.zeros((0, self.channels), np.float32)
        self._resampler: soxr.ResampleStream | None = None
        if self._mix is not None:
            self.notices.append(f"the soundtrack's {source.channels} channels are mixed to stereo (AAC)")
        if self.rate != source.rate:
            self._resampler = soxr.ResampleStream(source.rate, self.rate, self.channels, dtype="float32")
            self.notices.append(f"the soundtrack is resampled from {source.rate} to {self.rate} Hz (AAC)")

    def read(self, count: int) -> Samples:
        """The next samples, `[n, channels]`: n = `count`, or what is left at the end."""
        parts = []
        while count > 0 and not self.at_end():
            part, self._rest = self._rest[:count], self._rest[count:]
            parts.append(part)
            count -= len(part)
        return np.concatenate(parts) if parts else np.zeros((0, self.channels), np.float32)

    def at_end(self) -> bool:
        """Whether no sample is left; pulls blocks from the source until it knows."""
        while not len(self._rest) and self._blocks is not None:
            block = next(self._blocks, None)
            if block is not None:
                self._rest = self._fit(block)
            else:
                self.close()
                self._rest = self._tail()
        return not len(self._rest)

    def close(self) -> None:
        """Ends the source's generator, so that it closes what it has open."""
        blocks, self._blocks = self._blocks, None
        if isinstance(blocks, Generator):
            blocks.close()

    def _fit(self, block: Samples) -> Samples:
        if block.ndim != 2 or block.shape[1] != self._source_channels:
            raise ValueError(f"a block of audio is {block.shape}, expected [n, {self._source_channels}]")
        if not np.isfinite(block).all():
            block = np.nan_to_num(block, nan=0.0, posinf=1.0, neginf=-1.0)
            if _NOT_NUMBERS not in self.notices:
                self.notices.append(_NOT_NUMBERS)
        if self._mix is not None:
            block = block @ self._mix
        if self._resampler is not None:
            block = self._resampler.resample_chunk(np.ascontiguousarray(block, np.float32))
        return np.clip(block, -1.0, 1.0, dtype=np.float32)

    def _tail(self) -> Samples:
        """What the resampler still holds when the source has ended."""
        if self._resampler is None:
            return self._rest
        resampler, self._resampler = self._resampler, None
        return np.clip(resampler.resample_chunk(self._rest, last=True), -1.0, 1.0)


def _stereo_mix(channels: int) -> Samples:
    """The matrix `[channels, 2]` that mixes to stereo without ever exceeding ±1.

    Seven channels are 6.1 (FL FR FC LFE BC SL SR) mixed as ITU-R BS.775 has it: centre, back and
    sides 3 dB lower, no bass channel. What more than eight channels mean is not known: each is
    equally loud on both sides.
    """
    if channels != 7:
        return np.full((channels, 2), 1 / channels, np.float32)
    lower = 0.5**0.5
    left = np.array([1, 0, lower, 0, lower / 2**0.5, lower, 0])
    right = np.array([0, 1, lower, 0, lower / 2**0.5, 0, lower])
    return (np.stack([left, right], axis=1) / left.sum()).astype(np.float32)
