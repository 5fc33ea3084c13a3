"""Files that appear whole or not at all, and disk errors told in one line.

A file is written under a temporary name in its own folder, flushed to the disk, and renamed: a
reader, a crash or a power cut never meets half of it. `video.py` writes files that grow for hours
and uses only the error translation and the flushing from here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from avatarctl.errors import OutputRefused, WriteFailed

__all__ = [
    "atomic_path",
    "atomic_write_bytes",
    "atomic_write_text",
    "disk_errors",
    "ensure_writable_folder",
    "flush_file",
    "flush_folder",
    "removed_after_failure",
]

_FAILED = {
    errno.ENOSPC: "no space left on the device",
    errno.EFBIG: "no space left: the file reached the size limit of this process or file system",
    errno.EDQUOT: "no space left in the disk quota of this user",
    errno.EIO: "the device reported an input/output error while writing",
}
_REFUSED = {
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "is a folder, not a file",
    errno.ENOENT: "the folder does not exist",
    errno.ENAMETOOLONG: "the file name is too long for the file system",
    errno.ELOOP: "the path leads through a loop of symbolic links",
}


@contextlib.contextmanager
def disk_errors(path: Path, *, refusals: bool = True) -> Iterator[None]:
    """Translates what the disk says about `path` into this project's errors.

    A full or failing disk (ENOSPC, EFBIG, EDQUOT, EIO) becomes `WriteFailed`. With `refusals`, a place that
    cannot be written (permissions, read-only, not a folder, ...) becomes `OutputRefused`;
    without it such an error passes unchanged, because foreign code inside the block may have
    met it on quite another path.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FAILED:
            raise WriteFailed(
                _FAILED[error.errno], where=path, fix="free some space or choose another --out"
            ) from error
        if refusals and error.errno in _REFUSED:
            raise OutputRefused(_REFUSED[error.errno], where=path, fix="choose another --out") from error
        raise


@contextlib.contextmanager
def atomic_path(final: Path, *, replace: bool = True) -> Iterator[Path]:
    """Lends a temporary path beside `final`; renames it to `final` when the block ends well.

    Without `replace` a `final` that exists by then, however late it came, is refused and stays.

    The file under the temporary path is flushed to the disk before the rename and its folder
    after it. After any exception (KeyboardInterrupt too) it is removed and an older `final`
    stays as it was. The temporary name is short whatever the length of the final one, and has
    the same suffix, because some writers choose a format by it or append it.

    Raises:
        OutputRefused: the folder or the name cannot be written, or exists (without `replace`).
        WriteFailed: the disk is full.
    """
    suffix = final.suffix if len(os.fsencode(final.suffix)) <= 32 else ""
    temporary = final.with_name(f".tmp-{secrets.token_hex(8)}{suffix}")
    try:
        with disk_errors(final, refusals=False):
            yield temporary
        with disk_errors(final):
            flush_file(temporary)
            if replace:
                temporary.replace(final)
            else:
                _name_new(temporary, final)
            flush_folder(final.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def _name_new(temporary: Path, final: Path) -> None:
    """A rename of a file that replaces nothing: a second name, which is never given twice, then one less."""
    exists = OutputRefused("exists", where=final, fix="add --overwrite or choose another --out")
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise exists from None
    except OSError:  # a file system without links; the rename tells what else may be wrong
        if os.path.lexists(final):
            raise exists from None
        temporary.rename(final)
    else:
        temporary.unlink()


@contextlib.contextmanager
def removed_after_failure(files: Sequence[Path]) -> Iterator[None]:
    """Removes `files`, as far as they are there, after any exception: all of a set or none of it.
    The sequence may grow within the block."""
    try:
        yield
    except BaseException:
        for path in files:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                path.unlink(missing_ok=True)
        raise


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` as a whole or not at all; raises as `atomic_path` does."""
    with atomic_path(path) as temporary, disk_errors(path):
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 with line ends unchanged; otherwise `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def ensure_writable_folder(folder: Path) -> None:
    """Makes `folder` (and its parents) if absent and proves that a file can be created in it.

    A real file is created and removed: permission bits alone say nothing about read-only
    mounts, access lists or a privileged user.

    Raises:
        OutputRefused: not a folder, no permission, read-only.
        WriteFailed: the disk is too full to create a file.
    """
    probe = folder / f".tmp-{secrets.token_hex(8)}"
    with disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputRefused("is a file, not a folder", where=folder, fix="choose another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # a dangling link in the way
            raise OutputRefused(
                "is not a folder", where=error.filename or folder, fix="choose another --out"
            ) from error
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)


def flush_file(path: Path) -> None:
    """Waits until the bytes of `path` are on the disk; raises OSError."""
    # Windows flushes only handles that may write; elsewhere reading is enough.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Waits until the names in `folder` are on the disk, where the system can; raises OSError."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems without it
            raise
    finally:
        os.close(descriptor)
