"""The video track of a container in time: what is on the screen when, and how far it reaches.

Times are whole ticks of the track's time base, as the container states them after its edit lists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.codec
import av.container
import av.error
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from avatarctl.errors import UnusableVideo
from avatarctl.media.containers import cause_of, open_container
from avatarctl.media.files import file_identity

__all__ = ["Extent", "Playback", "first_time", "is_cover", "measure", "stated_end", "video_stream"]

_WANTED = "a video"
_BACK = (0, 2, 8, 32)  # s before the wanted time, where a first seek lands too late
_FAR = 3  # s; decoding on is cheaper than a seek up to here
_JUMP = 1  # s that the decoding times may step back; more is another recording glued on
_CUT = 1  # s that a track may end before what its tag says
_LONGEST = 100 * 3600  # s; more is a forged or broken time stamp
_THREADS = min(4, os.cpu_count() or 1)
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders leave alpha out


def video_stream(container: av.container.InputContainer) -> VideoStream | None:
    """The track that players show: the default one that has a decoder, else the first that has one.

    Cover art is none. Where no track has a decoder, the first is given, without a codec context.
    """
    tracks = [track for track in container.streams.video if not is_cover(track)]
    tracks.sort(key=lambda track: (track.codec_context is None, not track.disposition & Disposition.default))
    return tracks[0] if tracks else None


def is_cover(track: VideoStream) -> bool:
    """Whether it is the cover art of an audio file: one image, no video."""
    return bool(track.disposition & Disposition.attached_pic)


def first_time(path: Path) -> Fraction | None:
    """Seconds of the first frame that is shown; None where there is no video."""
    with open_container(path, UnusableVideo, _WANTED) as container:
        stream = video_stream(container)
        if stream is None:
            return None
        stated = None if stream.start_time is None else stream.start_time * _ticks(stream)
        if stream.codec_context is None:
            return stated
    try:
        with Playback(path) as playback:
            return playback.zero * playback.tick
    except UnusableVideo:  # the audio beside a video that cannot be read is audio all the same
        return stated


def _ticks(stream: VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, 1)


@dataclass(frozen=True)
class Extent:
    """What the packets of a video track state, found without decoding.

    end:    the tick at which the last frame leaves the screen
    doubts: what a person should read, without the file's name
    """

    end: int
    doubts: tuple[str, ...]


def measure(path: Path, zero: int) -> Extent:
    """Reads every packet of the track once, in constant memory; `zero` is the tick of its first frame.

    Raises UnusableVideo for time stamps that jump back, or reach further than any recording.
    """
    with open_container(path, UnusableVideo, _WANTED) as container:
        stream = video_stream(container)
        if stream is None:
            raise UnusableVideo("no video stream in it", where=path)
        tick = _ticks(stream)
        rate = stream.average_rate or 25
        scan = _Scan(path, tick, round(1 / (rate * tick)))
        stopped = None
        try:
            for packet in container.demux(stream):
                if packet.size:
                    scan.add(packet)
        except av.error.FFmpegError as error:
            stopped = cause_of(error)
        end = max(scan.end, zero + 1)
        seconds = (end - zero) * tick
        if seconds > _LONGEST:
            text = f"its time stamps reach over {float(seconds / 3600):.0f} hours"
            raise UnusableVideo(text, where=path, fix="convert it first")
        return Extent(end, tuple(_doubts(stream, scan, end * tick, stopped)))


class _Scan:
    """Adds up packets; B-frames leave in another order than they are shown in."""

    def __init__(self, path: Path, tick: Fraction, usual: int) -> None:
        self._path, self._tick, self._usual = path, tick, max(1, usual)
        self._last: int | None = None
        self._before: int | None = None
        self._duration = 0
        self._decoded_until: int | None = None
        self.whole = self.damaged = 0

    def add(self, packet: av.Packet) -> None:
        if packet.is_corrupt:
            self.damaged += 1
            return
        self.whole += 1
        self._check_order(packet.dts)
        time = packet.dts if packet.pts is None else packet.pts
        if packet.is_discard or time is None:
            return
        if self._last is None or time > self._last:
            self._before, self._last, self._duration = self._last, time, packet.duration or 0
        elif self._before is None or time > self._before:
            self._before = time

    def _check_order(self, dts: int | None) -> None:
        if dts is None:
            return
        back = 0 if self._decoded_until is None else (self._decoded_until - dts) * self._tick
        if back > _JUMP:
            raise UnusableVideo(
                f"its time stamps jump back by {float(back):.1f} s at {float(dts * self._tick):.2f} s",
                where=self._path,
                fix="several recordings in one file? convert it, as in ffmpeg -i IN -c:v libx264 OUT.mp4",
            )
        self._decoded_until = dts

    @property
    def end(self) -> int:
        if self._last is None:
            return 0
        gap = self._usual if self._before is None else self._last - self._before
        return self._last + (self._duration or gap)


def _doubts(stream: VideoStream, scan: _Scan, end: Fraction, stopped: str | None) -> Iterator[str]:
    if scan.damaged or stopped is not None:
        declared = f" of {stream.frames} frames" if stream.frames > scan.whole else " frames"
        why = "" if stopped is None else f" ({stopped})"
        yield f"is cut short or damaged: {scan.whole}{declared} can be read{why}"
        return
    stated = stated_end(stream.metadata)  # Matroska simply ends where it was cut
    if stated is not None and end < stated - _CUT:
        yield f"is cut short: its header declares an end at {float(stated):.2f} s, not {float(end):.2f} s"


def stated_end(metadata: dict[str, str]) -> Fraction | None:
    """Seconds at which a Matroska track ends by its tag; None where none is stated."""
    tag = re.fullmatch(r"(\d\d):(\d\d):(\d\d\.\d{1,9})", metadata.get("DURATION", "").strip())
    return None if tag is None else int(tag[1]) * 3600 + int(tag[2]) * 60 + Fraction(tag[3])


class Playback:
    """One track, decoded forward; holds the frame on the screen and the one that follows it.

    path:     the file, opened again for a start over
    zero:     the tick of the first frame that is shown
    tick:     seconds
    first:    that frame, for its size and format
    container, stream: open as long as the playback
    Raises UnusableVideo where nothing can be decoded.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = file_identity(path, UnusableVideo)
        self.container: av.container.InputContainer | None = None
        self._frames: Iterator[VideoFrame] = iter(())
        self._shown: VideoFrame | None = None
        self._next: VideoFrame | None = None
        try:
            self._start_over()
            if self._shown is None:
                raise UnusableVideo("no frames can be decoded: an empty or damaged video stream", where=path)
        except BaseException:
            self.close()
            raise
        self.first: VideoFrame = self._shown
        self.zero: int = _time(self.first)

    def check_unchanged(self) -> None:
        """Raises UnusableVideo when the file is another one than at the start."""
        if file_identity(self._path, UnusableVideo) != self._identity:
            raise UnusableVideo("changed while it was in use", where=self._path)

    def close(self) -> None:
        container, self.container = self.container, None
        self._frames = iter(())
        self._shown = self._next = None
        if container is not None:
            container.close()

    def __enter__(self) -> Playback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def at(self, tick: int) -> VideoFrame:
        """The frame on the screen at `tick`, which is `zero` at least: the last that came until then.

        The same bytes whatever was shown before. Raises UnusableVideo for damage on the way.
        """
        if self.container is None:
            raise ValueError(f"{self._path}: the video is closed")
        far = self._next is not None and _time(self._next) + _FAR / self.tick < tick
        if self._shown is None or tick < _time(self._shown) or far:
            self._go_to(tick)
        while self._next is not None and _time(self._next) <= tick:
            self._shown, self._next = self._next, None
            self._next = self._following(self._shown)
        assert self._shown is not None
        return self._shown

    def _go_to(self, tick: int) -> None:
        """Decodes from a key frame at or before `tick`; from the start where none can be found."""
        for back in () if self._untimed else _BACK:
            target = tick - round(back / self.tick)
            if target <= self.zero:
                break
            if self._lands(target, tick):
                return
        self._start_over()

    def _lands(self, target: int, tick: int) -> bool:
        assert self.container is not None
        try:
            self.container.seek(target, stream=self.stream)
            self._flush()
            self._frames = self._decoded(sought=True)
            self._shown = next(self._frames, None)
            if self._shown is None or _time(self._shown) > tick:
                return False
            self._next = self._following(self._shown)
        except (av.error.FFmpegError, UnusableVideo):
            return False  # read from the start, it says by itself what is wrong
        return True

    def _start_over(self) -> None:
        self.close()
        self.check_unchanged()
        self.container = open_container(self._path, UnusableVideo, _WANTED)
        stream = video_stream(self.container)
        if stream is None:
            raise UnusableVideo("no video stream in it", where=self._path)
        if stream.codec_context is None:
            raise UnusableVideo(
                "unsupported format: its video has a codec that cannot be read", where=self._path
            )
        self.stream, self.tick = stream, _ticks(stream)
        self._untimed = _is_untimed(self.container, stream)
        stream.thread_type, stream.thread_count = "AUTO", _THREADS
        self._own_decoder = _alpha_decoder(stream)
        self._frames = self._decoded(sought=False)
        self._shown = next(self._frames, None)
        self._next = None if self._shown is None else self._following(self._shown)

    def _flush(self) -> None:
        if self._own_decoder is not None:
            self._own_decoder.flush_buffers()

    def _following(self, shown: VideoFrame) -> VideoFrame | None:
        """The next frame that is later than `shown`; one that goes back in time is never on the screen."""
        for frame in self._frames:
            if _time(frame) > _time(shown):
                return frame
        return None

    def _decoded(self, *, sought: bool) -> Iterator[VideoFrame]:
        """Frames in the order in which they are shown.

        After a seek they begin with a key frame: what comes before it may refer to frames that were not
        read. Until the first frame, packets that cannot be decoded are passed over: a recording of a
        broadcast begins anywhere.
        """
        damage: str | None = None
        key: int | None = None
        latest: int | None = None
        assert self.container is not None
        packets = self.container.demux(self.stream)
        while (packet := _next_packet(packets)) is not None:
            if packet.is_corrupt and packet.size:
                continue
            if key is None and packet.is_keyframe:
                key = packet.pts
            try:
                frames: list[Any] = self._decode(packet)
            except av.error.FFmpegError as error:
                damage = cause_of(error)
                if latest is not None:
                    text = f"damaged at about {float(latest * self.tick):.2f} s: {damage}"
                    raise UnusableVideo(text, where=self._path) from error
                continue
            for frame in frames:
                # libvpx names no key frames; one packet is one frame there.
                starts = frame.key_frame or (self._own_decoder is not None and frame.pts == key)
                if self._untimed and latest is not None:
                    frame.pts = self._counted(frame.pts, latest + (frame.duration or 1))
                if frame.pts is None or (sought and latest is None and not starts):
                    continue
                latest = frame.pts
                yield frame
        if latest is None and damage is not None and not sought:
            raise UnusableVideo(f"no frames can be decoded: {damage}", where=self._path)

    def _counted(self, stated: int | None, following: int) -> int:
        assert self.container is not None
        if self.container.format.name == "avi" or stated is None:
            return following
        return max(stated, following)

    def _decode(self, packet: av.Packet) -> list[Any]:
        if self._own_decoder is None:
            return list(packet.decode())
        return list(self._own_decoder.decode(packet if packet.size else None))


def _next_packet(packets: Iterator[av.Packet]) -> av.Packet | None:
    try:
        return next(packets, None)
    except av.error.FFmpegError:  # `measure` has said that the file ends here
        return None


def _is_untimed(container: av.container.InputContainer, stream: VideoStream) -> bool:
    """Whether the times of frames are guesses of the demuxer: AVI has none, which shows with B-frames of
    H.264 and HEVC, and MPEG program streams state one for several small frames. There frames
    follow each other by their durations, and everything is decoded from the start."""
    context = stream.codec_context
    reordered = context.name in ("h264", "hevc") and context.has_b_frames
    return container.format.name == "mpeg" or (container.format.name == "avi" and bool(reordered))


def _alpha_decoder(stream: VideoStream) -> Any:
    """A decoder that reads the transparency of a WebM; None where the stream's own does."""
    name = _WITH_ALPHA.get(stream.codec_context.name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        return None
    try:
        return av.codec.CodecContext.create(name, "r")
    except (av.error.FFmpegError, ValueError):  # a build without libvpx
        return None


def _time(frame: VideoFrame) -> int:
    assert frame.pts is not None  # others are not passed on
    return frame.pts
