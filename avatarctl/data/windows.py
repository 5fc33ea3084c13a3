"""Videos -> sample folders: windows of one scene each, with their audio.

A source is read once from its start, and its windows are written as they pass. The folder of a window is
made under a hidden name and renamed, so that it is whole or absent. When all are there, a record says which
they are; a run that finds the record of the same making reads nothing. Without it, what stands is kept and
the rest is made.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from avatarctl.atomic import atomic_write_text, disk_errors, flush_folder, held_folder, remove_left_behind
from avatarctl.data.samples import OWN, PROMPT, VIDEO, Sample, name_of, read_entries
from avatarctl.errors import AvatarctlError, UnusableFile, UnusableVideo
from avatarctl.files.strict_json import read_object
from avatarctl.media import FittedFrames, Waveform, open_audio, open_video, write_audio, write_clip
from avatarctl.media.cuts import LOOKAHEAD, first_cut
from avatarctl.rng import generator
from avatarctl.timeline import SAMPLE_RATE, SAMPLES_PER_FRAME

if TYPE_CHECKING:
    from avatarctl.data.faces import FacePlan

__all__ = [
    "VIDEO_SUFFIXES",
    "Cutting",
    "RawVideo",
    "Walked",
    "Work",
    "find_videos",
    "fingerprints",
    "has_record",
    "make_samples",
    "others_of",
    "recorded",
    "rows_outside",
    "sample_source",
    "samples_of",
]

_MADE: Final = "sample.json"
_VERSION: Final = 1
_LARGEST_RECORD: Final = 1 << 26
_POOL: Final = 32  # frames of a source that references are drawn from
VIDEO_SUFFIXES: Final = frozenset(
    (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")
)


@dataclass(frozen=True)
class RawVideo:
    """A video to cut samples from. name: its relative path. problem: why it cannot be."""

    name: str
    video: Path
    audio: Path | None
    prompt: str
    problem: AvatarctlError | None = None


@dataclass
class Walked:
    """What a walk through a source came to: first frames of its windows and, where samples are cut around
    everybody, whose they are; frames that begin a scene; facts of the faces and lines about them."""

    windows: list[int] = field(default_factory=list)
    people: list[int] | None = None
    cuts: list[int] = field(default_factory=list)
    faces: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cutting:
    """How samples are cut: pixel frames, the size [height, width], and what is kept of other frames. faces:
    whom samples are cut around, None where nobody looks for faces."""

    window: int
    stride: int
    max_windows: int | None
    size: tuple[int, int]
    fit: Any
    audio_name: str
    references: bool
    faces: FacePlan | None = None


def find_videos(path: Path, default_prompt: str) -> list[RawVideo]:
    """The videos of a folder (by their suffix, in all folders below) or of a list, by name. What is hidden is
    passed over, and so are data sets, whose clips are no sources.

    A prompt is a text file beside the video (`talk.txt` for `talk.mp4`), the list's column, or the default.
    Raises PathNotFound, UnusableFile for no videos.
    """
    if path.is_dir():
        found = [_raw(file, path, None, "", default_prompt) for file in sorted(_videos_below(path))]
    else:
        base = path.parent
        found = [
            _raw(
                base / each.video,
                base,
                base / each.audio if each.audio else None,
                each.prompt,
                default_prompt,
            )
            for each in read_entries(path)
        ]
    if not found:
        raise UnusableFile("holds no videos", where=path)
    return _without_twins(found)


def _videos_below(path: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(path):
        if OWN in folders and Path(folder) != path:
            folders.clear()  # samples that were made here before: cut again, they would never end
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (
            Path(folder) / name
            for name in names
            if Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith(".")
        )


def _raw(file: Path, base: Path, audio: Path | None, prompt: str, default: str) -> RawVideo:
    name = name_of(file, base)
    beside, problem = file.with_suffix(".txt"), None
    text = prompt or default
    if file.suffix and beside.is_file():
        try:
            text = beside.read_text(encoding="utf-8").strip() or text
        except (UnicodeDecodeError, OSError):
            problem = UnusableFile("is not UTF-8 text", where=beside)
    if name.split("/")[0] == OWN:
        problem = UnusableFile(f"a folder named {OWN} is taken by the data set", where=file, fix="rename it")
    return RawVideo(name, file, audio, text, problem)


def _without_twins(videos: list[RawVideo]) -> list[RawVideo]:
    first: dict[str, RawVideo] = {}
    result = []
    for video in videos:
        if first.setdefault(video.name, video) is not video:
            problem = UnusableFile("is listed twice: both would be one sample", where=video.name)
            video = RawVideo(**{**vars(video), "problem": problem})
        result.append(video)
    return result


def fingerprints(raw: RawVideo, video: str, audio: str, cutting: Cutting) -> tuple[str, str]:
    """Of a source's samples together and of the content of one, from the hashes of its files."""
    content = [_VERSION, video, audio, cutting.window, *cutting.size, cutting.fit, cutting.audio_name]
    if cutting.faces is not None:
        content.append(cutting.faces.facts(raw.name))
    every = [*content, raw.prompt, cutting.stride, cutting.max_windows, cutting.references]
    whole, each = (hashlib.sha256(json.dumps(facts).encode()).hexdigest() for facts in (every, content))
    return whole, each


