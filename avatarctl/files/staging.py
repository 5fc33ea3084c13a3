"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from avatarctl.atomic import disk_errors, flush_file, flush_folder, held_folder
from avatarctl.errors import OutputRefused

__all__ = ["refuse_folder", "staged_folder"]

_OURS: Final = re.compile(
    r"(adapter_)?config\.json"
    r"|(diffusion_pytorch_model|pytorch_model|model|adapter_model|pytorch_lora_weights)"
    r"((\.patch)?\.safetensors|-\d{5,}-of-\d{5,}\.safetensors|\.safetensors\.index\.json)"
)
"""Every name that a conversion gives in a folder, whatever its target; a folder with anything else in it is
not ours to remove."""


@contextlib.contextmanager
def staged_folder(final: Path, *, overwrite: bool, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """Lends a temporary folder beside `final`; it becomes `final` when the block ends well.

    Every file in it is flushed to the disk before. After any exception (KeyboardInterrupt too) it is
    removed and an older `final` is what it was. What appears at the place meanwhile is judged as what was
    there at first: nothing is replaced without `overwrite`, and nothing that is not ours with it. With
    `overwrite` an older folder is renamed aside, replaced and then removed. No system call of Python
    exchanges two folders at once: a kill between the two renames leaves the older one, complete, as
    `.old-…` beside the place.

    sources: files that are read meanwhile; a folder that holds one is not replaced.

    Raises:
        OutputRefused: `final` exists (without `overwrite`), is not a folder, holds a source or anything
            but files that a conversion writes; or its parent cannot be written.
        WriteFailed: the disk is full.
    """
    refuse_folder(final, overwrite=overwrite, sources=sources)
    with contextlib.ExitStack() as stack:
        with disk_errors(final):
            temporary = stack.enter_context(held_folder(final.parent))
        with disk_errors(final, refusals=False):
            yield temporary
        with disk_errors(final):
            _flush_tree(temporary)
            refuse_folder(final, overwrite=overwrite, sources=sources)  # that was long ago
            if overwrite:
                _replace(temporary, final, final.with_name(f".old-{secrets.token_hex(8)}"))
            else:
                _name_new(temporary, final)


def refuse_folder(final: Path, *, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Raises OutputRefused for a place that `staged_folder` would refuse; touches nothing."""
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
        _refuse_strangers(final, final)
        inside = os.path.realpath(final)  # unlike Path.resolve, no RuntimeError for a loop of links
        if any(Path(os.path.realpath(source)).is_relative_to(inside) for source in sources):
            raise OutputRefused("holds a file that is read", where=final, fix="choose another --out")


def _refuse_strangers(folder: Path, told_as: Path) -> None:
    """Raises OutputRefused for a folder that holds anything but files with names that we give."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if not (_OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)):
            raise OutputRefused(
                f"holds {entry.name}, which no conversion writes",
                where=told_as,
                fix="choose another --out, or remove the folder yourself",
            )


def _flush_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            flush_file(Path(place, name))
        flush_folder(Path(place))


def _name_new(temporary: Path, final: Path) -> None:
    """A rename that replaces nothing: of folders it fails where anything but an empty one stands."""
    try:
        temporary.rename(final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise OutputRefused("exists", where=final, fix="choose another --out or --overwrite") from error
    flush_folder(final.parent)


def _replace(temporary: Path, final: Path, aside: Path) -> None:
    older = final.exists()
    try:
        if older:
            final.rename(aside)
            _refuse_strangers(aside, final)  # under a name that nobody else knows
        temporary.rename(final)
    except BaseException:
        if aside.exists() and not final.exists():
            aside.rename(final)
        raise
    flush_folder(final.parent)
    if older:
        shutil.rmtree(aside)
