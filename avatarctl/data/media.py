"""A sample's files as media: what is found out about them once, and the frames that a network is shown.

These functions run in reading processes as well: nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from avatarctl.data.samples import Sample
from avatarctl.data.windows import Cutting, RawVideo, make_samples
from avatarctl.errors import AvatarctlError, UnusableVideo
from avatarctl.media import FittedFrames, open_audio, open_video, survey
from avatarctl.media.containers import open_container
from avatarctl.media.files import check_regular_file, file_sha256

__all__ = [
    "ReadFrames",
    "audio_facts",
    "bytes_facts",
    "cut_source",
    "read_sample",
    "stated_size",
    "video_facts",
]


@dataclass(frozen=True)
class ReadFrames:
    """Some ranges of a video, read already: a `FrameReader` for those and for what lies within them."""

    frames: int
    ranges: tuple[tuple[int, np.ndarray], ...]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop). Raises ValueError for what `TrainableFamily.frames_read` did not name."""
        for first, held in self.ranges:
            if first <= start <= stop <= first + len(held):
                return held[start - first : stop - first]
        raise ValueError(f"frames {start} to {stop} were not asked for")


def stated_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a video by its header alone; None where it cannot be read or has none."""
    try:
        with open_container(check_regular_file(path, UnusableVideo), UnusableVideo, "a video") as container:
            return next(((each.width, each.height) for each in container.streams.video), None)
    except AvatarctlError:
        return None


def video_facts(path: Path) -> dict[str, Any]:
    """Hash and length of a video, from its packets and its first frame. Raises UnusableVideo."""
    with open_video(path) as reader:
        return {"sha256": reader.sha256(), "frames": reader.frames, "warnings": list(reader.warnings)}


def audio_facts(path: Path) -> dict[str, Any]:
    """Hash, length at 16 kHz and moments of audio, which is read once through. Raises UnusableAudio."""
    audio = open_audio(path)
    found = survey(audio)
    return {
        "sha256": file_sha256(path),
        "samples": found.samples,
        "mean": found.mean,
        "variance": found.variance,
        "warnings": list(found.warnings),
    }


def bytes_facts(path: Path) -> dict[str, Any]:
    """The hash of a file."""
    return {"sha256": file_sha256(path)}


def read_sample(
    sample: Sample,
    ranges: tuple[tuple[int, int], ...],
    size: tuple[int, int],
    fit: Any,
    masks: tuple[str, ...],
) -> tuple[ReadFrames, dict[str, np.ndarray]]:
    """The wanted frames of a sample, each decoded once, and its masks for the first range.

    Raises UnusableVideo.
    """
    check_regular_file(sample.video, UnusableVideo)
    with open_video(sample.video) as reader:
        fitted = FittedFrames(reader, size, fit)
        read = {first: fitted.read(first, last) for first, last in sorted(ranges)}
        frames = ReadFrames(reader.frames, tuple(read.items()))
    length = ranges[0][1] - ranges[0][0]
    return frames, {name: _mask(sample.folder / f"{name}_masks", length, size) for name in masks}


def cut_source(out: Path, raw: RawVideo, whole: str, each: str, cutting: Cutting) -> dict[str, Any]:
    """`windows.make_samples`, under a name that a reading process finds."""
    return make_samples(out, raw, whole, each, cutting)


def _mask(folder: Path, length: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [length, H, W]; a frame without a readable image is all white (spec/stableavatar.md i.2)."""
    masks = np.full((length, *size), 255, np.uint8)
    for frame in range(length):
        for suffix in (".png", ".jpg"):
            path = folder / f"frame_{frame}{suffix}"
            if path.is_file():
                try:
                    with Image.open(path) as image:
                        grey = image.convert("L").resize((size[1], size[0]), Image.Resampling.BILINEAR)
                except (UnidentifiedImageError, OSError):
                    continue
                masks[frame] = np.asarray(grey)
                break
    return masks
