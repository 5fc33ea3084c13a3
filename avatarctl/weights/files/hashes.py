"""SHA-256 of whole files, computed by a thread while something else is done."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final

from avatarctl.errors import UnusableWeights
from avatarctl.weights.tensors import FileStamp

__all__ = ["FileHashes"]

_BLOCK_BYTES: Final = 1 << 20


class FileHashes:
    """Reads `paths` once, one after another, beside the block that it guards.

    hashlib lets other threads run, so this costs no time of theirs as long as a core is free. Leaving the
    block stops the thread within one block of reading and waits for its end, whatever the reason. A file that
    is another one, or of another size or age, than when the block began is refused: its hash would be of
    bytes that nobody used.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._stamps: list[FileStamp] = []
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="file-hashes")
        self._work: Future[list[str]] | None = None

    def __enter__(self) -> FileHashes:
        self._stamps = [_stamp(path) for path in self._paths]
        self._work = self._pool.submit(self._run)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True)

    def check(self) -> None:
        """Raises what stopped the thread, if anything has; returns at once otherwise."""
        if self._work is not None and self._work.done():
            self._work.result()

    def result(self) -> list[str]:
        """Hexadecimal digests in the order of the paths; waits for them.

        Raises:
            UnusableWeights: a file cannot be read.
        """
        if self._work is None:
            raise RuntimeError("FileHashes gives results inside its with block only")
        return self._work.result()

    def _run(self) -> list[str]:
        return [self._hash(path, stamp) for path, stamp in zip(self._paths, self._stamps, strict=True)]

    def _hash(self, path: Path, stamp: FileStamp) -> str:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        try:
            with path.open("rb", buffering=0) as file:
                while not self._stop.is_set() and (count := file.readinto(buffer)):
                    digest.update(buffer[:count])
                stamp.refuse_change(os.fstat(file.fileno()), path)
        except OSError as error:
            raise UnusableWeights(f"cannot be read: {error.strerror}", where=path) from error
        return digest.hexdigest()


def _stamp(path: Path) -> FileStamp:
    try:
        return FileStamp.of(path.stat())
    except OSError as error:
        raise UnusableWeights(f"cannot be read: {error.strerror}", where=path) from error
