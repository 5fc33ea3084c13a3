"""The plan of a video in windows that are fused in every step, in integers.

The family that uses it names its specification. A video of I latent frames is covered by windows of F, each
starting F - o frames after the one before; o is the overlap. A window's audio starts 4 * 640 samples into the
recording for every latent frame before it. Two plans:

whole windows  every frame of audio is kept, I = ceil((A - 1) / 4) + 1 for A = ceil(samples / 640) pixel
               frames, and the last window is moved back until it is as long as the others. A window of f
               frames gets the (4 f - 3) * 640 samples that it shows. A video shorter than a window has one
               window of its own length, at least 2 frames, and is cut to A.
published      A = floor(samples / 640), the rest of the audio is dropped; the last window is as short as
               what is left. A window gets 4 F * 640 samples, three pixel frames more than it shows, and the
               last one gets all that is left. Where one window would hold the video the published script
               does not work; here its only window is treated as a last one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from avatarctl.errors import UsageError
from avatarctl.family import Span
from avatarctl.timeline import (
    SAMPLES_PER_FRAME,
    frames_of_samples,
    is_clip_length,
    latent_frames,
    pixel_frames,
)

__all__ = ["WindowPlan", "blend_weights", "plan_windows"]

_SAMPLES_PER_LATENT = 4 * SAMPLES_PER_FRAME
_SHORTEST = 2  # latent frames: audio is cut into pieces by the distance of two
_SHORTEST_OVERLAP = 2  # latent frames: the cross-fade goes from 0 to 1


@dataclass(frozen=True)
class WindowPlan:
    """samples: of the audio. video_frames: pixel frames of the finished video. latent_frames: I, at least one
    window. window: latent frames of a window, of the longest where they differ. overlap: o. count: windows.
    published: which of the two plans."""

    samples: int
    video_frames: int
    latent_frames: int
    window: int
    overlap: int
    count: int
    published: bool

    def spans(self) -> Iterator[Span]:
        """The windows in order of their start."""
        for index in range(self.count):
            start = index * (self.window - self.overlap)
            if not self.published:
                start = min(start, self.latent_frames - self.window)
            frames = min(self.window, self.latent_frames - start)
            yield Span(index, start, frames, self._audio(index, start, frames), fixed=0, keep_from=0)

    def _audio(self, index: int, start: int, frames: int) -> tuple[int, int]:
        first = start * _SAMPLES_PER_LATENT
        if not self.published:
            return first, first + pixel_frames(frames) * SAMPLES_PER_FRAME
        last = index == self.count - 1
        return first, self.samples if last else first + frames * _SAMPLES_PER_LATENT


def plan_windows(samples: int, *, length: int, overlap: int, published: bool = False) -> WindowPlan:
    """Windows for `samples` at 16 kHz, at least one pixel frame; length and overlap in pixel frames, the
    overlap 1 + 4 n for n + 1 latent frames or 0 for none.

    Raises UsageError for a length that the VAE cannot code, an overlap of one latent frame and one that
    leaves no new frame.
    """
    if not is_clip_length(length) or length < 5:
        raise UsageError(
            f"a window of {length} frames cannot be coded; it must be 4n+1 and at least 5",
            where="long_video.num_frames",
        )
    full, shared = latent_frames(length), latent_frames(overlap)
    if shared >= full or not (overlap == 0 or is_clip_length(overlap)):
        raise UsageError(
            f"an overlap of {overlap} frames does not fit windows of {length}; "
            "it must be 0 or 4n+1, and smaller",
            where="long_video.overlap_frames",
        )
    if 0 < shared < _SHORTEST_OVERLAP:
        raise UsageError(
            f"windows cannot be cross-faded over {overlap} frame, which is one latent frame",
            where="long_video.overlap_frames",
            fix=f"give 0 for no cross-fade, or 5, 9, ... up to {length - 4}",
        )
    if published:
        video = samples // SAMPLES_PER_FRAME
        latents = (video - 1) // 4 + 1
        video = pixel_frames(latents)
    else:
        video = frames_of_samples(samples)
        latents = max(-(-(video - 1) // 4) + 1, _SHORTEST)
    window = min(full, latents)
    return WindowPlan(
        samples=samples,
        video_frames=video,
        latent_frames=latents,
        window=window,
        overlap=shared,
        count=1 + max(0, -(-(latents - full) // (full - shared))),
        published=published,
    )


def blend_weights(frames: int, scheme: Literal["uniform", "log"]) -> tuple[float, ...]:
    """Weight of the later window in each of `frames` >= 2 shared latent frames, from 0 to 1.

    uniform: j / (o - 1); log: ln(1 + (e - 1) j / (o - 1)), which rises faster.
    """
    if frames < _SHORTEST_OVERLAP:
        raise ValueError(f"{frames} frames are too few for a cross-fade")
    line = [j / (frames - 1) for j in range(frames)]
    return tuple(line) if scheme == "uniform" else tuple(math.log1p((math.e - 1) * u) for u in line)
