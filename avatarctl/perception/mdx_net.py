"""Speech out of a mix by an MDX network in ONNX, Kim_Vocal_2, with onnxruntime alone.

It is the separator of the published long-video pipeline (spec/stableavatar.md j). Its constants, and what is
done around it, are those of the package audio-separator (`mdx_separator.py`), without its 0/0 at both ends.
Spectra are numpy's. One chunk of six seconds goes through the network at a time and is faded into the one
before it, so memory does not depend on the length of the audio.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import soxr
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from avatarctl.errors import ExtraMissing, UnusableWeights
from avatarctl.media.files import check_regular_file
from avatarctl.media.waveform import to_mono

__all__ = ["COMPENSATE", "RATE", "MdxNetwork", "overlapped", "stereo_signal"]

Samples = NDArray[np.float32]

RATE: Final = 44_100
COMPENSATE: Final = 1.009
"""Speech is louder in the mix than the network gives it: the rest is the mix without so much of it."""

_FFT: Final = 7680
_HOP: Final = 1024
_BANDS: Final = 3072  # of 3841; what lies above 17.6 kHz is no speech
_FRAMES: Final = 256
_MUTED: Final = 3  # lowest bands
_CODES: Final = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .* failed:)?")
_PEAK: Final = 0.9  # of what the network is given
_FAINTEST: Final = float(np.finfo(np.float32).tiny)  # below it a scale to this peak is no float32 any more
CHUNK: Final = _HOP * (_FRAMES - 1)
TRIM: Final = _FFT // 2
STEP: Final = CHUNK * 3 // 4
_WINDOW: Final = np.hanning(_FFT + 1)[:-1].astype(np.float32)  # periodic


def stereo_signal(blocks: Iterable[Samples], rate: int) -> Iterator[Samples]:
    """Blocks [n, channels] as blocks [m, 2] at 44.1 kHz: two channels as they are, others as their mean."""
    stream = soxr.ResampleStream(rate, RATE, 2, dtype="float32", quality="HQ") if rate != RATE else None
    for block in blocks:
        if block.shape[1] != 2:
            block = np.repeat(to_mono(block)[:, None], 2, axis=1)
        block = block if stream is None else stream.resample_chunk(np.ascontiguousarray(block, np.float32))
        if len(block):
            yield block
    if stream is not None and len(last := stream.resample_chunk(np.zeros((0, 2), np.float32), last=True)):
        yield last


class MdxNetwork:
    """A session of onnxruntime over one file.

    Raises ExtraMissing without onnxruntime, PathNotFound, and UnusableWeights for what is no ONNX file, or is
    one of another network.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            if error.name != "onnxruntime":
                raise
            raise ExtraMissing(
                "onnxruntime is not installed", fix="pip install 'avatarctl[separate]'"
            ) from error
        self._path = check_regular_file(path, UnusableWeights)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong comes as an exception
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except MemoryError:
            raise
        except Exception as error:  # its classes have no other base in common
            raise UnusableWeights(f"is no ONNX file that can be run: {_cause(error)}", where=path) from error
        self._check_shapes()

    def _check_shapes(self) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        wanted = [1, 4, _BANDS, _FRAMES]
        for each in (*inputs, *outputs):
            # A name in place of a number is a size that is chosen at each run.
            sizes = zip(each.shape, wanted, strict=False)
            fits = len(each.shape) == len(wanted) and all(
                size == asked or not isinstance(size, int) for size, asked in sizes
            )
            if not fits or each.type != "tensor(float)":
                found = f"{each.name} is {each.type} {each.shape}"
                raise self._other(f"{found}, where float {wanted} is expected")
        if len(inputs) != 1 or len(outputs) != 1:
            raise self._other(f"it has {len(inputs)} inputs and {len(outputs)} outputs, not one of each")

    def _other(self, found: str) -> UnusableWeights:
        return UnusableWeights(
            f"is another network than Kim_Vocal_2: {found[:200]}", where=self._path, fix="name another file"
        )

    def vocals(self, chunk: Samples) -> Samples:
        """Speech of one chunk, float32 [CHUNK, 2], all zeros in front and behind included."""
        spectra = self._run(_spectra(chunk))
        return _samples(spectra)

    def _run(self, spectra: NDArray[np.complex64]) -> NDArray[np.complex64]:
        """[2, frames, bands] -> the same of speech; the network sees left and right, real and imaginary."""
        parts = [part for side in spectra for part in (side.real, side.imag)]
        planes = np.stack(parts)[None].swapaxes(2, 3)
        planes[:, :, :_MUTED] = 0
        name = self._session.get_inputs()[0].name
        try:
            (made,) = self._session.run(None, {name: np.ascontiguousarray(planes)})
        except MemoryError:
            raise
        except Exception as error:
            raise UnusableWeights(f"cannot be run: {_cause(error)}", where=self._path) from error
        if made.shape != planes.shape:
            raise self._other(f"it gives {list(made.shape)} for {list(planes.shape)}")
        if not np.isfinite(made).all():
            raise UnusableWeights("gives numbers that are not finite (NaN or Inf)", where=self._path)
        left_re, left_im, right_re, right_im = made[0].swapaxes(1, 2)
        return np.stack([left_re + 1j * left_im, right_re + 1j * right_im])


