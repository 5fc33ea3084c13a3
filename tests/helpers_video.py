"""Makes audio and images for a video, and reads it back independently of the writer:
by time stamps, not by order of arrival.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

AAC_PACKET = 1024  # samples


@dataclass(frozen=True)
class VideoFacts:
    """What a player would find; audio facts are 0 for a video without audio.

    frames:        decoded images
    frame_times:   presentation time of each, in seconds
    audio_seconds: from time 0 to the end of the last packet, by its declared duration
    audio_start:   time stamp of the first decoded sample, in seconds
    steady:        whether in every stream each packet begins where the one before it ends
    """

    frames: int
    frame_times: tuple[Fraction, ...]
    width: int
    height: int
    fps: Fraction
    audio_rate: int
    audio_channels: int
    audio_seconds: float
    audio_start: float
    steady: bool


def probe_video(path: Path) -> VideoFacts:
    """Decodes all of `path`; raises what PyAV raises where it cannot be read."""
    with av.open(str(path)) as container:
        image = container.streams.video[0]
        times = tuple(
            frame.pts * frame.time_base for frame in container.decode(image) if frame.pts is not None
        )
        context = image.codec_context
        size, fps = (context.width, context.height), image.average_rate
        has_audio = bool(container.streams.audio)
    rate = channels = 0
    seconds = start = 0.0
    if has_audio:
        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            rate, channels = stream.rate, stream.channels
            packets = [packet for packet in container.demux(stream) if packet.size]
            seconds = float((packets[-1].pts + packets[-1].duration) * stream.time_base)
        with av.open(str(path)) as container:
            first = next(container.decode(audio=0))
            start = float(first.pts * first.time_base)
    return VideoFacts(
        frames=len(times),
        frame_times=times,
        width=size[0],
        height=size[1],
        fps=fps,
        audio_rate=rate,
        audio_channels=channels,
        audio_seconds=seconds,
        audio_start=start,
        steady=_steady(path),
    )


def read_audio(path: Path) -> tuple[np.ndarray, int]:
    """All samples float32 `[n, channels]`, each at the place its time stamp says, and the rate."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        rate, channels = stream.rate, stream.channels
        # Packed: PyAV 18 reads beyond the planes of eight-channel planar frames.
        packed = av.AudioResampler(format="flt")
        pieces = []
        for decoded in container.decode(stream):
            begin = round(decoded.pts * decoded.time_base * rate)
            for frame in packed.resample(decoded):
                pieces.append((begin, frame.to_ndarray().reshape(-1, channels)))
    samples = np.zeros((max(begin + len(piece) for begin, piece in pieces), channels), np.float32)
    for begin, piece in pieces:
        samples[begin : begin + len(piece)] = piece
    return samples, rate


def read_frames(path: Path) -> np.ndarray:
    """All images uint8 `[n, height, width, 3]`, with the matrix written here, not swscale's.

    ITU-R BT.709-6: Kr = 0.2126, Kb = 0.0722; limited range, chroma repeated.
    """
    with av.open(str(path)) as container:
        planes = [frame.to_ndarray() for frame in container.decode(video=0)]
        height, width = (container.streams.video[0].height, container.streams.video[0].width)
    stacked = np.stack(planes).astype(np.float64)  # [n, height * 3 / 2, width]
    luma = (stacked[:, :height] - 16) / 219
    chroma = (stacked[:, height:].reshape(len(stacked), 2, height // 2, width // 2) - 128) / 224
    blue, red = chroma.repeat(2, axis=2).repeat(2, axis=3).transpose(1, 0, 2, 3)
    r = luma + 2 * (1 - 0.2126) * red
    b = luma + 2 * (1 - 0.0722) * blue
    g = (luma - 0.2126 * r - 0.0722 * b) / (1 - 0.2126 - 0.0722)
    return np.clip(np.rint(np.stack([r, g, b], axis=-1) * 255), 0, 255).astype(np.uint8)


def frame_ends(path: Path) -> list[int]:
    """The byte after each frame's data, in order of presentation."""
    with av.open(str(path)) as container:
        return [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]


def count_frames(path: Path, *, forward: bool = False) -> int:
    """Images that can be decoded until the file ends or is torn; 0 where it cannot be opened.

    forward: read as from a pipe, without looking at the end first.
    """
    count = 0
    try:
        with path.open("rb") as file, av.open(_Pipe(file) if forward else str(path)) as container:
            for _ in container.decode(video=0):
                count += 1
    except (av.FFmpegError, IndexError):  # torn or no data; no stream
        pass
    return count


def fragment_headers(data: bytes) -> list[range]:
    """Where the `moof` boxes of an MP4 are (ISO/IEC 14496-12, 8.8.4): offsets inside each."""
    found, at = [], 0
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"moof":
            found.append(range(at + 1, at + size))
        at += size
    return found


class _Pipe:
    """A file that can only be read forward."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read


def _steady(path: Path) -> bool:
    with av.open(str(path)) as container:
        ends: dict[int, int] = {}
        for packet in container.demux():
            if not packet.size:
                continue
            if ends.get(packet.stream_index, packet.pts) != packet.pts:
                return False
            ends[packet.stream_index] = packet.pts + packet.duration
    return True


class Track:
    """A soundtrack from an array, in blocks; counts what was pulled."""

    def __init__(self, samples: np.ndarray, rate: int, block: int = 1000) -> None:
        self.samples, self.rate, self.block = samples.astype(np.float32), rate, block
        self.channels = samples.shape[1]
        self.pulled = 0
        self.closed = False

    def blocks(self) -> Iterator[np.ndarray]:
        try:
            for begin in range(0, len(self.samples), self.block):
                block = self.samples[begin : begin + self.block]
                self.pulled += len(block)
                yield block
        finally:
            self.closed = True


def tone(rate: int, channels: int, seconds: float, block: int = 1000) -> Track:
    times = np.arange(round(rate * seconds)) / rate
    return Track(
        np.stack([0.3 * np.sin(2 * np.pi * (200 + 50 * c) * times) for c in range(channels)], 1), rate, block
    )


def moving(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Frames `[count, height, width, 3]` that all differ and do not compress away."""
    image = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.stack([np.roll(image, step, axis=1) for step in range(count)])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond this many bytes, which looks like a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
