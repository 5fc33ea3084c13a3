"""The first pass over audio: its length, level and soundness, before any model is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from avatarctl.errors import UnusableAudio
from avatarctl.media.audio_readers import Audio, Samples
from avatarctl.media.waveform import model_signal, to_mono

__all__ = ["AudioSurvey", "survey"]

_LOUDEST = 1e6  # of full scale 1.0; beyond it the numbers are no audio, and float32 energy loses sense
_SILENT = 2.0**-16  # half a step of 16-bit audio
_ABOVE_SCALE = 1.5  # decoders overshoot full scale by a little; this is no overshoot
_CLIPPED = 0.999  # full scale of 8-bit audio lies at 0.992 or -1.0, of every other width above
_CLIPPED_SHARE = 0.02  # audio that is merely mastered loudly stays below


@dataclass(frozen=True)
class AudioSurvey:
    """What one pass over audio found.

    samples:        length at 16 kHz mono, exactly as many as `Waveform` delivers without its lead
    native_samples: length at the audio's own rate
    mean, variance: of the 16 kHz mono signal, float64, population variance (spec/omniavatar.md b.2)
    peak:           the largest magnitude among all native samples
    mono_peak:      the same of the mean of the channels
    warnings:       doubts that a person should read, without the file's name
    """

    samples: int
    native_samples: int
    mean: float
    variance: float
    peak: float
    mono_peak: float
    warnings: tuple[str, ...]


def survey(audio: Audio) -> AudioSurvey:
    """Read audio once, block by block, and judge whether it can be used.

    Raises UnusableAudio for no samples, samples that are not finite, an amplitude beyond 1e6 and
    damage that the decoder cannot pass.
    """
    scan = _Scan(audio)
    moments = _Moments()
    for chunk in model_signal(scan.blocks(), audio.rate):
        moments.add(chunk)
    scan.refuse_unusable()
    if moments.count == 0:
        raise UnusableAudio(f"too short: {scan.count} samples at {audio.rate} Hz", where=audio.name)
    return AudioSurvey(
        samples=moments.count,
        native_samples=scan.count,
        mean=moments.mean,
        variance=moments.squares / moments.count,
        peak=scan.peak,
        mono_peak=scan.mono_peak,
        warnings=(*audio.doubts, *scan.doubts()),
    )


class _Moments:
    """Mean and sum of squared deviations of a stream, by merging blocks (Chan, Golub and LeVeque 1983).

    Unlike a running sum of squares it keeps its digits when the mean is far from zero.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0

    def add(self, chunk: Samples) -> None:
        exact = chunk.astype(np.float64)
        mean = float(exact.mean())
        exact -= mean
        squares = float(np.dot(exact, exact))
        total = self.count + len(chunk)
        delta = mean - self.mean
        self.squares += squares + delta * delta * self.count * len(chunk) / total
        self.mean += delta * len(chunk) / total
        self.count = total


class _Scan:
    """Looks at native blocks while they pass; from the first unusable sample on it lets none through."""

    def __init__(self, audio: Audio) -> None:
        self._audio = audio
        self.count = 0
        self.peak = self.mono_peak = 0.0
        self._clipped = 0
        self._not_finite = 0
        self._first_bad: int | None = None

    def blocks(self) -> Iterator[Samples]:
        """The mean of the channels, [n, 1]."""
        for block in self._audio.blocks():
            # NaN wins every comparison of min and max, so one look at the extremes finds it.
            extreme = max(float(block.max()), -float(block.min())) if len(block) else 0.0
            if not math.isfinite(extreme):
                self._count_bad(block)
            else:
                self.peak = max(self.peak, extreme)
                if _CLIPPED <= extreme <= _ABOVE_SCALE:
                    magnitudes = np.abs(block)
                    self._clipped += int(np.count_nonzero(magnitudes >= _CLIPPED))
            self.count += len(block)
            if self._not_finite == 0 and self.peak <= _LOUDEST:
                mono = to_mono(block)
                if len(mono):
                    self.mono_peak = max(self.mono_peak, float(mono.max()), -float(mono.min()))
                yield mono[:, None]

    def _count_bad(self, block: Samples) -> None:
        bad = ~np.isfinite(block)
        if self._first_bad is None:
            self._first_bad = self.count + int(np.argmax(bad.any(axis=1)))
        self._not_finite += int(np.count_nonzero(bad))

    def refuse_unusable(self) -> None:
        where = self._audio.name
        if self.count == 0:
            raise UnusableAudio("no samples: the audio is empty", where=where)
        if self._first_bad is not None:
            seconds = self._first_bad / self._audio.rate
            many = "1 sample is" if self._not_finite == 1 else f"{self._not_finite} samples are"
            raise UnusableAudio(f"{many} not finite (NaN or Inf), the first at {seconds:.3f} s", where=where)
        if self.peak > _LOUDEST:
            raise UnusableAudio(f"amplitude out of range: {self.peak:.3g}, full scale is 1.0", where=where)

    def doubts(self) -> Iterator[str]:
        if self.peak == 0.0:
            yield "is digital silence"
        elif self.peak < _SILENT:
            yield f"is as good as silent (peak {self.peak:.1e} of full scale)"
        elif self.peak > _ABOVE_SCALE:
            yield f"peaks at {self.peak:.1f} times full scale: the output's audio may distort"
        share = self._clipped / (self.count * self._audio.channels)
        if self.peak <= _ABOVE_SCALE and share >= _CLIPPED_SHARE:
            yield f"is heavily clipped: {share:.0%} of its samples are at full scale"
