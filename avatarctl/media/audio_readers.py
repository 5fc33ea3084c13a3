"""Audio as streams of blocks: one class for each place that samples come from."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import av.audio
import av.container
import av.error
import numpy as np
import soundfile
from av.stream import Disposition

from avatarctl.errors import UnusableAudio
from avatarctl.media.containers import cause_of, open_container
from avatarctl.media.files import file_identity, file_sha256
from avatarctl.media.video_track import first_time, stated_end

__all__ = ["BLOCK_SAMPLES", "ArrayAudio", "Audio", "ContainerAudio", "LibsndfileAudio", "Samples"]

Samples = np.ndarray  # float32; [n, channels] native, [n] once mono

BLOCK_SAMPLES = 32_768
"""Sample frames per block, about; what bounds the memory of everything that reads audio."""

_RATES = range(1_000, 768_001)
_MAX_CHANNELS = 64
_MAX_GAP_SECONDS = 60  # in all; a few forged time stamps must not become hours of silence
_LOOSE = Fraction(1, 25)  # s; recorders' time stamps jitter, filling that would click: one video frame
_LATE = Fraction(1, 10)  # s; less is the delay of an encoder
_MAX_DELAY = 3600  # s of silence in front; a forged time stamp must not become days
_TIGHT = Fraction(1, 500)  # s; after a damaged packet (Matroska counts in ms) and in FLAC (counts samples)


class Audio(ABC):
    """Audio that can be read from the start any number of times, without ever being held whole.

    name:     for messages
    rate:     native samples per second
    channels: native channels
    """

    name: str
    rate: int
    channels: int

    @abstractmethod
    def blocks(self) -> Iterator[Samples]:
        """float32 [n, channels] at the native rate, a few 10 000 samples at a time, from the start."""

    @abstractmethod
    def sha256(self) -> str:
        """Hexadecimal hash of the content, computed once."""

    @property
    def doubts(self) -> tuple[str, ...]:
        """What is odd about the source; complete after one full pass over `blocks`."""
        return ()


def check_format(name: str, rate: int, channels: int) -> None:
    """Raise UnusableAudio for a sample rate or a number of channels that no recording has."""
    if channels < 1 or channels > _MAX_CHANNELS:
        raise UnusableAudio(
            f"invalid header: {channels} channels (1 to {_MAX_CHANNELS} are read)", where=name
        )
    if rate not in _RATES:
        span = f"{_RATES.start} to {_RATES.stop - 1} Hz are read"
        raise UnusableAudio(f"invalid header: a sample rate of {rate} Hz ({span})", where=name)


def cut_short(declared: int, present: int) -> str:
    return f"is cut short: the header declares {declared} samples, {present} are present"


class ArrayAudio(Audio):
    """Samples that are already in memory, float32 [n, channels]; not copied."""

    def __init__(self, samples: Samples, rate: int, name: str) -> None:
        self.name, self.rate, self.channels = name, rate, samples.shape[1]
        check_format(name, rate, self.channels)
        self._samples = samples
        self._sha256: str | None = None

    def blocks(self) -> Iterator[Samples]:
        for start in range(0, len(self._samples), BLOCK_SAMPLES):
            yield self._samples[start : start + BLOCK_SAMPLES]

    def sha256(self) -> str:
        if self._sha256 is None:
            digest = hashlib.sha256(f"{self.rate} {self._samples.shape} float32 ".encode())
            for block in self.blocks():
                digest.update(np.ascontiguousarray(block, dtype="<f4").tobytes())
            self._sha256 = digest.hexdigest()
        return self._sha256


class _FileAudio(Audio):
    """What audio from files shares: the path, its hash, and doubts of the latest pass."""

    def __init__(self, path: Path, doubts: tuple[str, ...]) -> None:
        self.name = str(path)
        self._path = path
        self._sha256: str | None = None
        self._identity = file_identity(path, UnusableAudio)
        self._known = self._doubts = doubts

    def sha256(self) -> str:
        self._check_unchanged()
        if self._sha256 is None:
            self._sha256 = file_sha256(self._path)
        return self._sha256

    @property
    def doubts(self) -> tuple[str, ...]:
        return self._doubts

    def _check_unchanged(self) -> None:
        """Audio is read more than once: another file under its name would be played with the first
        one's length and level."""
        if file_identity(self._path, UnusableAudio) != self._identity:
            raise UnusableAudio("changed while it was in use", where=self.name)


