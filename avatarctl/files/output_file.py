"""A large file written past the page cache, so that writing it costs little more than the disk does.

A file of gigabytes that goes through the page cache takes a page of memory for each of its pages: the system
has to find it, fill it, write it and forget something else for it (figures: docs/log.md, 2026-11-21).
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

__all__ = ["OutputFile"]

_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_BUFFER_BYTES: Final = 4 << 20
"""Of memory in whole pages: a direct write wants address, offset and length in blocks of the device."""
_BUFFERS: Final = 3
_UNSUPPORTED: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY)


class OutputFile:
    """A new file, written from its beginning to its end by a thread, while the next bytes are prepared.

    Writes are direct (O_DIRECT, open(2)) until the system or the file system refuses one, and ordinary from
    there on: it always refuses the last, which fills no block.

    Raises OSError (FileExistsError where there is one) from every method; an error of the thread comes with
    the next call. Leaving the block without an error writes what is left and flushes it to the disk.
    """

    def __init__(self, path: Path) -> None:
        with ExitStack() as stack:
            self._file = stack.enter_context(path.open("xb", buffering=0))
            self._buffers = [stack.enter_context(mmap.mmap(-1, _BUFFER_BYTES)) for _ in range(_BUFFERS)]
            self._direct = _DIRECT != 0 and _set_direct(self._file.fileno(), True)
            self._open = stack.pop_all()
        self._writing: list[Future[None] | None] = [None] * _BUFFERS
        self._current = 0
        self._filled = 0
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
        self._writing[self._current] = self._pool.submit(self._put, self._current, self._filled)
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

    def _put(self, number: int, size: int) -> None:
        done = 0
        with memoryview(self._buffers[number]) as whole:
            while done < size:
                with whole[done:size] as rest:
                    done += self._write(rest)

    def _write(self, data: memoryview) -> int:
        """Bytes written, perhaps fewer than `data`."""
        try:
            count = self._file.write(data)
        except OSError as error:
            if not self._direct or error.errno not in _UNSUPPORTED:
                raise
            self._direct = _set_direct(self._file.fileno(), False)
            return 0
        if not count:  # or it would be tried for ever
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return count


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Whether writes are direct from here on: not every file system has such ones."""
    import fcntl  # where there is O_DIRECT

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _DIRECT * wanted)
    except OSError as error:
        if not wanted or error.errno not in _UNSUPPORTED:
            raise
        return False
    return wanted
