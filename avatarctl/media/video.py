"""Video out: an MP4 (H.264 + AAC) that can be played while it grows, and is an ordinary one at the end.

While it grows the file is a fragmented MP4, a third of a second per fragment, so that a reader, a
crash or a full disk finds every frame whose bytes are there. A reader that goes forward (a pipe, or
FFmpeg's `-fflags +ignidx`) finds them before a cut at any byte. FFmpeg given a path looks at all
fragment headers first and refuses a file that ends inside one (about 1 % of all cuts at 64x64, 2 %
with a fragment per frame); this writer never leaves such a file: a fragment is one system call, and
what a full disk tore is cut off. Once complete, it becomes an ordinary MP4 (`finish.py`).

Settings that matter, each found by measuring:

- `delay_moov`: the header waits for the first audio packet and can then say how many samples of
  AAC priming to skip. With `empty_moov` it cannot, and all audio is 64 ms late at 16 kHz.
- `frag_duration`, not `frag_every_frame`: the latter gives a packet the time of its
  successor whenever two packets of one stream wait in the interleaving queue, which moves audio
  by a packet and repeats or loses a frame's time stamp.
- `max_interleave_delta` 1 µs: packets arrive here in order, and a soundtrack that ends early must
  not make the muxer hold back ten seconds of frames.
- x264 with 5 frames of lookahead, no B-frames and slices instead of frame threads: all but the
  newest `LATENCY_FRAMES` frames are on the disk. No lookahead at all (`zerolatency`) would save
  these few frames for files 1.3 to 5 times as large; presentation order equals file order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from avatarctl.atomic import disk_errors
from avatarctl.errors import WriteFailed
from avatarctl.media.audio_feed import AudioBlocks, AudioFeed
from avatarctl.media.bt709 import state_colours, to_yuv
from avatarctl.media.finish import copy_packets
from avatarctl.media.growing_file import GrowingFile, check_video_name
from avatarctl.media.x264 import repeatable

__all__ = ["LATENCY_FRAMES", "AudioBlocks", "VideoWriter"]

_FRAGMENT_FRAMES = 8
LATENCY_FRAMES = 16
"""At most this many of the newest frames given to `VideoWriter.write` are not on the disk yet."""

_LOOKAHEAD_FRAMES = 5
# More than a fragment: it reaches the file in one system call, which a signal does not split.
_BUFFER_BYTES = 1 << 20


class VideoWriter:
    """Writes frames and a soundtrack to `NAME.partial.mp4`, which `finish` makes an ordinary `NAME.mp4`.

    path:       the final name; must end in `.mp4`
    width, height: of the frames that `write` gets, in pixels. H.264 with 4:2:0 colour needs even
                sizes: an odd last column or row is repeated, nothing is rescaled
    fps:        frames per second, exact
    soundtrack: pulled block by block as frames arrive, never further than one block ahead; cut
                where the video ends. None or an empty one: a file without audio
    crf:        x264's constant rate factor, 0 (lossless) to 51
    metadata:   MP4 tags (title, artist, comment, description, ...)

    As a context manager it finishes at the end of the block and abandons after an exception.
    Memory does not grow with the length of the video, but for the index of fragments that the
    muxer keeps (some 10 bytes per packet) and the tables that `finish` makes (see `copy_packets`).

    Raises (on construction):
        OutputRefused: the final name exists and `overwrite` is false, another living process
            writes the same file, or the folder cannot be written.
        WriteFailed: the disk is full.
    """

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        fps: int | Fraction = 25,
        soundtrack: AudioBlocks | None,
        crf: float = 18,
        overwrite: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._ended = True  # until there is something to end
        if width < 1 or height < 1:
            raise ValueError(f"frames of {width}x{height} pixels")
        check_video_name(path)
        self.frames_written = 0
        self._width, self._height, self._fps = width, height, Fraction(fps)
        audio = AudioFeed(soundtrack) if soundtrack is not None else None
        self._empty_soundtrack = audio is not None and audio.at_end()
        self._audio = None if self._empty_soundtrack else audio
        self._audio_samples = 0
        self._stays_fragmented: str | None = None
        self._file = GrowingFile(path, overwrite=overwrite)
        try:
            self._open(crf, metadata or {})
        except BaseException:
            self._file.discard()
            raise
        self._ended = False

    def _open(self, crf: float, metadata: Mapping[str, str]) -> None:
        self._container = av.open(
            self._file,
            "w",
            format="mp4",
            buffer_size=_BUFFER_BYTES,
            container_options={
                "movflags": "delay_moov+default_base_moof",
                "frag_duration": str(int(1_000_000 * _FRAGMENT_FRAMES / self._fps)),
                "flush_packets": "1",
                "max_interleave_delta": "1",
            },
        )
        self._container.metadata.update(metadata)
        self._image = self._container.add_stream(
            "libx264",
            rate=self._fps,
            options={
                "preset": "medium",
                "crf": f"{crf:g}",
                "bf": "0",
                "rc-lookahead": str(_LOOKAHEAD_FRAMES),
                "threads": "4",  # fixed: the number of slices changes the bytes
                "x264-params": repeatable("sync-lookahead=0:sliced-threads=1"),
            },
        )
        context = self._image.codec_context
        context.width = self._width + self._width % 2
        context.height = self._height + self._height % 2
        context.pix_fmt = "yuv420p"
        context.time_base = 1 / self._fps
        context.gop_size = max(1, round(2 * self._fps))  # a seek decodes two seconds at most
        state_colours(context)
        self._convert = VideoReformatter()
        if self._audio is not None:
            self._audio_stream = self._container.add_stream(
                "aac",
                rate=self._audio.rate,
                layout=self._audio.layout,
                bit_rate=self._audio.channels * min(4 * self._audio.rate, 96_000),
            )
            self._audio_stream.codec_context.time_base = Fraction(1, self._audio.rate)

    @property
    def partial_path(self) -> Path:
        """Where the file grows; playable after the first `LATENCY_FRAMES` frames."""
        return self._file.path

    @property
    def notices(self) -> tuple[str, ...]:
        """What is other than asked for, one line each; may grow until `finish` has returned."""
        lines = [] if self._audio is None else self._audio.notices
        if self._empty_soundtrack:
            lines = ["the soundtrack is empty: the video has no audio"]
        return (*lines, *([self._stays_fragmented] if self._stays_fragmented else []))

    def write(self, frames: npt.NDArray[np.uint8]) -> None:
        """Appends frames, uint8 RGB `[n, height, width, 3]`, and the audio that belongs to them.

        Raises:
            ValueError: another shape or type, or the writer has ended.
            WriteFailed: the disk is full; `abandon` then keeps what is playable.
        """
        if self._ended:
            raise ValueError(f"{self._file.final}: the video has ended, no more frames can be written")
        expected = (self._height, self._width, 3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != expected:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, expected uint8 [n, *{expected}]")
        with self._disk():
            for frame in frames:
                self._write_audio(until_frame=self.frames_written + 1)
                self._write_frame(frame)

    def finish(self) -> Path:
        """Writes what the encoders hold, makes an ordinary MP4 of it all, renames; returns the final path.

        Where the disk has no room for the file once more, it stays fragmented, and `notices` says so.

        Raises:
            ValueError: no frame was written, or the writer has ended.
            WriteFailed, OutputRefused: the partial file stays until `abandon` decides.
        """
        if self._ended:
            raise ValueError(f"{self._file.final}: the video has ended already")
        if not self.frames_written:
            raise ValueError(f"{self._file.final}: no frame was written")
        with self._disk():
            self._drain()
            self._container.close()
        self._make_ordinary()
        final = self._file.commit()
        self._end()
        return final

    def _make_ordinary(self) -> None:
        try:
            with self._file.replaced() as ordinary:
                copy_packets(self._file.path, ordinary)
        except WriteFailed as error:
            self._stays_fragmented = (
                f"{self._file.final.name} plays but stays fragmented: it could not be written once more, "
                f"as an ordinary MP4 ({error.what}); some programs take its audio a moment late"
            )

    def abandon(self) -> Path | None:
        """Closes the unfinished file and returns its path if it can be played, else removes it.

        Does nothing and returns None after `finish`, `abandon` or a failed construction.
        """
        if self._ended:
            return None
        self._end()
        # Called after another failure, which is the one to tell: the file is judged by reading it.
        with contextlib.suppress(OSError, av.FFmpegError):
            if self.frames_written and not self._file.closed:
                self._drain()
            self._container.close()
        self._file.trim()
        if self.frames_written and _has_a_frame(self._file.path):
            self._file.keep()
            return self._file.path
        self._file.discard()
        return None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ended:
            return
        try:
            if kind is None:
                self.finish()
        finally:
            self.abandon()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.abandon()

    def _write_frame(self, rgb: npt.NDArray[np.uint8]) -> None:
        odd_rows, odd_columns = self._height % 2, self._width % 2
        if odd_rows or odd_columns:
            rgb = np.pad(rgb, ((0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
        frame = to_yuv(self._convert, rgb, "yuv420p")
        frame.pts, frame.time_base = self.frames_written, 1 / self._fps
        packets = self._image.encode(frame)
        self.frames_written += 1
        self._mux_frames(packets)

    def _mux_frames(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            packet.duration = 1  # in frames; a fragment ends with it before the next one is known
            self._mux(packet)

    def _write_audio(self, *, until_frame: int) -> None:
        """Encodes audio up to the beginning of frame `until_frame`, in whole samples, rounded up."""
        if self._audio is None:
            return
        until = -(-until_frame * self._audio.rate // self._fps)
        samples = self._audio.read(until - self._audio_samples)
        if not len(samples):
            return
        # Packed, [1, n * channels]: PyAV 18 miscounts the planes of eight-channel planar frames.
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="flt", layout=self._audio.layout)
        frame.sample_rate, frame.time_base = self._audio.rate, Fraction(1, self._audio.rate)
        frame.pts = self._audio_samples
        self._audio_samples += len(samples)
        for packet in self._audio_stream.encode(frame):
            self._mux(packet)

    def _mux(self, packet: av.Packet) -> None:
        self._container.mux(packet)
        if self._file.error is not None:
            raise self._file.error
        self._file.checkpoint()

    def _drain(self) -> None:
        if self._audio is not None:
            for packet in self._audio_stream.encode(None):
                self._mux(packet)
        self._mux_frames(self._image.encode(None))

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """What the disk said to `GrowingFile` outranks what the muxer made of it."""
        with disk_errors(self._file.path):
            try:
                yield
            except OSError:
                if self._file.error is None:
                    raise
            if self._file.error is not None:
                raise self._file.error

    def _end(self) -> None:
        self._ended = True
        if self._audio is not None:
            self._audio.close()


def _has_a_frame(path: Path) -> bool:
    """Whether a player would show anything."""
    try:
        with av.open(str(path)) as container:
            return next(container.decode(video=0), None) is not None
    except (av.FFmpegError, IndexError):  # no or torn data; no stream
        return False
