"""Small videos whose frames carry their number, written with PyAV in many forms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIDE = 64
_BLOCK = 16  # pixels of one bit; lossy coding leaves such blocks alone


def numbered(number: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """uint8 [height, width, 3] with `number` in sixteen blocks, black and white."""
    bits = [(number >> bit) & 1 for bit in range(16)]
    blocks = np.array(bits, np.uint8).reshape(4, 4) * 255
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    return np.repeat(blocks[rows][:, columns, None], 3, axis=2)


def number_of(frame: np.ndarray) -> int:
    height, width = frame.shape[:2]
    at = [(2 * block + 1) for block in range(4)]
    bits = [frame[height * y // 8, width * x // 8].mean() > 128 for y in at for x in at]
    return sum(int(bit) << place for place, bit in enumerate(bits))


def steady(count: int, rate: Fraction | int) -> list[Fraction]:
    return [Fraction(number) / rate for number in range(count)]


def on_screen(times: Sequence[Fraction], moment: Fraction) -> int:
    """The number of the last frame that came until `moment` after the first."""
    return max(number for number, time in enumerate(times) if time - times[0] <= moment)


def write_video(
    path: Path,
    times: Sequence[Fraction],
    *,
    codec: str = "libx264",
    rate: Fraction | int = 25,
    tick: Fraction = Fraction(1, 90_000),
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    draw: Callable[[int], np.ndarray] = numbered,
    frame_format: str = "rgb24",
    configure: Callable[[av.VideoStream], None] = lambda stream: None,
    audio: Iterable[tuple[np.ndarray, Fraction]] = (),
    audio_codec: str = "aac",
    audio_rate: int = 48_000,
    default_audio: int | None = None,
    container_options: dict[str, str] | None = None,
) -> None:
    """Frame n is shown from times[n] s on. audio: tracks, float32 [n] each with the second of its start."""
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        first = draw(0)
        stream = container.add_stream(codec, rate=Fraction(rate), options=options or {})
        stream.width, stream.height, stream.pix_fmt = first.shape[1], first.shape[0], pix_fmt
        stream.codec_context.time_base = tick
        configure(stream)
        tracks = [container.add_stream(audio_codec, rate=audio_rate, layout="mono") for _ in audio]
        for place, track in enumerate(tracks):
            if default_audio is not None:
                track.disposition = 1 if place == default_audio else 0
        packets = []
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(draw(number), format=frame_format)
            frame.pts, frame.time_base = round(time / tick), tick
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for (samples, start), track in zip(audio, tracks, strict=True):
            frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), "fltp", "mono")
            frame.sample_rate, frame.time_base = audio_rate, Fraction(1, audio_rate)
            frame.pts = round(start * audio_rate)
            wanted = track.codec_context.format.name
            for piece in av.AudioResampler(wanted, "mono", audio_rate).resample(frame):
                packets += track.encode(piece)
            packets += track.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
