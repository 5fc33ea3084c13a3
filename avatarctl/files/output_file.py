"""A large file written past the page cache, so that writing it costs little more than the disk does.

A file of gigabytes that goes through the page cache takes a page of memory for each of its pages: the system
has to find it, fill it, write it and forget something else for it. Measured on two virtual cores with 2.8 GB:
1 to 7 seconds of system time through the cache, 0.6 past it. Where a file system has no such writes
(O_DIRECT, open(2)) the cache is used, flushed early.
"""

from __future__ import annotations

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final

from avatarctl.files.flushing import EarlyFlush

__all__ = ["OutputFile"]

_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_ALIGNMENT: Final = 4096
"""Address, offset and length of a direct write are multiples of the block size of the device, 512 or 4096."""
_BUFFER_BYTES: Final = 4 << 20
_BUFFERS: Final = 3
_CACHED_BYTES: Final = 256 << 10
"""One write through the cache; measured: of larger ones the system makes larger pages, at several times
the cost."""
_UNSUPPORTED: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY)


class OutputFile:
    """A new file, written from its beginning to its end by a thread, while the next bytes are prepared.

    Raises OSError (FileExistsError where there is one) from every method; an error of the thread comes with
    the next call. Leaving the block without an error writes what is left and flushes it to the disk.
    """

    def __init__(self, path: Path) -> None:
        with ExitStack() as stack:
            self._file = stack.enter_context(path.open("xb", buffering=0))
            self._direct = _open_direct(path)
            if self._direct is not None:
                stack.callback(os.close, self._direct)
            self._buffers = [stack.enter_context(mmap.mmap(-1, _BUFFER_BYTES)) for _ in range(_BUFFERS)]
            self._open = stack.pop_all()
        self._early = EarlyFlush(self._file) if self._direct is None else None
        self._writing: list[Future[None] | None] = [None] * _BUFFERS
        self._current = 0
        self._filled = 0
        self._offset = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="output-file")

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            try:
                if error is None:
                    self._finish()
            finally:
                self._pool.shutdown(wait=True, cancel_futures=True)
                if self._early is not None:
                    self._early.__exit__(kind, error, trace)

    def write(self, data: memoryview) -> None:
        """Takes a copy of `data`, whose elements are bytes."""
        done = 0
        while done < len(data):
            buffer = self._buffers[self._current]
            count = min(len(data) - done, _BUFFER_BYTES - self._filled)
            buffer[self._filled : self._filled + count] = data[done : done + count]
            done += count
            self._filled += count
            if self._filled == _BUFFER_BYTES:
                self._hand_over()

    def _hand_over(self) -> None:
        """Gives the filled buffer to the thread and waits until the next one is free."""
        self._writing[self._current] = self._pool.submit(self._put, self._current, self._filled, self._offset)
        self._offset += self._filled
        self._filled = 0
        self._current = (self._current + 1) % _BUFFERS
        if (before := self._writing[self._current]) is not None:
            before.result()

    def _finish(self) -> None:
        if self._filled:
            self._hand_over()
        for work in self._writing:
            if work is not None:
                work.result()
        os.fsync(self._file.fileno())

    def _put(self, number: int, size: int, offset: int) -> None:
        """Writes `size` bytes of a buffer at `offset`: whole blocks directly, the rest through the cache."""
        with memoryview(self._buffers[number]) as whole, whole[:size] as data:
            done = 0
            if self._direct is not None:
                with data[: size - size % _ALIGNMENT] as blocks:
                    done = self._put_directly(blocks, offset)
            self._file.seek(offset + done)
            while done < size:
                with data[done : done + _CACHED_BYTES] as piece:
                    count = self._file.write(piece)
                if not count:  # or it would be tried for ever
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                done += count
                if self._early is not None:
                    self._early.wrote(count)

    def _put_directly(self, data: memoryview, offset: int) -> int:
        """Bytes written; fewer than `data` where the disk or the file system took no more."""
        assert self._direct is not None
        done = 0
        while done < len(data) and done % _ALIGNMENT == 0:
            try:
                with data[done:] as rest:
                    count = os.pwrite(self._direct, rest, offset + done)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                break
            if not count:
                break
            done += count
        return done


def _open_direct(path: Path) -> int | None:
    """A descriptor for direct writes; None where the system or the file system has none."""
    if not _DIRECT:
        return None
    try:
        return os.open(path, os.O_WRONLY | _DIRECT)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