def has_record(out: Path, raw: RawVideo) -> bool:
    """Whether a source was cut before, in whatever way."""
    return _record(out, raw).is_file()


def recorded(out: Path, raw: RawVideo, whole: str) -> dict[str, Any] | None:
    """The record of a source that is finished, and whose folders are all there."""
    path = _record(out, raw)
    if not path.is_file():
        return None
    record = read_object(path, _LARGEST_RECORD)
    if record.get("fingerprint") != whole:
        return None
    there = all((out / raw.name / name / _MADE).is_file() for name in _folder_names(record))
    return record if there else None


def samples_of(out: Path, raw: RawVideo, record: dict[str, Any], audio_name: str) -> Iterator[Sample]:
    for each in _folder_names(record):
        folder = out / raw.name / each
        name = f"{raw.name}/{each}"
        yield Sample(name, folder, folder / VIDEO, folder / audio_name, folder / PROMPT)


def make_samples(out: Path, raw: RawVideo, whole: str, each: str, cutting: Cutting) -> dict[str, Any]:
    """Cuts a source and writes its folders and its record; the record.

    Raises UnusableVideo, UnusableAudio, PathNotFound, and WriteFailed for a full disk.
    """
    home = out / raw.name
    if home.exists() and not home.is_dir():
        raise UnusableFile("its samples go into a folder of this name, and a file has it", where=home)
    notes = [line for folder in (home, _record(out, raw).parent) for line in remove_left_behind(folder)]
    source = raw.audio or raw.video
    with open_video(raw.video) as reader, Waveform(open_audio(source)) as waveform:
        work = Work(home, raw, each, cutting, waveform)
        if cutting.faces is None:
            walked = _walk(FittedFrames(reader, cutting.size, cutting.fit), work, cutting)
        else:
            from avatarctl.data.face_windows import walk_faces  # here: it needs torch

            walked = walk_faces(reader, work, cutting, cutting.faces, raw)
        pool = work.pool()
        frames, warnings = reader.frames, [*reader.warnings, *waveform.audio.doubts, *walked.notes]
    if not walked.windows:
        raise _no_window(raw, cutting.window, frames, walked.cuts)
    record: dict[str, Any] = {
        "fingerprint": whole,
        "source": raw.name,
        "frames": frames,
        "windows": walked.windows,
        "cuts": walked.cuts,
        "others": [number for number, _ in pool],
    }
    if walked.people is not None:
        record["people"] = walked.people
    if walked.faces is not None:
        record["faces"] = walked.faces
    _remove_others(home, set(_folder_names(record)))
    path = _record(out, raw)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if pool:
        write_clip(_pool_file(out, raw), iter([np.stack([frame for _, frame in pool])]))
    atomic_write_text(path, json.dumps({**record, "warnings": warnings}, indent=1) + "\n")
    return {**record, "warnings": [*warnings, *notes]}


def _no_window(raw: RawVideo, window: int, frames: int, cuts: list[int]) -> UnusableVideo:
    what = f"no scene is as long as a window of {window} frames"
    if not cuts:
        what = f"shorter than a window of {window} frames"
    return UnusableVideo(
        f"{what} ({frames} frames at 25 a second, {len(cuts)} cuts)", where=raw.video,
        fix="give a smaller --window",
    )  # fmt: skip


def _walk(frames: FittedFrames, work: Work, cutting: Cutting) -> Walked:
    """Windows from the start on, each within one scene; behind a cut they begin anew. Stops when there are
    enough: what lies behind is never decoded."""
    walked = Walked()
    start = 0
    while start + cutting.window <= frames.frames and len(walked.windows) != cutting.max_windows:
        stop = start + cutting.window
        seen = frames.read(start, min(stop + LOOKAHEAD, frames.frames))
        cut = first_cut(seen, cutting.window)
        work.look(start, seen)
        if cut is not None:
            walked.cuts.append(start + cut)
            start += cut
            continue
        work.write(start, seen[: cutting.window])
        walked.windows.append(start)
        start += cutting.stride
    return walked


