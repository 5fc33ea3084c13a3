"""Hidden folders: a living run's stay, a dead run's go, and what cannot be told is named and left."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avatarctl import atomic
from avatarctl.atomic import atomic_path, atomic_write_bytes, held_folder, remove_left_behind
from avatarctl.files.staging import staged_folder

pytestmark = pytest.mark.skipif(
    atomic._mark(Path()) == "", reason="locks, and a number of this boot, as Linux has them"
)

OTHER = ".tmp-00000000-0123456789abcdef"
"""As another machine names them, or this one before it was started again."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(work: Callable[[], None]) -> None:
    """Does `work` in a process that is then killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def unfinished_file(folder: Path) -> None:
    with atomic_path(folder / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def unfinished_folder(folder: Path) -> None:
    with staged_folder(folder / "set", overwrite=False) as staged, atomic_path(staged / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("unfinished", [unfinished_file, unfinished_folder])
def test_what_a_killed_run_left_is_removed_with_one_line(
    unfinished: Callable[[Path], None], tmp_path: Path
) -> None:
    killed(lambda: unfinished(tmp_path))
    (left,) = names(tmp_path)
    assert list(remove_left_behind(tmp_path)) == [
        f"removed {tmp_path / left}, which a run left that did not end"
    ]
    assert names(tmp_path) == []


def test_a_living_run_keeps_its_own(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.bin") as file, staged_folder(tmp_path / "b", overwrite=False) as folder:
        file.write_bytes(b"a")
        (folder / "b.bin").write_bytes(b"b")
        assert list(remove_left_behind(tmp_path)) == []
    assert names(tmp_path) == ["a.bin", "b"] and names(tmp_path / "b") == ["b.bin"]


def test_names_of_others_are_not_looked_at(tmp_path: Path) -> None:
    kept = [".tmp-notes", ".old-0123456789abcdef", "a.partial.mp4", "x.incomplete", ".tmp-0123456789ABCDEF"]
    for name in kept:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "tmp-0123456789abcdef").mkdir()
    assert list(remove_left_behind(tmp_path)) == []
    assert len(names(tmp_path)) == len(kept) + 1
    assert list(remove_left_behind(tmp_path / "absent")) == []


@pytest.mark.parametrize("name", [".tmp-0123456789abcdef", ".tmp-0123456789abcdef.safetensors"])
def test_an_older_versions_are_named_and_left(name: str, tmp_path: Path) -> None:
    """They were never locked."""
    (tmp_path / name).write_bytes(b"x")
    (line,) = remove_left_behind(tmp_path)
    assert line.startswith(f"{tmp_path / name} may be what a dead run left") and names(tmp_path) == [name]


@pytest.mark.parametrize(("major", "goes"), [(0, False), (254, True)], ids=["network", "disk"])
def test_another_machines_goes_only_where_a_disk_has_one_machine(
    major: int, goes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / OTHER).mkdir()
    monkeypatch.setattr(os, "major", lambda device: major)
    (line,) = remove_left_behind(tmp_path)
    assert line.startswith("removed" if goes else str(tmp_path))
    assert names(tmp_path) == ([] if goes else [OTHER])


def test_two_mounts_do_not_believe_each_others_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers on one machine may each have mounted the same share."""
    with atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"x")
        monkeypatch.setattr(atomic, "_mark", lambda parent: "11111111")
        monkeypatch.setattr(os, "major", lambda device: 0)
        monkeypatch.setattr(atomic.fcntl, "flock", lambda *words: None)  # seen by this mount only
        (line,) = remove_left_behind(tmp_path)
        assert "may be what a dead run left" in line
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_without_locks_a_run_works_and_what_it_leaves_stays(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: object) -> None:
        raise OSError(number, os.strerror(number))

    with held_folder(tmp_path) as locked, monkeypatch.context() as patch:
        patch.setattr(atomic.fcntl, "flock", refused)
        atomic_write_bytes(tmp_path / "a.bin", b"x")
        with held_folder(tmp_path) as unlocked:
            assert os.strerror(number) in "".join(remove_left_behind(tmp_path))
            assert names(tmp_path) == sorted([unlocked.name, locked.name, "a.bin"])
            patch.undo()  # locks came back: who could not take one is not taken for dead
            (line,) = remove_left_behind(tmp_path)
            assert line.startswith(f"{unlocked} may be")
    assert names(tmp_path) == ["a.bin"]


def test_a_folder_that_is_taken_before_it_was_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run comes between making and locking, and takes it for a dead one's: then a new one is made."""
    lock, taken = atomic._lock, []

    def late(path: Path) -> int | None:
        if not taken:
            monkeypatch.setattr(atomic, "_lock", lock)
            taken.extend(remove_left_behind(tmp_path))
        elif len(taken) == 1:
            other = os.open(path, os.O_RDONLY)  # now the other run has the lock and has not removed it yet
            taken.append(str(other))
            atomic.fcntl.flock(other, atomic.fcntl.LOCK_EX)
        monkeypatch.setattr(atomic, "_lock", late)
        return lock(path)

    monkeypatch.setattr(atomic, "_lock", late)
    atomic_write_bytes(tmp_path / "a.bin", b"x")
    os.close(int(taken[1]))
    monkeypatch.setattr(atomic, "_lock", lock)
    assert len(list(remove_left_behind(tmp_path))) == 1, "the one that the other run had, which has ended"
    assert names(tmp_path) == ["a.bin"]


def test_a_folder_that_gets_its_name_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is free because the run has just ended: what was locked has its final name by now."""
    killed(lambda: unfinished_file(tmp_path))
    (left,) = tmp_path.iterdir()
    flock = atomic.fcntl.flock

    def renamed(descriptor: int, how: int) -> None:
        left.rename(tmp_path / "final")
        flock(descriptor, how)

    monkeypatch.setattr(atomic.fcntl, "flock", renamed)
    assert list(remove_left_behind(tmp_path)) == []
    assert names(tmp_path) == ["final"] and (tmp_path / "final" / "new.bin").read_bytes() == b"half"


def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(lambda: unfinished_file(tmp_path))
    (left,) = names(tmp_path)

    def refused(path: Path, **how: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(atomic.shutil, "rmtree", refused)
    (line,) = remove_left_behind(tmp_path)
    assert line.endswith("cannot be removed: Read-only file system") and names(tmp_path) == [left]


def test_a_link_of_such_a_name_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "a").write_bytes(b"x")
    link = tmp_path / f".tmp-{atomic._mark(tmp_path)}-0123456789abcdef"
    link.symlink_to("work")
    (line,) = remove_left_behind(tmp_path)
    assert "cannot be removed" in line and (tmp_path / "work" / "a").exists()
