"""The chunk plan of a long video, in integers; the family that uses it names its specification.

A video is sampled in chunks of L pixel frames; each later chunk starts with the last `overlap` frames of
the one before. Two conventions exist for how audio meets image:

offset 1 (published image-to-video weights): frame 0 is the reference image, driven by nothing; audio
frame k drives video frame k + 1. The video has A + 1 frames and its soundtrack starts one frame late.
offset 0 (weights trained by the public fork, and ours): audio frame k drives video frame k; A frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from avatarctl.errors import UsageError
from avatarctl.family import Span
from avatarctl.timeline import SAMPLES_PER_FRAME, is_clip_length, latent_frames

__all__ = ["ChunkPlan", "plan_chunks"]


@dataclass(frozen=True)
class ChunkPlan:
    """audio_frames: A, frames filled by audio. padded_frames: A', feature frames that the plan consumes.
    length, overlap: pixel frames of a chunk and of its carried head. count: chunks. offset: see above.
    opening: latent frames that the first chunk is given."""

    audio_frames: int
    padded_frames: int
    length: int
    overlap: int
    count: int
    offset: int
    opening: int = 1

    @property
    def video_frames(self) -> int:
        """Pixel frames of the finished video."""
        return self.audio_frames + self.offset

    def spans(self) -> Iterator[Span]:
        """The chunks in order. Chunk n starts at pixel frame n * (L - overlap), a multiple of 4."""
        hop = self.length - self.overlap
        for index in range(self.count):
            first_frame = index * hop
            first_sample = (first_frame - self.offset) * SAMPLES_PER_FRAME
            yield Span(
                index=index,
                start=first_frame // 4,
                frames=latent_frames(self.length),
                audio=(first_sample, first_sample + self.length * SAMPLES_PER_FRAME),
                fixed=self.opening if index == 0 else latent_frames(self.overlap),
                keep_from=0 if index == 0 else self.overlap,
            )


def plan_chunks(audio_frames: int, *, length: int, overlap: int, offset: int, opening: int = 1) -> ChunkPlan:
    """Chunks for A = `audio_frames` frames of audio.

    The first chunk consumes L - offset feature frames, each later one L - overlap. Raises UsageError for
    lengths or overlaps that the VAE cannot code, or an overlap that leaves no new frame.
    """
    if not is_clip_length(length) or length < 5:
        raise UsageError(
            f"a chunk of {length} frames cannot be coded; it must be 4n+1 and at least 5",
            where="long_video.num_frames",
        )
    if not is_clip_length(overlap) or overlap >= length:
        raise UsageError(
            f"an overlap of {overlap} frames does not fit chunks of {length}; it must be 4n+1 and smaller",
            where="long_video.overlap_frames",
        )
    if offset not in (0, 1):
        raise UsageError(f"{offset} is not an audio offset; it is 0 or 1", where="model.audio_offset")
    first, hop = length - offset, length - overlap
    later = max(0, -(-(audio_frames - first) // hop))
    return ChunkPlan(
        audio_frames=audio_frames,
        padded_frames=first + later * hop,
        length=length,
        overlap=overlap,
        count=1 + later,
        offset=offset,
        opening=opening,
    )