class Work:
    """One source while it is cut: writes folders, and keeps a few frames that references are drawn from."""

    def __init__(self, home: Path, raw: RawVideo, each: str, cutting: Cutting, waveform: Waveform) -> None:
        self._home, self._raw, self._each, self._cutting = home, raw, each, cutting
        self._waveform = waveform
        self._pool: dict[int, np.ndarray] = {}
        self._step = 1

    def look(self, start: int, seen: Sequence[np.ndarray] | np.ndarray) -> None:
        """Keeps every `_step`th frame; where they become too many, every second of them."""
        if not self._cutting.references:
            return
        for number in range(start, start + len(seen)):
            if number % self._step == 0 and number not in self._pool:
                self._pool[number] = seen[number - start].copy()
        while len(self._pool) > _POOL:
            self._step *= 2
            self._pool = {number: frame for number, frame in self._pool.items() if number % self._step == 0}

    def pool(self) -> list[tuple[int, np.ndarray]]:
        return sorted(self._pool.items(), key=lambda item: item[0])

    def write(
        self,
        start: int,
        frames: np.ndarray,
        person: int | None = None,
        beside: Callable[[Path], None] | None = None,
    ) -> None:
        """A folder, unless it stands already as it would be made. beside: what else is written into it."""
        folder = self._home / _folder_name(start, person)
        made = {"made": self._each, "source": self._raw.name, "start": start, "frames": len(frames)}
        if _made(folder) == made:
            if _text(folder / PROMPT) != self._raw.prompt:
                atomic_write_text(folder / PROMPT, self._raw.prompt + "\n")
            return
        with disk_errors(self._home):
            self._home.mkdir(parents=True, exist_ok=True)
        audio = self._waveform.read(start * SAMPLES_PER_FRAME, (start + len(frames)) * SAMPLES_PER_FRAME)
        with held_folder(self._home) as hidden:
            write_clip(hidden / VIDEO, iter([frames]), audio=audio)
            write_audio(hidden / self._cutting.audio_name, audio, SAMPLE_RATE)
            if beside is not None:
                beside(hidden)
            atomic_write_text(hidden / PROMPT, self._raw.prompt + "\n")
            atomic_write_text(hidden / _MADE, json.dumps(made) + "\n")
            with disk_errors(folder):
                if folder.exists():
                    _remove(folder)
                hidden.rename(folder)
                flush_folder(self._home)


def rows_outside(out: Path, raw_name: str, start: int, length: int) -> list[int]:
    """Rows, in the frames that were kept of a sample's source, of those outside the sample. Raises
    UnusableVideo where there are none."""
    raw = RawVideo(raw_name, Path(), None, "")
    numbers = read_object(_record(out, raw), _LARGEST_RECORD).get("others", [])
    outside = [row for row, number in enumerate(numbers) if not start <= number < start + length]
    if not outside:
        raise UnusableVideo(
            "has no frames outside this sample to draw data.references from", where=raw_name,
            fix="give --references when the samples are cut, or longer videos; --references 0 does without",
        )  # fmt: skip
    return outside


def others_of(out: Path, raw_name: str, start: int, length: int, count: int, seed: int) -> np.ndarray:
    """`count` frames of a sample's source that are outside the sample, drawn by its name alone:
    uint8 [count, H, W, 3]. Raises UnusableVideo where there are none."""
    outside = rows_outside(out, raw_name, start, length)
    import torch

    drawn = torch.randint(len(outside), (count,), generator=generator(seed, "references", raw_name, start))
    with open_video(_pool_file(out, RawVideo(raw_name, Path(), None, ""))) as reader:
        return np.concatenate([reader.read(outside[row], outside[row] + 1) for row in drawn.tolist()])


def sample_source(folder: Path) -> tuple[str, int, int] | None:
    """Source, first frame and length of a sample that was cut here; None for any other."""
    made = _made(folder)
    return None if made is None else (str(made["source"]), int(made["start"]), int(made["frames"]))


def _made(folder: Path) -> dict[str, Any] | None:
    path = folder / _MADE
    return read_object(path, _LARGEST_RECORD) if path.is_file() else None


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None


def _remove_others(home: Path, wanted: set[str]) -> None:
    """Samples of an earlier cutting of this source, which nothing would make again."""
    for folder in home.iterdir():
        if folder.name not in wanted and (folder / _MADE).is_file() and not folder.name.startswith("."):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Takes a sample away under a hidden name, so that a kill in between leaves no half of one."""
    with held_folder(folder.parent) as hidden:
        folder.rename(hidden / folder.name)


def _folder_name(start: int, person: int | None = None) -> str:
    return f"{start:06d}" if person is None else f"{start:06d}-{person}"


def _folder_names(record: dict[str, Any]) -> list[str]:
    """Of the windows of a source; of everybody's where there were several people."""
    people = record.get("people") or [None] * len(record["windows"])
    return [_folder_name(*each) for each in zip(record["windows"], people, strict=True)]


def _record(out: Path, raw: RawVideo) -> Path:
    return out / OWN / "sources" / f"{raw.name}.json"


def _pool_file(out: Path, raw: RawVideo) -> Path:
    return out / OWN / "sources" / f"{raw.name}.others.mp4"
