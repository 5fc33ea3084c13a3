"""Memory of the host that this process may have, within the limits of containers and `ulimit`.

Torch is not needed for it. To a process in a container the system states the memory of the whole machine;
what it may take stands in its control group (of the kernel's documentation: `admin-guide/cgroup-v2.rst`,
`admin-guide/cgroup-v1/memory.rst`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["HostMemory", "host_memory"]

_NO_LIMIT: Final = 1 << 60
"""Version 1 of control groups states "none" as a huge number."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes that this process can ever have, and that are free for it now; limit: what sets them, in words.
    None where the system does not tell."""

    total: int | None
    free: int | None
    limit: str


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The smallest of all limits. root: of the file system, for tests."""
    found = [("the machine", *_of_machine(root)), *_of_control_groups(root), *_of_process(root)]
    known = [(total, free, who) for who, total, free in found if total is not None]
    if not known:
        return HostMemory(None, None, "the system does not tell")
    total = min(each[0] for each in known)
    free, who = min(((total if each is None else each), who) for total, each, who in known)
    if all(each is None for _, each, _ in known):
        return HostMemory(total, None, min(known, key=lambda each: each[0])[2])
    return HostMemory(total, max(free, 0), who)


def _of_machine(root: Path) -> tuple[int | None, int | None]:
    """All of it, and what is free: as the kernel estimates it, caches that it would give up included."""
    said = dict(re.findall(r"^(\w+):\s*(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE))
    if "MemTotal" in said:
        free = said.get("MemAvailable")
        return int(said["MemTotal"]) * 1024, None if free is None else int(free) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (AttributeError, ValueError, OSError):  # no POSIX system, or one that does not know the names
        return None, None


def _of_control_groups(root: Path) -> Iterator[tuple[str, int | None, int | None]]:
    """Of this process's group and of all above it: each may set a limit."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, inside = [*line.split(":", 2), "", ""][:3]
        names = ("memory.max", "memory.current")
        top = root / "sys/fs/cgroup"
        if controllers:
            if "memory" not in controllers.split(","):
                continue
            top, names = top / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        group = Path(inside.lstrip("/"))
        # Within a container the path is often that of the host, and only the top is there.
        for folder in dict.fromkeys((top / group, *(top / each for each in group.parents), top)):
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and limit < _NO_LIMIT:
                spare = _number_of(_text(folder / "memory.stat"), "inactive_file")
                free = None if used is None else limit - used + (spare or 0)
                where = f"/{(folder / names[0]).relative_to(root).as_posix()}"
                yield f"the container ({where})", limit, free


def _of_process(root: Path) -> Iterator[tuple[str, int | None, int | None]]:
    """`ulimit -v`."""
    if sys.platform == "win32" or root != Path("/"):
        return
    import resource  # absent on Windows

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        pages = _text(root / "proc/self/statm").split()
        used = int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else None
        yield "the shell (ulimit -v)", limit, None if used is None else limit - used


def _text(path: Path) -> str:
    """Of a small file of the system; empty where there is none, or none for us."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _number_of(text: str, name: str) -> int | None:
    found = re.search(rf"^{name} (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None
