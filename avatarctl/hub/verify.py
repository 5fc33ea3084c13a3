"""`models verify`: the bytes on this disk against the digests that the hub stated.

What was fetched by the hub's client or by `models pull` carries its digest with it, so that nobody is asked;
for other files the hub is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from avatarctl.errors import AvatarctlError, Interrupted
from avatarctl.events import BytesMoved, Emit
from avatarctl.hub.client import Listing, digest_of, list_files
from avatarctl.hub.locate import locate
from avatarctl.hub.store import recorded_digest
from avatarctl.registry import Row

__all__ = ["Checked", "verify"]

State = Literal["ok", "damaged", "missing", "not checked"]

_IN_NAME: Final = re.compile(r"-([0-9a-f]{8,64})\.pth")
"""torchvision names its files by the first digits of their SHA-256 (documented at
`torch.hub.load_state_dict_from_url`)."""


@dataclass(frozen=True)
class Checked:
    """One file of a row. path: None if it is missing; why: the reason for any state but "ok"."""

    row: str
    name: str
    path: Path | None
    state: State
    why: str = ""


def verify(
    rows: Iterable[Row], weights_root: str | None, emit: Emit, should_stop: Callable[[], bool]
) -> Iterator[Checked]:
    """Checks every file of these rows, one after the other. Raises Interrupted if `should_stop()`."""
    listing = cache(_listing)  # asked for when a file needs one
    for row in rows:
        located = locate(row, weights_root)
        # One converted file may stand in for many.
        names_of = {path: row.accepted(names) for names, path in located.files.items()}
        for path, names in names_of.items():
            for place, name in _files(names, path):
                yield _check(row, place, name, listing, emit, should_stop)
        for wanted in located.missing:
            fetch = "fetch it, or " if row.hub_id else ""
            why = f"not here: {fetch}put it in {wanted.folder}/"
            yield Checked(row.name, wanted.file, None, "missing", why)


def _listing(repo: str) -> Listing | str:
    """What the hub states about a repository, or why that is not known."""
    try:
        return list_files(repo)
    except AvatarctlError as error:
        return error.what


def _files(names: str, path: Path) -> Iterator[tuple[Path, str]]:
    """(folder of the repository, name in it) of a file, or of every file of a folder."""
    parts = next(
        parts for name in names.split("|") if path.parts[-len(parts := PurePosixPath(name).parts) :] == parts
    )
    place = path.parents[len(parts) - 1]
    if not path.is_dir():
        yield place, PurePosixPath(*parts).as_posix()
        return
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(place)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield place, relative.as_posix()


def _check(
    row: Row,
    place: Path,
    name: str,
    listing: Callable[[str], Listing | str],
    emit: Emit,
    should_stop: Callable[[], bool],
) -> Checked:
    path = place / name

    def progress(done: int) -> None:
        emit(BytesMoved(f"checking {path}", done, path.stat().st_size))
        if should_stop():
            raise Interrupted("stopped", where=path)

    expected = row.sha256.get(name) or recorded_digest(place, name)
    if not expected and not row.hub_id:
        return _check_name(row, path, name, progress)
    if not expected:
        known = listing(row.hub_id)
        if isinstance(known, str):
            return Checked(row.name, name, path, "not checked", known)
        if (stated := known.files.get(name)) is None:
            return Checked(row.name, name, path, "not checked", "the repository has no such file")
        size = path.stat().st_size
        if stated.size is not None and size != stated.size:
            why = f"it has {size} bytes, the hub's has {stated.size}"
            return Checked(row.name, name, path, "damaged", why)
        expected = stated.digest
    if digest_of(path, expected, progress) == expected:
        return Checked(row.name, name, path, "ok")
    kind = "SHA-256" if len(expected) == 64 else "SHA-1"
    return Checked(row.name, name, path, "damaged", f"its {kind} is not {expected}")


def _check_name(row: Row, path: Path, name: str, progress: Callable[[int], None]) -> Checked:
    """A file without a repository: only its name may say what its bytes are."""
    stated = _IN_NAME.search(name)
    if stated is None:
        return Checked(row.name, name, path, "not checked", "no digest of it is published")
    if digest_of(path, "0" * 64, progress).startswith(stated[1]):
        return Checked(row.name, name, path, "ok")
    return Checked(row.name, name, path, "damaged", f"its SHA-256 does not begin with {stated[1]}")
