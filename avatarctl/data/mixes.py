"""Where mixes are that speech is taken out of, and where it goes: files, folders, lists, sample folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from avatarctl.data.samples import OWN, VIDEO, find_samples, name_of, read_entries
from avatarctl.data.windows import VIDEO_SUFFIXES
from avatarctl.errors import AvatarctlError, OutputRefused, PathNotFound, UnusableFile, UsageError
from avatarctl.events import Emit

__all__ = ["VOCAL", "Mix", "find_mixes"]

VOCAL: Final = "vocal.wav"

_LIST_SUFFIXES: Final = (".txt", ".csv", ".jsonl", ".lst", ".list")
_AUDIO_SUFFIXES: Final = frozenset(
    (
        ".wav",
        ".mp3",
        ".m4a",
        ".aac",
        ".flac",
        ".ogg",
        ".opus",
        ".oga",
        ".wma",
        ".aif",
        ".aiff",
        ".caf",
        ".w64",
    )
)


@dataclass(frozen=True)
class Mix:
    """Audio that speech is in. name: for messages. path: of the file, audio or video. vocal: what is written.
    problem: why it cannot be done, where that is known already."""

    name: str
    path: Path
    vocal: Path
    problem: AvatarctlError | None = None

    def stem(self, which: str) -> Path:
        """The file of `speech` or `rest` at full rate: `speech.wav` beside `vocal.wav`, `talk.speech.wav`
        beside any other name."""
        before = "" if self.vocal.name == VOCAL else f"{self.vocal.stem}."
        return self.vocal.with_name(f"{before}{which}.wav")


def find_mixes(given: Path, out: Path | None, audio_name: str, emit: Emit) -> list[Mix]:
    """What `given` means.

    A file is one mix, a list what its lines name, a folder with sample folders their audio, any other folder
    its audio and video files. Of a sample it is `audio_name`, or the audio of its video; `vocal.wav` lies
    beside it unless `out` is another folder.

    Raises PathNotFound, UnusableFile for nothing in it, UsageError for an `out` that does not fit.
    """
    if audio_name == VOCAL:
        raise UsageError(f"{VOCAL} is what is written", where="--audio-name")
    if out is not None and given.is_dir() and os.path.realpath(out) == os.path.realpath(given):
        out = None
    if given.is_dir():
        found = list(_of_folder(given, out, audio_name, emit))
    elif given.suffix.lower() in _LIST_SUFFIXES:
        found = list(_of_list(given, out, audio_name))
    else:
        return [_of_file(given, out)]
    if not found:
        raise UnusableFile("is a directory that holds neither samples nor audio nor video files", where=given)
    _refuse_file(out)
    return list(_without_twins(found))


def _of_file(path: Path, out: Path | None) -> Mix:
    out = _needed(out)
    suffix = out.suffix.lower()
    if out.is_dir() or suffix not in (_AUDIO_SUFFIXES | VIDEO_SUFFIXES):
        return Mix(path.name, path, out / VOCAL)
    if suffix != ".wav":
        raise UsageError(f"speech is written as WAV, not {suffix}", where="--out", fix="end the name in .wav")
    if os.path.realpath(out) == os.path.realpath(path):
        raise OutputRefused("is what is read", where=out, fix="choose another --out")
    return Mix(path.name, path, out)


def _of_folder(folder: Path, out: Path | None, audio_name: str, emit: Emit) -> Iterator[Mix]:
    try:
        samples = find_samples(folder, audio_name, emit).samples
    except UnusableFile:  # no samples: a folder of media
        yield from _of_media(folder, out)
        return
    for sample in samples:
        yield replace(_of_sample(sample.name, sample.folder, out, audio_name), problem=sample.problem)


def _of_media(folder: Path, out: Path | None) -> Iterator[Mix]:
    """By suffix, in all folders below but `out` and hidden ones."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(
            each
            for each in folders
            if each != OWN and not each.startswith(".") and not _same(Path(here, each), out)
        )
        for name in sorted(names):
            path = Path(here, name)
            if path.suffix.lower() in _AUDIO_SUFFIXES | VIDEO_SUFFIXES and not name.startswith("."):
                yield _of_named(name_of(path, folder), path, out)


def _of_list(path: Path, out: Path | None, audio_name: str) -> Iterator[Mix]:
    base = path.parent
    for entry in read_entries(path):
        named = base / entry.video
        name = name_of(named, base)
        if entry.is_folder and named.is_dir():
            yield _of_sample(name, named, out, audio_name)
        else:
            yield _of_named(name, base / (entry.audio or entry.video), out)


def _of_sample(name: str, folder: Path, out: Path | None, audio_name: str) -> Mix:
    audio = folder / audio_name
    source = audio if os.path.lexists(audio) else folder / VIDEO
    return Mix(name, source, (folder if out is None else out / name) / VOCAL)


def _of_named(name: str, path: Path, out: Path | None) -> Mix:
    return Mix(name, path, _needed(out) / name / VOCAL)


def _needed(out: Path | None) -> Path:
    if out is None:
        raise UsageError("where to write is missing", fix="add --out, another folder than IN")
    return out


def _refuse_file(out: Path | None) -> None:
    if out is not None and (out.suffix.lower() == ".wav" or (out.exists() and not out.is_dir())):
        raise UsageError("is a file, and there may be several results", where="--out", fix="name a folder")


def _same(path: Path, other: Path | None) -> bool:
    return other is not None and os.path.realpath(path) == os.path.realpath(other)


def _without_twins(mixes: list[Mix]) -> Iterator[Mix]:
    """Of those that would write the same file the first is kept and the others are refused."""
    taken: dict[str, Mix] = {}
    for mix in mixes:
        first = taken.setdefault(os.path.realpath(mix.vocal), mix)
        if first is not mix and mix.problem is None:
            problem = PathNotFound if not mix.path.exists() else UnusableFile
            mix = replace(mix, problem=problem(f"would write the same file as {first.name}", where=mix.name))
        yield mix
