"""Clips that networks learn from: visually lossless MP4s, whole or absent, the same bytes every time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.audio.stream import AudioStream
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from avatarctl.atomic import atomic_path, disk_errors
from avatarctl.media.audio_readers import Samples
from avatarctl.media.bt709 import state_colours, to_yuv
from avatarctl.media.waveform import MODEL_RATE
from avatarctl.media.x264 import repeatable

__all__ = ["write_clip"]

_CRF = "10"  # of x264; from 12 down no difference is seen
_AAC_BITS = 128_000  # per second and channel


def write_clip(
    path: str | Path,
    frames: Iterable[npt.NDArray[np.uint8]],
    *,
    fps: int | Fraction = 25,
    audio: Samples | None = None,
    rate: int = MODEL_RATE,
) -> int:
    """Writes an ordinary MP4 of H.264 and, with `audio`, AAC; returns the number of frames.

    frames: blocks uint8 RGB `[n, height, width, 3]`, pulled one at a time; of one size. An odd size keeps
            its pixels, in 4:4:4, which fewer players show than the 4:2:0 of even ones
    fps:    frames per second, exact
    audio:  float32 `[n]` or `[n, channels]` at `rate`, from the first frame on; what is longer than the
            frames is cut. `rate` is one that AAC has

    One thread and no date: equal frames give equal bytes, for one version of the encoder. An existing file is
    replaced; after a failure it is as it was. Memory does not depend on the length, `audio` excepted.

    Raises ValueError for no frames, or blocks of different size; OutputRefused for a place that cannot be
    written, WriteFailed for a full disk.
    """
    target = Path(path)
    with (
        atomic_path(target) as temporary,
        disk_errors(target, refusals=False),
        contextlib.closing(_Clip(temporary, Fraction(fps), audio, rate)) as clip,
    ):
        for block in frames:
            for frame in block:
                clip.add(frame)
        clip.finish()
    return clip.count


class _Clip:
    """An open file; frames and the audio up to each go in side by side."""

    def __init__(self, path: Path, fps: Fraction, audio: Samples | None, rate: int) -> None:
        # The index goes in front, so that a browser plays the clip while it loads.
        self._container = av.open(str(path), "w", format="mp4", container_options={"movflags": "faststart"})
        self._fps, self._rate = fps, rate
        self._audio = None if audio is None or not len(audio) else audio.reshape(len(audio), -1)
        self._convert = VideoReformatter()
        self._image: VideoStream | None = None
        self._track: AudioStream | None = None
        self._size: tuple[int, ...] = ()
        self.count = 0
        self._played = 0

    def close(self) -> None:
        self._container.close()

    def add(self, rgb: npt.NDArray[np.uint8]) -> None:
        if self._image is None:
            self._size = rgb.shape
            self._image = self._open_image(rgb.shape[1], rgb.shape[0])
            self._track = self._open_audio()
        if rgb.dtype != np.uint8 or rgb.shape != self._size or rgb.shape[2:] != (3,):
            raise ValueError(f"a frame is {rgb.dtype} {rgb.shape}, expected uint8 {self._size}")
        frame = to_yuv(self._convert, rgb, self._image.codec_context.pix_fmt)
        frame.pts, frame.time_base = self.count, 1 / self._fps
        self._container.mux(self._image.encode(frame))
        self.count += 1
        self._add_audio(int(self.count * self._rate / self._fps))

    def finish(self) -> None:
        if self._image is None:
            raise ValueError("a clip without frames")
        self._container.mux(self._image.encode(None))
        if self._track is not None:
            self._container.mux(self._track.encode(None))

    def _open_image(self, width: int, height: int) -> VideoStream:
        x264 = repeatable("lookahead-threads=1")
        options = {"preset": "medium", "crf": _CRF, "threads": "1", "x264-params": x264}
        stream = self._container.add_stream("libx264", rate=self._fps, options=options)
        context = stream.codec_context
        context.width, context.height = width, height
        context.pix_fmt = "yuv420p" if width % 2 == height % 2 == 0 else "yuv444p"
        context.time_base = 1 / self._fps
        context.gop_size = max(1, round(self._fps))  # a window is sought by decoding a second at most
        state_colours(context)
        return stream

    def _open_audio(self) -> AudioStream | None:
        if self._audio is None:
            return None
        layout = {1: "mono", 2: "stereo"}[self._audio.shape[1]]
        bits = self._audio.shape[1] * min(_AAC_BITS, 6 * self._rate)
        stream = self._container.add_stream("aac", rate=self._rate, layout=layout, bit_rate=bits)
        stream.codec_context.time_base = Fraction(1, self._rate)
        return stream

    def _add_audio(self, until: int) -> None:
        if self._audio is None or self._track is None:
            return
        samples = np.ascontiguousarray(self._audio[self._played : until], np.float32)
        if not len(samples):
            return
        frame = av.AudioFrame.from_ndarray(
            samples.reshape(1, -1), format="flt", layout=self._track.codec_context.layout.name
        )
        frame.sample_rate, frame.time_base, frame.pts = self._rate, Fraction(1, self._rate), self._played
        self._played += len(samples)
        self._container.mux(self._track.encode(frame))
