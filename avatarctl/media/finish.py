"""An ordinary MP4 out of one that grew in fragments: the same packets, with one table of them in front.

A finished video is edited, scored and sent on, by programs of all ages, and some of those misread fragments:
FFmpeg 5.1 takes the audio out 1024 samples late (64 ms at 16 kHz), as it leaves the edit list out, and
repeats frames when it transcodes; OpenCV counts frames that are not there, as nothing states the length.
"""

from __future__ import annotations

from pathlib import Path

import av

__all__ = ["copy_packets"]


def copy_packets(growing: Path, ordinary: Path) -> None:
    """Copies the packets of the MP4 at `growing`, as they are, to a new MP4 at `ordinary`.

    `ordinary` has durations, a sample table per stream, an edit list that skips the AAC priming, and `moov`
    before `mdat`. Memory grows by the tables of both files, 130 to 175 bytes per packet; the disk needs the
    file once more.

    Raises:
        OSError: what the disk says, with its number. What stands at `ordinary` is then of no use.
    """
    # Absolute paths: "a:b.mp4" alone would name a protocol.
    with av.open(str(growing.absolute()), format="mp4") as source:
        unit = source.streams[-1].time_base
        assert unit is not None  # a stream of an MP4 that was read
        options = {
            "movflags": "faststart",
            # Durations and edits count in the units of the audio (of the video, if there is none). The
            # default, milliseconds, would round some of them down and so cut off samples.
            "movie_timescale": str(unit.denominator),
            "max_interleave_delta": "1000000",  # µs: audio that ends early holds back a second of frames
        }
        _copy(source, ordinary, options)


def _copy(source: av.container.InputContainer, ordinary: Path, options: dict[str, str]) -> None:
    with av.open(str(ordinary.absolute()), "w", format="mp4", container_options=options) as target:
        target.metadata.update(source.metadata)
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:  # the last of each stream is an empty one without times
                packet.stream = streams[packet.stream_index]
                target.mux(packet)
