"""Where samples are: a folder of them, a list of their folders, or a list of videos.

A sample is a folder with `sub_clip.mp4`, `audio.wav` and `prompt.txt` (spec/omniavatar.md h.1), or a line of
a list that names a video, its audio and its prompt.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from avatarctl.errors import AvatarctlError, PathNotFound, UnusableFile
from avatarctl.events import Emit, Notice
from avatarctl.files.strict_json import parse_object
from avatarctl.media import check_regular_file

__all__ = ["OWN", "PROMPT", "VIDEO", "DataSet", "Entry", "Sample", "find_samples", "read_entries"]

VIDEO: Final = "sub_clip.mp4"
PROMPT: Final = "prompt.txt"
OWN: Final = "_dataset"
"""The folder of what belongs to no sample: in a folder of samples, or beside a list as `NAME_dataset`."""

_LONGEST_LIST: Final = 1 << 28
_LONGEST_PROMPT: Final = 1 << 16
_FIELDS: Final = ("video", "audio", "prompt")


@dataclass(frozen=True)
class Sample:
    """One sample: its name in the data set, and where its parts are.

    folder: where its artifacts lie. audio: None is the audio of the video. prompt: the text, or the file
    that holds it. problem: why it cannot be used, where that is known already.
    """

    name: str
    folder: Path
    video: Path
    audio: Path | None
    prompt: str | Path | None
    problem: AvatarctlError | None = None


@dataclass(frozen=True)
class DataSet:
    """Samples by name; base: what names are relative to; own: the folder of what they share."""

    base: Path
    own: Path
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Entry:
    """A line of a list: a folder, or a video with its audio and its prompt; as it is written there."""

    line: int
    video: str
    audio: str = ""
    prompt: str = ""
    is_folder: bool = False


def find_samples(path: Path, audio_name: str, emit: Emit) -> DataSet:
    """The samples of a folder or a list.

    Raises PathNotFound for nothing there, UnusableFile for a list that cannot be read and for no samples.
    """
    if path.is_dir():
        base, own = path, path / OWN
        found = [_of_folder(folder, name, audio_name) for name, folder in _folders(path, emit)]
    else:
        base, own = path.parent, path.with_name(f"{path.stem}{OWN}")
        found = [_of_entry(entry, base, own, audio_name) for entry in read_entries(path)]
    if not found:
        raise UnusableFile("holds no samples", where=path, fix=f"a sample is a folder with {VIDEO}")
    return DataSet(base, own, tuple(_without_twins(found)))


def read_entries(path: Path) -> list[Entry]:
    """The lines of a list: CSV and JSONL by their suffix, with `video`, `audio` and `prompt`; else one folder
    or `prompt@@video@@audio` a line. Raises PathNotFound, UnusableFile."""
    checked = check_regular_file(path, UnusableFile)
    if checked.stat().st_size > _LONGEST_LIST:
        raise UnusableFile("is too large for a list", where=path)
    try:
        text = checked.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UnusableFile("is not a list of UTF-8 text", where=path) from error
    reader = {".csv": _csv, ".jsonl": _jsonl}.get(path.suffix.lower(), _lines)
    return list(reader(text, path))


def prompt_of(sample: Sample, default: str) -> tuple[str, str | None]:
    """The prompt of a sample, and a line about it where it is not the sample's own.

    Raises UnusableFile for one that cannot be read.
    """
    if isinstance(sample.prompt, str):
        return sample.prompt, None
    if sample.prompt is None or not sample.prompt.exists():
        return default, f"{sample.name}: has no prompt; {default!r} is used"
    file = check_regular_file(sample.prompt, UnusableFile)
    try:
        with file.open("rb") as handle:
            data = handle.read(_LONGEST_PROMPT + 1)
        text = data.decode("utf-8").strip()
    except (UnicodeDecodeError, OSError) as error:
        raise UnusableFile("is not UTF-8 text", where=file) from error
    if len(data) > _LONGEST_PROMPT:
        raise UnusableFile("is too long for a prompt", where=file)
    return text, None


def _of_folder(folder: Path, name: str, audio_name: str) -> Sample:
    return Sample(name, folder, folder / VIDEO, folder / audio_name, folder / PROMPT)


def _of_entry(entry: Entry, base: Path, own: Path, audio_name: str) -> Sample:
    """A folder keeps its artifacts itself; those of a video lie in the data set's own folder."""
    name = name_of(base / entry.video, base)
    if not entry.is_folder:
        audio = base / entry.audio if entry.audio else None
        return Sample(name, own / "samples" / name, base / entry.video, audio, entry.prompt or None)
    folder = base / entry.video
    sample = _of_folder(folder, name, audio_name)
    if folder.is_dir():
        return sample
    what = "is not a folder" if os.path.lexists(folder) else "not found: no such folder"
    return Sample(**{**vars(sample), "problem": PathNotFound(what, where=entry.video)})


