"""Whether samples that were cut elsewhere show an aligned face, as models from video to video need it.

A fixed mask over a face that is not aligned teaches nonsense, so a few frames are looked at, once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from avatarctl.config import RunConfig
from avatarctl.data.faces import cpu_networks
from avatarctl.data.known import Known
from avatarctl.data.samples import Sample
from avatarctl.data.windows import sample_source
from avatarctl.errors import AvatarctlError, UnusableVideo
from avatarctl.events import Emit, Notice
from avatarctl.family import TrainableFamily
from avatarctl.media import open_video
from avatarctl.media.files import file_sha256
from avatarctl.perception.align import crop_size, template
from avatarctl.perception.face_file import FACE_FILE, VERSION, Clip, read_face_file

__all__ = ["AlignedFaces"]

_FAR: Final = 0.12
"""Of the frame's sides: how far a brow or the nose may be from where alignment puts it. Those of other
alignments for the same models are within half of that; a face in a frame that was not aligned is not."""


class AlignedFaces:
    """Looks at the samples of one data set; they are told about in one line."""

    def __init__(self, cfg: RunConfig, family: TrainableFamily, known: Known, emit: Emit) -> None:
        self._wanted = cfg.data.faces not in (None, "none") and family.takes(cfg) == "video"
        self._length = cfg.data.num_frames or 1
        self._known, self._emit = known, emit
        self._elsewhere: list[str] = []

    def problem(self, sample: Sample) -> AvatarctlError | None:
        """Why a sample cannot be used. Those that were cut here, or have a map to their face that is of this
        clip, are not looked at, nor is any under `--faces none`."""
        if not self._wanted:
            return None
        try:
            if sample_source(sample.folder) is not None:
                return None
            if (path := sample.folder / FACE_FILE).is_file():
                read_face_file(path, Clip(**self._known.facts(sample.video, "clip", _clip)))
                return None
            kind = f"face {VERSION} {self._length}"
            off = self._known.facts(sample.video, kind, self._look)["off"]
        except AvatarctlError as problem:
            return problem
        if off is None:
            return UnusableVideo(
                "shows no face in three frames that were looked at",
                where=sample.video,
                fix="--faces none takes samples that are aligned already, and drawn faces",
            )
        if off > _FAR:
            self._elsewhere.append(sample.name)
        return None

    def conclude(self) -> None:
        """Says of how many samples the face is not where it belongs."""
        if self._elsewhere:
            count = len(self._elsewhere)
            which = self._elsewhere[0] if count == 1 else f"{count} samples, the first {self._elsewhere[0]}"
            self._emit(
                Notice(
                    f"{which}: the face is not where it is in an aligned sample, and the mouth mask lies "
                    "elsewhere; --from-videos aligns, --faces none says that it is meant",
                    "warning",
                )
            )

    def _look(self, video: Path) -> dict[str, Any]:
        """off: the largest distance of brows and nose from their places, of the best of three frames; None
        without a face. Frames are those that are encoded."""
        with open_video(video) as reader:
            count = min(reader.frames, self._length)
            offs = [_off(reader.read(at, at + 1)[0]) for at in sorted({0, count // 2, count - 1})]
        found = [each for each in offs if each is not None]
        return {"off": round(min(found), 4) if found else None}


def _clip(video: Path) -> dict[str, Any]:
    """What a map to a face says of the video that it belongs to."""
    with open_video(video) as reader:
        size = {"frames": reader.frames, "width": reader.width, "height": reader.height}
    return {"sha256": file_sha256(video), **size}


def _off(frame: np.ndarray) -> float | None:
    from avatarctl.perception.mesh import alignment_points, find_faces

    faces = find_faces(cpu_networks(), frame)
    if not faces:
        return None
    height, width = crop_size(512)
    goal = template(512) / (width, height)
    held = alignment_points(faces[0].landmarks) / (frame.shape[1], frame.shape[0])
    return float(np.abs(held - goal).max())
