"""A file that grows under a visible temporary name for as long as a run takes.

Unlike `atomic.py`, what is written is worth having before it is complete, so it stands as
`NAME.partial.SUFFIX` beside `NAME.SUFFIX` and survives a crash. One living process at a time may
write it; what a dead one left is overwritten by the next run.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from avatarctl.atomic import disk_errors, ensure_writable_folder, flush_folder, held_folder
from avatarctl.errors import OutputRefused

try:
    import fcntl
except ImportError:  # Windows: an open file cannot be replaced there, which protects it as well
    fcntl = None  # type: ignore[assignment]

__all__ = ["GrowingFile", "partial_path"]

_ANOTHER = "choose another --out"


def partial_path(final: Path) -> Path:
    """The name under which `final` grows: `clip.mp4` as `clip.partial.mp4`."""
    return final.with_name(f"{final.stem}.partial{final.suffix}")


def check_video_name(path: Path) -> None:
    """Refuse names that are no name of a finished MP4. Raises OutputRefused."""
    if path.name in ("", "..") or path.suffix.lower() != ".mp4":
        better = f"try {path.stem}.mp4" if path.stem.strip(".") else "name a file"
        raise OutputRefused("the name of a video must end in .mp4", where=path, fix=better)
    if path.stem.lower().endswith(".partial"):
        finished = path.stem[: -len(".partial")] or "video"
        raise OutputRefused(
            "names ending in .partial.mp4 are for videos in the making", where=path, fix=f"try {finished}.mp4"
        )


class GrowingFile:
    """An append-only byte sink at `.path`; ended by `commit`, `keep` or `discard`.

    It can be handed to a multiplexer as its output. Those call `write` from C, where an exception
    cannot travel, so `write` never raises: the first failure is kept in `.error`, `write` returns
    -1 from then on, and `closed` turns True so that the multiplexer does not try a trailer. The
    caller looks at `.error` after each call.

    Raises (on construction):
        OutputRefused: `final` exists and `overwrite` is false, is a folder, the folder cannot be
            written, or another living process writes the same partial file.
        WriteFailed: the disk is full.
    """

    def __init__(self, final: Path, *, overwrite: bool = False) -> None:
        self._descriptor = -1
        self.final = final
        self.path = partial_path(final)
        self.overwrite = overwrite
        self.error: BaseException | None = None
        self._length = self._whole = 0
        with disk_errors(final):
            self._refuse_existing()
        ensure_writable_folder(final.parent)
        with disk_errors(self.path):
            self._descriptor = _open_for_one_writer(self.path)

    @property
    def closed(self) -> bool:
        return self._descriptor < 0 or self.error is not None

    def write(self, data: bytes) -> int:
        """Appends all of `data`; returns its length, or -1 with the reason in `.error`."""
        if self.closed:
            return -1
        try:
            view = memoryview(data)
            while view:  # a disk that fills up takes a part first and fails the next time
                view = view[os.write(self._descriptor, view) :]
        except BaseException as error:
            self.error = error
            return -1
        self._length += len(data)
        return len(data)

    def checkpoint(self) -> None:
        """Everything so far is whole: after a failed write, `trim` cuts the file back to here."""
        self._whole = self._length

    def trim(self) -> None:
        """Cuts off what a failed write tore; does nothing to a file whose writes all went well."""
        if self.error is not None and self._descriptor >= 0:
            with contextlib.suppress(OSError):  # on a disk so broken the tail stays torn
                os.ftruncate(self._descriptor, self._whole)

    @contextlib.contextmanager
    def replaced(self) -> Iterator[Path]:
        """Lends a temporary path beside `path`; when the block ends well, its file takes this one's place.

        At any moment the partial name stands for one whole file: for what has grown until the replacement is
        on the disk, then for that. After an exception the replacement is removed and nothing has changed.

        Raises:
            OutputRefused: the folder can no longer be written.
            WriteFailed: the disk is full.
        """
        with disk_errors(self.path), held_folder(self.path.parent) as folder:
            staged = folder / f"new{self.path.suffix}"
            descriptor = _open_for_one_writer(staged)  # locked before it takes a name that others wait for
            try:
                yield staged
                os.fsync(descriptor)
                if fcntl is None:  # an open file keeps its name there, and there is no lock to lose
                    os.close(descriptor)
                    descriptor = -1
                    self._close()
                staged.replace(self.path)
            except BaseException:
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    os.close(descriptor)
                raise
        self._close()
        self._descriptor = descriptor

    def commit(self) -> Path:
        """Flushes to the disk and renames to the final name, which is returned.

        Raises:
            OutputRefused: the final name appeared meanwhile (the partial file stays).
            WriteFailed: the disk failed at the last moment (the partial file stays).
        """
        self._refuse_existing()
        with disk_errors(self.path):
            if self._descriptor >= 0:  # else `replaced` has flushed and closed it
                os.fsync(self._descriptor)
            if fcntl is None:
                self._close()
            self.path.replace(self.final)
            flush_folder(self.final.parent)
        self._close()
        return self.final

    def keep(self) -> None:
        """Closes the file and leaves it under its partial name."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # what is there stays there, flushed or not
                os.fsync(self._descriptor)
            self._close()

    def discard(self) -> None:
        """Removes the file."""
        if self._descriptor < 0:
            return
        if fcntl is None:
            self._close()
        with disk_errors(self.path):
            self.path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)  # gives up the lock as well

    def _refuse_existing(self) -> None:
        if self.final.is_dir():
            raise OutputRefused("is a folder, not a file", where=self.final, fix=_ANOTHER)
        if not self.overwrite and os.path.lexists(self.final):
            raise OutputRefused("exists", where=self.final, fix="add --overwrite or choose another --out")


def _open_for_one_writer(path: Path) -> int:
    """A descriptor of `path`, empty and locked; raises OSError or `OutputRefused`."""
    # Never through a link: a leftover name must not make us empty a file elsewhere.
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # as far as the system has them
        flags |= getattr(os, name, 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OutputRefused("is not an ordinary file", where=path, fix=f"remove it or {_ANOTHER}")
            _lock(descriptor, path)
            # Between opening and locking its writer may have renamed or removed the file.
            if fcntl is None or _is_still(descriptor, path):
                os.ftruncate(descriptor, 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise OutputRefused(
                "another run is writing this file", where=path, fix=f"wait for it or {_ANOTHER}"
            ) from error
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # file systems without locks
            raise


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        named = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)
