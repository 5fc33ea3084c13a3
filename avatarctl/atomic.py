"""Files that appear whole or not at all, and disk errors told in one line.

A file is written in a hidden folder beside its place, flushed to the disk, and renamed: a
reader, a crash or a power cut never meets half of it. `video.py` writes files that grow for hours
and uses only the error translation and the flushing from here.

Who makes a hidden folder holds its lock (flock(2)) for as long as it lives, so that a later run can tell a
dead run's from a living one's. A lock says so only to processes that see it, and network file systems may
keep it to one machine, or to one mount. The name therefore holds a mark of the boot and the mount that it was
locked under: a lock is believed where the mark is one's own, or the disk is one that a single machine has.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from avatarctl.errors import OutputRefused, WriteFailed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "atomic_path",
    "atomic_write_bytes",
    "atomic_write_text",
    "disk_errors",
    "ensure_writable_folder",
    "flush_file",
    "flush_folder",
    "held_folder",
    "remove_folder",
    "remove_left_behind",
    "removed_after_failure",
]

_TEMPORARY: Final = re.compile(r"\.tmp-(?:(?P<mark>[0-9a-f]{8})-)?[0-9a-f]{16}(\.[^.]+)?", re.DOTALL)
"""Names of hidden folders. Older versions made files too, without a mark and without a lock."""
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
"""A number that Linux draws when it starts (random(4)); containers on one kernel share it."""

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
    """Lends a temporary path in a hidden folder beside `final`; renames it to `final` when the block ends
    well.

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
    with contextlib.ExitStack() as stack:
        with disk_errors(final):
            temporary = stack.enter_context(held_folder(final.parent)) / f"new{suffix}"
        with disk_errors(final, refusals=False):
            yield temporary
        with disk_errors(final):
            flush_file(temporary)
            if replace:
                temporary.replace(final)
            else:
                _name_new(temporary, final)
            flush_folder(final.parent)


@contextlib.contextmanager
def held_folder(parent: Path) -> Iterator[Path]:
    """Lends a new hidden folder in `parent`, locked as long as the block lasts, then removed with what is
    still in it. It may be renamed meanwhile. Raises OSError."""
    folder, lock = _make_held(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # the next run in this folder tries again, and says so
        if lock is not None:
            os.close(lock)


def remove_folder(folder: Path) -> None:
    """Removes a folder at once, for whoever looks for its name: it is hidden before it is emptied, so that a
    kill leaves no half of it. Raises OSError."""
    with held_folder(folder.parent) as hidden:
        folder.rename(hidden / folder.name)


def _make_held(parent: Path) -> tuple[Path, int | None]:
    mark = _mark(parent)
    while True:
        folder = parent / (f".tmp-{mark}-" if mark else ".tmp-")
        folder = folder.with_name(folder.name + secrets.token_hex(8))
        folder.mkdir()
        if not mark:
            return folder, None
        try:
            lock = _lock(folder)
        except FileNotFoundError:  # before it was locked, another run took it for a dead one's
            continue
        except OSError:  # no locks here: a name that nobody ever takes for a dead one's
            folder.rmdir()
            mark = ""
            continue
        if lock is not None:
            return folder, lock


def _mark(parent: Path) -> str:
    """Eight digits for this boot of this machine and this mount of a file system; empty where not known."""
    if fcntl is None or not _BOOT.is_file():
        return ""
    return hashlib.sha256(f"{_BOOT.read_text()} {parent.stat().st_dev}".encode()).hexdigest()[:8]


def _lock(path: Path) -> int | None:
    """A descriptor that has the lock of `path` until it is closed; None if another has it, or `path` was
    renamed before. Raises OSError where there are no locks, or nothing is there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    held = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(descriptor), path.lstat())
    except BlockingIOError:
        pass
    finally:
        if not held:
            os.close(descriptor)
    return descriptor if held else None


def remove_left_behind(folder: Path) -> Iterator[str]:
    """Removes from `folder` what dead runs left hidden in it; yields a line for each, and for what cannot be
    told from a living run's or cannot be removed. What a living run holds stays without a word."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
    except OSError:  # who writes there finds the same, and says it of the file
        return
    for name in names:
        path = folder / name
        if (match := _TEMPORARY.fullmatch(name)) is None:
            continue
        try:
            if not _is_told_by_its_lock(path, match["mark"]):
                yield (
                    f"{path} may be what a dead run left, or a run on another machine still uses: remove it "
                    "yourself if none does"
                )
            elif _remove_unheld(path):
                yield f"removed {path}, which a run left that did not end"
        except FileNotFoundError:
            continue  # its run ended just now
        except OSError as error:
            yield f"{path} is left, perhaps by a dead run, and cannot be removed: {error.strerror}"


def _is_told_by_its_lock(path: Path, mark: str | None) -> bool:
    """Whether nobody can be using `path` when nobody is seen to have its lock. On Linux a device with the
    major number of a driver is a disk of this machine; networks, overlays and memory have none."""
    if fcntl is None or not mark:
        return False
    return mark == _mark(path.parent) or (sys.platform == "linux" and os.major(path.lstat().st_dev) != 0)


def _remove_unheld(path: Path) -> bool:
    lock = _lock(path)
    if lock is None:
        return False
    try:
        if stat.S_ISDIR(os.fstat(lock).st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(lock)
    return True


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
    with disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise OutputRefused("is a file, not a folder", where=folder, fix="choose another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # a dangling link in the way
            raise OutputRefused(
                "is not a folder", where=error.filename or folder, fix="choose another --out"
            ) from error
        with held_folder(folder) as probe:
            (probe / "probe").touch(exist_ok=False)


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