def overlapped(blocks: Iterable[Samples], network: Any, peak: float) -> Iterator[Samples]:
    """Speech of a mix, blocks float32 [n, 2] at 44.1 kHz in and out, as many samples as came in.

    network: `MdxNetwork`, or what has its `vocals`. peak: of the mix; the network is given it at 0.9.

    Chunks begin at multiples of three quarters of one, in a signal with `TRIM` zeros in front and at least as
    many behind, and are weighted by a Hann window. What is divided by the sum of the weights lies within the
    mix, where this sum is never zero. A chunk that begins behind the mix has no weight in it and is not made.
    """
    scale = np.float32(_PEAK / peak if peak >= _FAINTEST else 1.0)
    length = 0
    summed, weights = np.zeros((CHUNK, 2), np.float32), np.zeros((CHUNK, 1), np.float32)
    start = -TRIM  # of the chunk, counted from the first sample of the mix

    def advance() -> Samples:
        """What no later chunk changes, without the zeros; moves on by a step."""
        nonlocal summed, weights, start
        keep = slice(max(0, -start), max(0, min(STEP, length - start)))
        ready: Samples = summed[keep] / (weights[keep] * scale)
        nothing = np.zeros((STEP, 2), np.float32)
        summed, weights = (
            np.concatenate([summed[STEP:], nothing]),
            np.concatenate([weights[STEP:], nothing[:, :1]]),
        )
        start += STEP
        return ready

    rest = np.zeros((TRIM, 2), np.float32)

    def add(chunk: Samples) -> None:
        window = np.hanning(len(chunk)).astype(np.float32)[:, None]
        whole = np.concatenate([chunk, np.zeros((CHUNK - len(chunk), 2), np.float32)])
        if whole.any():  # in silence there is no speech, whatever a network makes of it
            summed[: len(chunk)] += network.vocals(whole)[: len(chunk)] * window
        weights[: len(chunk)] += window

    for block in blocks:
        length += len(block)
        rest = np.concatenate([rest, block * scale])
        while len(rest) >= CHUNK:
            add(rest[:CHUNK])
            rest = rest[STEP:]
            yield advance()
    useful = CHUNK - 2 * TRIM
    behind = useful + TRIM - length % useful
    rest = np.concatenate([rest, np.zeros((behind, 2), np.float32)])
    while start < length:
        add(rest[:CHUNK])
        rest = rest[STEP:]
        yield advance()


def _spectra(chunk: Samples) -> NDArray[np.complex64]:
    """[2, frames, bands] of [CHUNK, 2]: periodic Hann, centred, reflected at both ends."""
    padded = np.pad(chunk.T, ((0, 0), (TRIM, TRIM)), mode="reflect")
    frames = sliding_window_view(padded, _FFT, axis=1)[:, ::_HOP]
    return np.fft.rfft(frames * _WINDOW, axis=2)[..., :_BANDS].astype(np.complex64, copy=False)


def _samples(spectra: NDArray[np.complex64]) -> Samples:
    """The inverse of `_spectra`, with silence in the bands above; float32 [CHUNK, 2]."""
    frames = np.fft.irfft(spectra, _FFT, axis=2).astype(np.float32, copy=False) * _WINDOW
    summed, squares = np.zeros((CHUNK + _FFT, 2), np.float32), np.zeros((CHUNK + _FFT, 1), np.float32)
    for number in range(_FRAMES):
        covered = slice(number * _HOP, number * _HOP + _FFT)
        summed[covered] += frames[:, number].T
        squares[covered, 0] += _WINDOW**2
    return summed[TRIM:-TRIM] / squares[TRIM:-TRIM]


def _cause(error: Exception) -> str:
    """What onnxruntime says, in one line, without its codes and the path."""
    said = _CODES.sub("", " ".join(str(error).split()))
    return said[:160] or type(error).__name__
