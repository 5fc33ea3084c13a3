"""What the host has, read from files of a made-up system."""

from __future__ import annotations

from pathlib import Path

import pytest

from avatarctl.placement.host import host_memory

GIB = 1 << 30


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": f"MemTotal: {64 * GIB >> 10} kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_of_a_machine_without_limits(tmp_path: Path) -> None:
    said = f"MemTotal: {64 * GIB >> 10} kB\nMemFree: 1 kB\nMemAvailable: {50 * GIB >> 10} kB\n"
    found = host_memory(system(tmp_path, {"proc/meminfo": said, "proc/self/cgroup": "0::/\n"}))
    assert (found.total, found.free, found.limit) == (64 * GIB, 50 * GIB, "the machine")


@pytest.mark.parametrize("inside", ["/", "/docker/1234", "/a/b"])
def test_a_container_has_what_its_group_may_take(tmp_path: Path, inside: str) -> None:
    """Version 2: the smallest limit on the way up counts, wherever the path of the group comes from. Pages of
    files that nobody uses are given up when memory is asked for."""
    files = {
        "proc/meminfo": f"MemTotal: {64 * GIB >> 10} kB\nMemAvailable: {50 * GIB >> 10} kB\n",
        "proc/self/cgroup": f"0::{inside}\n",
        "sys/fs/cgroup/memory.max": str(8 * GIB),
        "sys/fs/cgroup/memory.current": str(5 * GIB),
        "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        "sys/fs/cgroup/a/b/memory.max": "max",
    }
    found = host_memory(system(tmp_path, files))
    assert (found.total, found.free) == (8 * GIB, 4 * GIB) and "container" in found.limit


def test_version_1_of_control_groups(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "7:cpu:/x\n4:memory:/pod\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str((1 << 63) - 4096),
        "sys/fs/cgroup/memory/pod/memory.limit_in_bytes": str(6 * GIB),
        "sys/fs/cgroup/memory/pod/memory.usage_in_bytes": str(2 * GIB),
    }
    found = host_memory(system(tmp_path, files))
    assert (found.total, found.free) == (6 * GIB, 4 * GIB)


def test_a_system_that_does_not_tell_what_is_free(tmp_path: Path) -> None:
    found = host_memory(system(tmp_path, {}))
    assert (found.total, found.free) == (64 * GIB, None)
