"""The look at a path that comes before any decoder sees it."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from avatarctl.errors import PathNotFound, UnusableFile

__all__ = ["check_regular_file", "file_identity", "file_sha256"]

_HASH_BLOCK = 1 << 20


def check_regular_file(path: str | Path, kind_error: type[UnusableFile]) -> Path:
    """`path` as a Path, if it is a readable regular file with at least one byte.

    Nothing is opened, so a named pipe cannot block and a device cannot be read without end.

    Raises PathNotFound when nothing is there (a dangling or circular link included), `kind_error`
    when something is there that cannot be used: a folder, pipe, socket or device, an empty file,
    or one without read permission.
    """
    checked = Path(path)
    try:
        status = checked.stat()
    except PermissionError as error:
        raise kind_error("permission denied", where=path) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise _not_found(path, error) from error
    if stat.S_ISDIR(status.st_mode):
        raise kind_error("is a directory, not a file", where=path)
    if not stat.S_ISREG(status.st_mode):
        raise kind_error("is a device, pipe or socket, not a file", where=path)
    if status.st_size == 0:
        raise kind_error("is empty (0 bytes)", where=path)
    if not os.access(checked, os.R_OK):
        raise kind_error("permission denied", where=path)
    return checked


def _not_found(path: str | Path, error: Exception) -> PathNotFound:
    if "://" in str(path):
        return PathNotFound("is an address, not a file", where=path, fix="download it first")
    try:
        is_link = Path(path).is_symlink()
    except (OSError, ValueError):
        is_link = False
    if is_link:
        return PathNotFound("is a link that leads nowhere", where=path)
    if isinstance(error, FileNotFoundError):
        return PathNotFound("no such file", where=path)
    cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return PathNotFound(f"no such file: {cause}", where=path)


def file_sha256(path: Path) -> str:
    """SHA-256 of the bytes of a file, as hexadecimal digits, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_identity(path: Path, kind_error: type[UnusableFile]) -> tuple[int, ...]:
    """What changes when a file is written or replaced: what is read in parts is compared by it.

    Raises `kind_error` when the file cannot be looked at any more.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise kind_error(f"cannot be read any more: {os.strerror(error.errno or 0)}", where=path) from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
