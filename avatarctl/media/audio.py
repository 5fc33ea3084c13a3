"""Opening and writing audio: one entry point for every format, by content and never by extension."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import soundfile

from avatarctl.errors import AvatarctlError, OutputRefused, UnusableAudio, WriteFailed
from avatarctl.media.audio_header import ogg_is_complete, read_header
from avatarctl.media.audio_readers import (
    ArrayAudio,
    Audio,
    ContainerAudio,
    LibsndfileAudio,
    Samples,
    check_format,
)
from avatarctl.media.containers import open_container
from avatarctl.media.files import check_regular_file

__all__ = [
    "Audio",
    "audio_from_array",
    "comment_of",
    "frames_of",
    "open_audio",
    "stated_seconds",
    "write_audio",
]

_W64_MAGIC = b"riff\x2e\x91\xcf\x11"
_OGG_MAGIC = b"OggS"
_LIBSNDFILE_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"caff", _OGG_MAGIC, _W64_MAGIC)
_WRITTEN_FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG"}
_WRITE_BLOCK = 16_384  # libsndfile's Vorbis encoder puts a whole call's samples on the stack


def open_audio(path: str | Path) -> Audio:
    """The audio of a file: WAV, AIFF, CAF, W64 and Ogg through libsndfile, everything else through FFmpeg.

    Each reads what it reads better: libsndfile cuts Ogg to the sample, FFmpeg knows FLAC of unknown
    length and gets over damage. From a file with video it is the first audio stream. Only the
    header and a first block are read; damage further in comes to light while reading.

    Raises PathNotFound when nothing is there, UnusableAudio when it is not audio that can be read.
    """
    checked = check_regular_file(path, UnusableAudio)
    with checked.open("rb") as handle:
        start = handle.read(len(_W64_MAGIC))
    if not start.startswith(_LIBSNDFILE_MAGIC):
        return ContainerAudio(checked)
    if start.startswith(_OGG_MAGIC):
        cut = not ogg_is_complete(checked)
        return _open_libsndfile(checked, None, ("is cut short: its last page is missing",) if cut else ())
    header = read_header(checked)
    if header is None:
        return _open_libsndfile(checked, None, ())
    check_format(str(checked), header.rate, header.channels)
    if header.size_left_at_zero:
        note = "has a header that says 0 samples (an interrupted recording?); what follows it is used"
        return ContainerAudio(checked, (note,))
    return _open_libsndfile(checked, header.declared, header.doubts)


def _open_libsndfile(path: Path, declared: int | None, doubts: tuple[str, ...]) -> Audio:
    try:
        return LibsndfileAudio(path, declared, doubts)
    except soundfile.LibsndfileError as libsndfile_error:
        try:  # the same containers carry codecs that only FFmpeg knows, such as AAC in CAF
            return ContainerAudio(path, doubts)
        except UnusableAudio as error:
            cause = libsndfile_error.error_string.strip().rstrip(".").lower()
            raise UnusableAudio(f"not an audio file that can be read: {cause}", where=path) from error


def audio_from_array(samples: Samples, rate: int, name: str) -> Audio:
    """An `Audio` over float32 [n] or [n, channels] samples in memory, which are not copied.

    Raises TypeError or ValueError for another type or shape, UnusableAudio for an impossible rate.
    """
    if samples.dtype != np.float32:
        raise TypeError(f"samples are {samples.dtype}, float32 is expected")
    if samples.ndim not in (1, 2):
        raise ValueError(f"samples have shape {samples.shape}, [n] or [n, channels] is expected")
    return ArrayAudio(samples[:, None] if samples.ndim == 1 else samples, rate, name)


def write_audio(
    path: str | Path,
    samples: Samples | Iterable[Samples],
    rate: int,
    subtype: str = "PCM_16",
    comment: str = "",
) -> None:
    """Write float samples [n] or [n, channels], or an iterable of such blocks, as WAV, FLAC or OGG.

    The extension of `path` chooses the format, `subtype` the encoding (libsndfile's names: "PCM_16",
    "PCM_24", "FLOAT", "VORBIS", "OPUS"). Integer encodings clip at full scale. A `comment` stands behind
    the samples, so that readers who count on a header of 44 bytes find these. An existing file is replaced;
    after a failure nothing is left.

    Raises OutputRefused for another extension, a wrong subtype or a place that cannot be written,
    WriteFailed when the disk refuses bytes.
    """
    target = Path(path)
    container = _WRITTEN_FORMATS.get(target.suffix.lower())
    if container is None:
        known = ", ".join(_WRITTEN_FORMATS)
        raise OutputRefused(
            f"audio is not written as {target.suffix!r}", where=path, fix=f"use one of {known}"
        )
    if not soundfile.check_format(container, subtype):
        raise OutputRefused(f"{container} cannot hold {subtype} samples", where=path)
    blocks = _write_blocks([samples] if isinstance(samples, np.ndarray) else samples)
    first = next(blocks, np.zeros((0, 1), np.float32))
    try:
        # Opened here so that "no such folder" and "permission denied" arrive as what they are.
        target.open("wb").close()
    except OSError as error:
        raise OutputRefused(f"cannot be written: {error.strerror}", where=path) from error
    try:
        written = len(first)
        with soundfile.SoundFile(str(target), "w", rate, first.shape[1], subtype, format=container) as handle:
            handle.write(first)
            for block in blocks:
                handle.write(block)
                written += len(block)
            if comment:
                handle.comment = comment
        if soundfile.info(str(target)).frames != written:  # a failed flush goes unreported
            raise WriteFailed("is incomplete: the disk is full or the file grew too large", where=path)
    except (soundfile.LibsndfileError, AssertionError, OSError) as error:  # soundfile asserts full writes
        target.unlink(missing_ok=True)
        raise WriteFailed(
            "could not be written: the disk is full or the file grew too large", where=path
        ) from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def comment_of(path: Path) -> str:
    """The comment in an audio file; empty for none, and for anything that libsndfile does not read."""
    try:
        with soundfile.SoundFile(str(path)) as handle:
            return str(handle.comment)
    except (soundfile.LibsndfileError, OSError):
        return ""


def frames_of(path: Path) -> int:
    """Samples of each channel in an audio file that libsndfile reads, by its header; 0 for any other."""
    try:
        return int(soundfile.info(str(path)).frames)
    except (soundfile.LibsndfileError, OSError):
        return 0


def stated_seconds(path: Path) -> float | None:
    """How long a file of audio or video is, by its header alone, so that thousands can be asked. 0 for one
    that cannot be read or has no audio, None where nothing is stated."""
    try:
        checked = check_regular_file(path, UnusableAudio)
        with checked.open("rb") as handle:
            start = handle.read(len(_W64_MAGIC))
        if start.startswith(_LIBSNDFILE_MAGIC):
            with contextlib.suppress(soundfile.LibsndfileError):
                return float(soundfile.info(str(checked)).duration) or None
        with open_container(checked, UnusableAudio, "an audio file") as container:
            if not container.streams.audio:
                return 0.0
            return max(0, container.duration or 0) / av.time_base or None
    except (AvatarctlError, OSError):
        return 0.0


def _write_blocks(source: Iterable[Samples]) -> Iterator[Samples]:
    for block in source:
        frames = block[:, None] if block.ndim == 1 else block
        for start in range(0, len(frames), _WRITE_BLOCK):
            yield frames[start : start + _WRITE_BLOCK]
