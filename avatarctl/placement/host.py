"""Memory that this process may still take of its machine, and which limit says so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Room", "free_on_the_host"]

_UNLIMITED = 1 << 60
"""Version 1 of cgroups writes "no limit" as a number near 2^63."""


@dataclass(frozen=True)
class Room:
    """size: bytes; limit: what they are counted by, for people."""

    size: int
    limit: str


def free_on_the_host(root: Path = Path("/")) -> Room | None:
    """The smallest of what the machine has free and what each container around this process leaves; None
    where nothing tells (other systems than Linux).

    What a container has cached of files it gives back by itself, so it counts as free: with mapped weights
    that is most of what is in use. root: where /proc and /sys are, for tests.
    """
    rooms = [*_of_machine(root), *_of_containers(root)]
    return min(rooms, key=lambda room: room.size, default=None)


def _of_machine(root: Path) -> Iterator[Room]:
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE)
    if found:
        yield Room(int(found[1]) * 1024, "of the machine (MemAvailable in /proc/meminfo)")


def _of_containers(root: Path) -> Iterator[Room]:
    """By /proc/self/cgroup; each folder up to the root may have a limit of its own. Inside a container the
    folders above are not to be seen, and its own is often the root."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            base, most, used, cached = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, most, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        place = Path(path.lstrip("/"))
        for folder in (place, *place.parents):
            where = root / base / folder
            limit, taken = _number(where / most), _number(where / used)
            if limit is None or taken is None or limit >= _UNLIMITED:
                continue
            stat = re.search(rf"^{cached} (\d+)$", _text(where / "memory.stat"), re.MULTILINE)
            free = max(0, limit - taken + (int(stat[1]) if stat else 0))
            yield Room(free, f"of the container ({most} in /{(Path(base) / folder).as_posix()})")


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """Empty where there is no such file, or nobody may read it: then it limits nothing that we know of."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