def name_of(path: Path, base: Path) -> str:
    """The relative path with its suffix, so that equal names in different folders stay apart; a step up is
    `__`, since a name is also a place below the data set."""
    relative = Path(os.path.relpath(path, base))
    return "/".join("__" if part == ".." else part for part in relative.parts)


def _without_twins(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Of samples that would write the same files the first is kept and the others are refused."""
    taken: dict[str, str] = {}
    for sample in samples:
        place = os.path.realpath(sample.folder)
        first = taken.setdefault(place, sample.name)
        if first is not sample.name and sample.problem is None:
            problem = UnusableFile(f"is the same sample as {first}", where=sample.name, fix="list it once")
            sample = Sample(**{**vars(sample), "problem": problem})
        yield sample


def _folders(root: Path, emit: Emit) -> list[tuple[str, Path]]:
    """Folders with a video, by their path below `root`. Each is met once: what a link leads back to is passed
    over with a warning. Real folders come first, so that a link never gives a sample its name."""
    seen: set[tuple[int, int]] = set()
    found: list[tuple[str, Path]] = []
    links: list[Path] = []

    def walk(folder: Path) -> None:
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            try:
                status = here.stat()
                entries = sorted(os.scandir(here), key=lambda entry: entry.name)
            except OSError as error:
                emit(Notice(f"{here}: is passed over: {error.strerror}", "warning"))
                continue
            if (status.st_dev, status.st_ino) in seen:
                emit(
                    Notice(f"{here}: is a link to a folder that was searched already; passed over", "warning")
                )
                continue
            seen.add((status.st_dev, status.st_ino))
            if any(entry.name == VIDEO for entry in entries):
                relative = here.relative_to(root).as_posix()
                found.append((here.absolute().name if relative == "." else relative, here))
                continue
            inside = [entry for entry in entries if entry.name != OWN and not entry.name.startswith(".")]
            links.extend(Path(entry.path) for entry in inside if entry.is_symlink() and _leads_on(entry))
            below = [Path(entry.path) for entry in inside if entry.is_dir(follow_symlinks=False)]
            waiting.extend(reversed(below))

    walk(root)
    while links:
        walk(links.pop(0))
    return sorted(found)


def _leads_on(entry: os.DirEntry[str]) -> bool:
    """Whether a link leads to a folder, or in circles, of which a word is due."""
    try:
        return entry.is_dir() or not Path(entry.path).exists()
    except OSError:
        return True


def _lines(text: str, path: Path) -> Iterator[Entry]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if "@@" not in line:
            yield Entry(number, line.strip(), is_folder=True)
            continue
        fields = [field.strip() for field in line.split("@@")]
        if len(fields) not in (2, 3) or not fields[1]:
            raise UnusableFile("expected prompt@@video@@audio", where=f"{path}:{number}")
        yield Entry(number, fields[1], fields[2] if len(fields) == 3 else "", fields[0])


def _csv(text: str, path: Path) -> Iterator[Entry]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    if "video" not in (rows.fieldnames or ()):
        raise UnusableFile("has no column `video`", where=path, fix="columns are video, audio, prompt")
    try:
        for row in rows:
            yield _entry(row, f"{path}:{rows.line_num}", rows.line_num)
    except csv.Error as error:
        raise UnusableFile(f"is not a CSV that can be read: {error}", where=path) from error


def _jsonl(text: str, path: Path) -> Iterator[Entry]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                row = parse_object(line, None, "the line is")
            except AvatarctlError as error:
                raise UnusableFile(error.what, where=where) from error
            yield _entry(row, where, number)


def _entry(row: dict[str, Any], where: str, number: int) -> Entry:
    values = {name: row.get(name) or "" for name in _FIELDS}
    if not all(isinstance(value, str) for value in values.values()) or not values["video"].strip():
        raise UnusableFile("expected `video`, and `audio` and `prompt` if any, as text", where=where)
    return Entry(number, values["video"].strip(), values["audio"].strip(), values["prompt"].strip())
