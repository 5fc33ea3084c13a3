"""Which file it was: hashes of sources, computed by a thread while something else is done.

A file of up to 256 MiB is named by its SHA-256. That of gigabytes takes a core as long as copying them, and
no second core helps; so a larger file is named by `sampled_sha256`, the SHA-256 of its size as 8 bytes
(little-endian) and of these parts in their order: its first MiB, the first 4 KiB of every further MiB, and
its last MiB. Training changes whole matrices of megabytes, safetensors states every name and shape in its
beginning and a zip archive the CRC of every record in its end, so what tells two models apart is in it. It
proves nothing against somebody who wants to deceive; the whole SHA-256 is computed where it is asked for.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from avatarctl.files.stamp import FileStamp
from avatarctl.files.strict_json import reading

__all__ = ["FileDigest", "FileHashes"]

_WHOLE_BYTES: Final = 256 << 20
_BLOCK_BYTES: Final = 1 << 20
_SAMPLE_BYTES: Final = 4 << 10


@dataclass(frozen=True)
class FileDigest:
    """Hexadecimal hashes of a file; None for what was not computed. At least one is there."""

    sha256: str | None = None
    sampled_sha256: str | None = None

    @classmethod
    def placeholder(cls, size: int, *, whole: bool) -> FileDigest:
        """The hashes that a file of `size` bytes gets, with zeros for digits."""
        zeros = "0" * 64
        sampled = size > _WHOLE_BYTES
        return cls(zeros if whole or not sampled else None, zeros if sampled else None)

    def entries(self) -> dict[str, str]:
        """The hashes that there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


class FileHashes:
    """Reads files once, one after another, beside the block that it guards.

    whole: compute the SHA-256 of large files too.

    hashlib lets other threads run, so this costs no time of theirs as long as a core is free. Leaving the
    block stops the thread within one block of reading and waits for its end, whatever the reason. A file that
    is another one, or of another size or age, than when its turn was asked for is refused: its hash would be
    of bytes that nobody used.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self._whole = whole
        self._stamps: dict[Path, FileStamp] = {}
        self._work: dict[FileStamp, Future[FileDigest]] = {}
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="file-hashes")

    def __enter__(self) -> FileHashes:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, paths: Iterable[Path]) -> None:
        """Begins with `paths` as they are now; what is being hashed, or was, is not hashed again.

        Raises UnusableWeights where one cannot be read.
        """
        for path in paths:
            with reading(path):
                stamp = FileStamp.of(path.stat())
            self._stamps[path] = stamp
            if stamp not in self._work:
                self._work[stamp] = self._pool.submit(self._digest, path, stamp)

    def check(self) -> None:
        """Raises what stopped the thread, if anything has; returns at once otherwise."""
        for work in self._work.values():
            if work.done():
                work.result()

    def placeholders(self, paths: Sequence[Path]) -> list[FileDigest]:
        """What `digests` will give, with zeros for digits; waits for nothing."""
        return [FileDigest.placeholder(self._stamps[path].size, whole=self._whole) for path in paths]

    def digests(self, paths: Sequence[Path]) -> list[FileDigest]:
        """Hashes of `paths`, all of them begun with; waits for them.

        Raises UnusableWeights where one cannot be read, or has changed.
        """
        return [self._work[self._stamps[path]].result() for path in paths]

    def _digest(self, path: Path, stamp: FileStamp) -> FileDigest:
        asked = FileDigest.placeholder(stamp.size, whole=self._whole)
        sampled = whole = None
        with reading(path), path.open("rb", buffering=0) as file:
            if asked.sampled_sha256:
                sampled = self._hash(struct.pack("<Q", stamp.size), _samples(file, stamp.size))
            if asked.sha256:
                file.seek(0)
                whole = self._hash(b"", _blocks(file))
            stamp.refuse_change(os.fstat(file.fileno()), path)
        return FileDigest(whole, sampled)

    def _hash(self, start: bytes, parts: Iterator[bytes | memoryview]) -> str:
        digest = hashlib.sha256(start)
        for part in parts:
            if self._stop.is_set():
                break
            digest.update(part)
        return digest.hexdigest()


def _samples(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The parts of a file of more than two MiB; fewer bytes where it got shorter meanwhile."""
    yield file.read(_BLOCK_BYTES)
    for offset in range(_BLOCK_BYTES, size, _BLOCK_BYTES):
        file.seek(offset)
        yield file.read(_SAMPLE_BYTES)
    file.seek(size - _BLOCK_BYTES)
    yield file.read(_BLOCK_BYTES)


def _blocks(file: BinaryIO) -> Iterator[memoryview]:
    """The whole file; each block is valid until the next.

    A map lies at the start of a page, as the pages of a file do: copies between them are several times faster
    than to any other place.
    """
    with mmap.mmap(-1, _BLOCK_BYTES) as block, memoryview(block) as buffer:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            with buffer[:count] as part:
                yield part