class LibsndfileAudio(_FileAudio):
    """What libsndfile reads: WAV, RF64, W64, AIFF, CAF, Ogg Vorbis and Opus.

    declared: sample frames that the header promises, None when unknown
    doubts:   known before the first pass, kept in front of what a pass finds
    Raises soundfile.LibsndfileError when libsndfile cannot open it.
    """

    def __init__(self, path: Path, declared: int | None, doubts: tuple[str, ...] = ()) -> None:
        super().__init__(path, doubts)
        with self._open() as handle:
            self.rate, self.channels = handle.samplerate, handle.channels
        check_format(self.name, self.rate, self.channels)
        self._declared = declared

    def blocks(self) -> Iterator[Samples]:
        self._check_unchanged()
        present = 0
        with self._open() as handle:
            while len(block := self._read(handle, present)):
                present += len(block)
                yield block
        if self._declared is not None and present < self._declared:
            self._doubts = (*self._known, cut_short(self._declared, present))

    def _open(self) -> soundfile.SoundFile:
        # By descriptor: given a name, soundfile would judge by the extension ("x.raw") as well.
        return soundfile.SoundFile(os.open(self._path, os.O_RDONLY | os.O_CLOEXEC), closefd=True)

    def _read(self, handle: soundfile.SoundFile, present: int) -> Samples:
        try:
            block: Samples = handle.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            at = present / self.rate
            raise UnusableAudio(f"damaged after {at:.2f} s: {error.error_string}", where=self.name) from error
        return block


