"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from avatarctl.atomic import disk_errors, flush_file, flush_folder
from avatarctl.errors import OutputRefused

__all__ = ["staged_folder"]

_WEIGHT_SUFFIXES: Final = frozenset({".safetensors", ".json", ".pt"})
"""What a conversion writes; a folder with anything else in it is not ours to remove."""


@contextlib.contextmanager
def staged_folder(final: Path, *, overwrite: bool, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """Lends a temporary folder beside `final`; it becomes `final` when the block ends well.

    Every file in it is flushed to the disk before. After any exception (KeyboardInterrupt too) it is
    removed and an older `final` is what it was. With `overwrite` an older folder is renamed aside,
    replaced and then removed. No system call of Python exchanges two folders at once: a kill between
    the two renames leaves the older one, complete, as `.old-…` beside the place.

    sources: files that are read meanwhile; a folder that holds one is not replaced.

    Raises:
        OutputRefused: `final` exists (without `overwrite`), is not a folder, holds a source or files that
            no conversion writes; or its parent cannot be written.
        WriteFailed: the disk is full.
    """
    _refuse_place(final, overwrite, sources)
    mark = secrets.token_hex(8)
    temporary = final.with_name(f".tmp-{mark}")
    try:
        with disk_errors(final):
            temporary.mkdir()
        with disk_errors(final, refusals=False):
            yield temporary
        with disk_errors(final):
            _flush_tree(temporary)
            _replace(temporary, final, final.with_name(f".old-{mark}"))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # the first error is the one to tell
        raise


def _refuse_place(final: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    if final.name in ("", ".."):
        raise OutputRefused("names no folder of its own", where=final, fix="choose another --out")
    with disk_errors(final):
        try:
            mode = final.lstat().st_mode
        except FileNotFoundError:
            return
        if stat.S_ISLNK(mode):
            raise OutputRefused("is a symbolic link", where=final, fix="name the folder that it points to")
        if not stat.S_ISDIR(mode):
            raise OutputRefused("is a file, not a folder", where=final, fix="choose another --out")
        if not overwrite:
            raise OutputRefused("exists", where=final, fix="choose another --out or --overwrite")
        for path in sorted(final.rglob("*")):
            if path.is_symlink() or not (path.is_dir() or path.suffix in _WEIGHT_SUFFIXES):
                raise OutputRefused(
                    f"holds {path.relative_to(final)}, which no conversion writes",
                    where=final,
                    fix="choose another --out, or remove the folder yourself",
                )
        inside = final.resolve()
        if any(source.resolve().is_relative_to(inside) for source in sources):
            raise OutputRefused("holds a file that is read", where=final, fix="choose another --out")


def _flush_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            flush_file(Path(place, name))
        flush_folder(Path(place))


def _replace(temporary: Path, final: Path, aside: Path) -> None:
    older = final.exists()
    try:
        if older:
            final.rename(aside)
        temporary.rename(final)
    except BaseException:
        if aside.exists() and not final.exists():
            aside.rename(final)
        raise
    flush_folder(final.parent)
    if older:
        shutil.rmtree(aside)
