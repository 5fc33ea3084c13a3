"""What was found out about files, so that it is found out once: hashes, lengths, fingerprints.

A file is known by its size and the time of its last change. Each process appends to a file of its own, a
line for each fact, so that a run that was killed loses at most the line that it was writing; the others are
read by whoever comes next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from avatarctl.atomic import disk_errors

__all__ = ["Known"]


class Known:
    """Facts of files by path; a context manager.

    folder: where the records of all processes lie; base: what the paths in them are relative to; name: of
    this process's record.
    """

    def __init__(self, folder: Path, base: Path, name: str, *, keep: bool = True) -> None:
        self._base, self._own = base, folder / f"{name}.jsonl"
        self._facts: dict[tuple[str, str], tuple[list[int], dict[str, Any]]] = {}
        self._keep = keep
        self._file: TextIO | None = None
        for record in sorted(folder.glob("*.jsonl")):
            self._read(record)

    def facts(self, path: Path, kind: str, find: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """What `find` says of a file, asked again only where it has changed. kind: a file with video and
        audio is known as both. Raises what `find` raises, and OSError for a file that is not there."""
        facts = self.recall(path, kind)
        if facts is None:
            stamp = _stamp(path)
            facts = find(path)
            self._remember(path, kind, stamp, facts)
        return facts

    def recall(self, path: Path, kind: str) -> dict[str, Any] | None:
        """The facts of a file as it is now; None where there are none. Raises OSError without the file."""
        stamp, entry = _stamp(path), self._facts.get((self._key(path), kind))
        return entry[1] if entry is not None and entry[0] == stamp else None

    def note(self, path: Path, kind: str, facts: dict[str, Any]) -> None:
        """Remembers facts of a file as it is now."""
        self._remember(path, kind, _stamp(path), facts)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _remember(self, path: Path, kind: str, stamp: list[int], facts: dict[str, Any]) -> None:
        key = self._key(path)
        self._facts[key, kind] = (stamp, facts)
        if not self._keep:
            return
        with disk_errors(self._own):
            if self._file is None:
                self._own.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._own.open("a", encoding="utf-8")
                if self._file.tell():
                    self._file.write("\n")  # behind a line that a killed run left unfinished
            self._file.write(json.dumps([key, kind, stamp, facts]) + "\n")
            self._file.flush()

    def _key(self, path: Path) -> str:
        # Bytes that are no UTF-8 come as half surrogates, which JSON escapes.
        return os.path.relpath(path, self._base)

    def _read(self, record: Path) -> None:
        for line in record.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                key, kind, stamp, facts = json.loads(line)
            except ValueError:  # a line that was cut off says nothing; what it was about is found out again
                continue
            if isinstance(key, str) and isinstance(kind, str) and isinstance(facts, dict):
                self._facts[key, kind] = (stamp, facts)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