class ContainerAudio(_FileAudio):
    """An audio track of anything that FFmpeg reads: MP3, AAC, FLAC, MP4, MKV, WebM ...

    Of several tracks it is the default one, or the first, that can be decoded; a doubt names it. Beside a
    video the audio begins with the first frame that is shown: what starts later is padded with silence,
    what starts earlier is cut. On its own it begins with its first sample.

    Encoder delay that the file declares (LAME tag, Opus pre-skip, edit list) is removed by FFmpeg; up to
    one codec frame of padding at the end may stay. A packet that cannot be decoded, or a jump of the
    time stamps, becomes silence of the same length and a doubt, so that what follows stays in step with
    the video.

    doubts: known before the first pass, kept in front of what a pass finds.
    Raises UnusableAudio when there is no audio stream or nothing in it can be decoded.
    """

    def __init__(self, path: Path, doubts: tuple[str, ...] = ()) -> None:
        super().__init__(path, doubts)
        self._track, first, note = self._find_track()
        # From a decoded frame: headers of HE-AAC name half the rate that comes out.
        self.rate, self.channels = first.sample_rate, len(first.layout.channels)
        check_format(self.name, self.rate, self.channels)
        start = (first.pts or 0) * (first.time_base or Fraction(0))
        zero = first_time(path)
        late = Fraction(0) if zero is None else start - zero
        if late > _MAX_DELAY:
            raise UnusableAudio(f"its audio starts {float(late):.0f} s after its video", where=path)
        self._lead = round(late * self.rate)
        with open_container(path, UnusableAudio, "an audio file") as container:
            self._declared = self._declared_samples(container, start)
        self._known = self._doubts = (*self._known, *note, *_offset(start, None if zero is None else late))

    def _find_track(self) -> tuple[int, av.audio.AudioFrame, tuple[str, ...]]:
        """The position among the audio tracks of the one to read, its first frame, and what to say."""
        with open_container(self._path, UnusableAudio, "an audio file") as container:
            tracks = list(container.streams.audio)
        if not tracks:
            raise UnusableAudio("no audio stream in it", where=self.name)
        order = sorted(range(len(tracks)), key=lambda at: not tracks[at].disposition & Disposition.default)
        refused = None
        for at in order:
            try:
                with open_container(self._path, UnusableAudio, "an audio file") as container:
                    first = next(_Decoding(container, at, self.name).frames(), None)
                    what = _describe(container.streams.audio[at])
            except UnusableAudio as error:
                refused = refused or error
                continue
            if first is not None:
                note = f"has {len(tracks)} audio tracks; number {at + 1} ({what}) is used"
                passed = order[: order.index(at)]
                if passed:
                    note += f", as number {_listed(passed)} cannot be decoded"
                return at, first, (note,) if len(tracks) > 1 else ()
        raise refused or UnusableAudio(
            "no samples can be decoded: invalid or empty audio stream", where=self.name
        )

    def blocks(self) -> Iterator[Samples]:
        self._check_unchanged()
        with open_container(self._path, UnusableAudio, "an audio file") as container:
            decoding = _Decoding(container, self._track, self.name)
            pending: list[Samples] = []
            present = waiting = 0
            for piece in _shifted(self._pieces(decoding), self._lead, self.channels):
                pending.append(piece)
                waiting += len(piece)
                present += len(piece)
                if waiting >= BLOCK_SAMPLES:
                    yield np.concatenate(pending)
                    pending, waiting = [], 0
            if pending:
                yield np.concatenate(pending)
        found = decoding.doubts()
        declared = None if self._declared is None else max(0, self._declared + self._lead)
        # Decoders may keep the last frame's padding or drop it: a codec frame is no cut.
        if declared is not None and present < declared - max(2048, self.rate // 20):
            found = (*found, cut_short(declared, present))
        self._doubts = (*self._known, *found)

    def _pieces(self, decoding: _Decoding) -> Iterator[Samples]:
        """Decoded frames as float32 [n, channels], with silence where the time stamps leave a gap."""
        count, origin = 0, None
        for frame in decoding.frames():
            if (frame.sample_rate, len(frame.layout.channels)) != (self.rate, self.channels):
                now = f"{frame.sample_rate} Hz, {len(frame.layout.channels)} channels"
                raise UnusableAudio(
                    f"the audio changes its format after {count / self.rate:.2f} s (now {now})",
                    where=self.name,
                    fix="convert it to WAV first",
                )
            if frame.pts is not None and frame.time_base is not None:
                time = frame.pts * frame.time_base
                origin = time if origin is None else origin
                gap = time - origin - Fraction(count, self.rate)
                for silence in decoding.fill(gap, Fraction(count, self.rate), self.rate, self.channels):
                    count += len(silence)
                    yield silence
            count += frame.samples
            yield _to_float(frame)

    def _declared_samples(self, container: av.container.InputContainer, start: Fraction) -> int | None:
        """Sample frames that the header promises, where headers are exact: FLAC, MP4 and Matroska.

        start: of the first sample, s. Matroska's tag holds the end of the stream, not its length.
        """
        stream = container.streams.audio[self._track]
        if (end := stated_end(stream.metadata)) is not None:
            seconds = end - start
        elif {"flac", "mov"} & set(container.format.name.split(",")) and stream.duration and stream.time_base:
            seconds = stream.duration * stream.time_base
        else:
            return None
        return round(seconds * self.rate)


class _Decoding:
    """One pass of FFmpeg over one of the audio tracks, with an account of what went wrong."""

    def __init__(self, container: av.container.InputContainer, track: int, name: str) -> None:
        self._container, self._name = container, name
        self._good = self._damaged = 0
        self._just_damaged = False
        self._counts_samples = container.format.name == "flac"
        self._stopped: str | None = None
        self._silence = Fraction(0)
        self._stream = container.streams.audio[track]
        if self._stream.codec_context is None:
            raise UnusableAudio("unsupported format: its audio has a codec that cannot be read", where=name)

    def frames(self) -> Iterator[av.audio.AudioFrame]:
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as error:
                self._stopped = cause_of(error)
                return
            if packet is None:
                break
            try:
                frames = packet.decode()
            except av.error.FFmpegError:  # each decoder has its own codes for damage
                self._damaged += 1
                self._just_damaged = True
                continue
            self._good += len(frames)
            yield from (frame for frame in frames if isinstance(frame, av.AudioFrame))
        if self._damaged > self._good:
            raise UnusableAudio(
                f"damaged: {self._damaged} of {self._damaged + self._good} packets cannot be decoded",
                where=self._name,
            )

    def fill(self, gap: Fraction, at: Fraction, rate: int, channels: int) -> Iterator[Samples]:
        """Zeros for a gap of the time stamps in front of a frame; nothing for jitter."""
        slack = _TIGHT if self._just_damaged or self._counts_samples else _LOOSE
        self._just_damaged = False
        if gap <= slack:
            return
        self._silence += gap
        if self._silence > _MAX_GAP_SECONDS:
            raise UnusableAudio(
                f"its time stamps leave gaps of {float(self._silence):.0f} s up to {float(at):.2f} s",
                where=self._name,
                fix="convert it to WAV first",
            )
        missing = round(gap * rate)
        for start in range(0, missing, BLOCK_SAMPLES):
            yield np.zeros((min(BLOCK_SAMPLES, missing - start), channels), np.float32)

    def doubts(self) -> tuple[str, ...]:
        found = []
        if self._damaged:
            found.append(f"is damaged: {self._damaged} packets cannot be decoded")
        if self._silence:
            found.append(f"has gaps of {float(self._silence):.2f} s in all, filled with silence")
        if self._stopped is not None:
            found.append(f"cannot be read to its end: {self._stopped}")
        return tuple(found)


def _shifted(pieces: Iterator[Samples], lead: int, channels: int) -> Iterator[Samples]:
    """`lead` samples of silence and then the pieces; where it is negative, the pieces without so many."""
    for start in range(0, lead, BLOCK_SAMPLES):
        yield np.zeros((min(BLOCK_SAMPLES, lead - start), channels), np.float32)
    early = max(0, -lead)
    for piece in pieces:
        if early < len(piece):
            yield piece[early:]
        early = max(0, early - len(piece))


def _offset(start: Fraction, late: Fraction | None) -> Iterator[str]:
    """What to say of audio that does not begin with its container (`late` None) or its video."""
    if late is None:
        if start > _LATE:
            yield f"starts {float(start):.2f} s late in its container; the delay is left out"
    elif late > _LATE:
        yield f"starts {float(late):.2f} s after the video; silence is put in front"
    elif late < -_LATE:
        yield f"starts {float(-late):.2f} s before the video; so much of it is cut"


def _describe(stream: av.audio.AudioStream) -> str:
    language = stream.language if stream.language not in (None, "und") else None
    return ", ".join(str(part) for part in (stream.codec_context.name, language) if part)


def _listed(positions: list[int]) -> str:
    return ", ".join(str(at + 1) for at in sorted(positions))


# PyAV 18 reads past the planes of planar frames with eight channels and crashes; packed ones are safe.
_SAFE_PLANES = 7


def _to_float(frame: av.audio.AudioFrame) -> Samples:
    """float32 [n, channels] with integers scaled to [-1, 1); floats keep what exceeds it."""
    if frame.format.is_planar and frame.layout.nb_channels > _SAFE_PLANES:
        (frame,) = av.AudioResampler(format=frame.format.packed.name).resample(frame)
    planes = frame.to_ndarray()
    samples = planes.T if frame.format.is_planar else planes.reshape(frame.samples, -1)
    kind = samples.dtype
    result: Samples = np.ascontiguousarray(samples, dtype=np.float32)
    if kind.kind == "u":
        return (result - np.float32(128)) / np.float32(128)
    if kind.kind == "i":
        return result * np.float32(2.0 ** (1 - 8 * kind.itemsize))
    return result
