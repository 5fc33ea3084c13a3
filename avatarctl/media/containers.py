"""Opening strangers' media files with FFmpeg so that one file means one file.

FFmpeg chooses a demuxer by content. Some demuxers are playlists: HLS, ffconcat, SDP and their kin
open further files and network addresses named inside, whatever the first file is called. Only
demuxers that read one self-contained file are allowed here, and only the file protocol.
"""

from __future__ import annotations

from pathlib import Path

import av
import av.container
import av.error

from avatarctl.errors import UnusableFile

__all__ = ["DEMUXERS", "cause_of", "open_container"]

DEMUXERS = (
    "aac", "ac3", "aiff", "amr", "ape", "asf", "au", "avi", "caf", "eac3", "flac", "flv", "loas", "matroska",
    "mov", "mp3", "mpeg", "mpegts", "ogg", "tta", "w64", "wav", "webm", "wv",
)  # fmt: skip
"""FFmpeg demuxers that read one file and never open another (mov: external references stay off)."""


def open_container(path: Path, kind_error: type[UnusableFile], wanted: str) -> av.container.InputContainer:
    """`path` opened for demuxing; the caller closes it. `wanted` names the kind, as in "an audio file".

    Raises `kind_error` when the content is of no allowed format, or damaged beyond opening.
    """
    options = {"format_whitelist": ",".join(DEMUXERS), "protocol_whitelist": "file"}
    try:
        # An absolute path starts with a slash and so cannot name a protocol, as "concat:a" would.
        return av.open(str(path.absolute()), mode="r", options=options, metadata_errors="replace")
    except (av.error.FFmpegError, ValueError, UnicodeError) as error:
        raise kind_error(
            f"not {wanted} that can be read: unrecognised, unsupported or invalid format", where=path
        ) from error


def cause_of(error: av.error.FFmpegError) -> str:
    """What FFmpeg says, without the error number and the path that it repeats."""
    return (error.strerror or "unknown error").strip().rstrip(".").lower()
