"""Whether a file is still the one that was looked at."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from avatarctl.errors import UnusableWeights

__all__ = ["FileStamp"]


@dataclass(frozen=True)
class FileStamp:
    """What tells one state of a file from another without reading it (stat(2)); times in nanoseconds."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def refuse_change(self, status: os.stat_result, path: Path) -> None:
        """Raises UnusableWeights if the file is no longer what it was."""
        if self.of(status) != self:
            raise UnusableWeights(
                "changed while it was read", where=path, fix="run the command again when nobody writes it"
            )
