"""A preparation that is killed goes on with the same command, to the same bytes; so do two at once."""

from __future__ import annotations

import os
import pkgutil
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import SMALL, contents, run

if sys.platform == "win32":
    pytest.skip("forks", allow_module_level=True)

PATIENCE = 300  # s; far more than any of these processes takes


def commands(videos: Path, out: Path, *more: str) -> list[tuple[str, ...]]:
    common = ("--data", str(out), *SMALL, "--artifact-dtype", "float32", *more)
    return [("precompute-latents", "--from-videos", str(videos), *common), ("precompute-audio", *common)]


def started(words: tuple[str, ...], killed_at: tuple[str, int] | None = None) -> int:
    """A process that runs a command. killed_at: a function, and the call of it at which SIGKILL comes: always
    the same moment, however busy the machine is."""
    child = os.fork()
    if child:
        return child
    signal.alarm(PATIENCE)
    try:
        if killed_at is not None:
            _kill_at(*killed_at)
        os._exit(run(*words).exit_code)
    finally:
        os._exit(1)


def _kill_at(name: str, call: int) -> None:
    module, _, attribute = name.rpartition(".")
    function, calls = pkgutil.resolve_name(name), count(1)

    def counted(*arguments: Any, **more: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **more)

    setattr(pkgutil.resolve_name(module), attribute, counted)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_in_the_middle_and_typed_again(talks: Path, prepared: Path, tmp_path: Path) -> None:
    """While a window is written under a hidden name; then between two artifacts of a sample."""
    out = tmp_path / "out"
    words = commands(talks, out)
    for killed_at, left in (
        (("avatarctl.data.windows.write_audio", 4), {"sample.json": 3, "*.safetensors": 0}),
        (("avatarctl.data.storing.write_artifact", 5), {"sample.json": 6, "*.safetensors": 4}),
    ):
        assert ended(started(words[0], killed_at)) == -signal.SIGKILL
        assert not (out / "_dataset/index.jsonl").exists()
        made = {name: len(list(out.glob(f"**/[0-9]*/{name}"))) for name in left}
        made["*.safetensors"] += len(list(out.glob("_dataset/*/*.safetensors")))
        assert made == left

    for command in words:
        again = run(*command)
        assert again.exit_code == 0, again.output
    assert contents(out) == contents(prepared)
    assert not list(out.rglob(".tmp-*"))


def test_two_shards_at_once(talks: Path, prepared: Path, tmp_path: Path) -> None:
    """They share prompts, constants and the index."""
    out = tmp_path / "out"
    shards = [commands(talks, out, "--shard", shard) for shard in ("0/2", "1/2")]
    for both in zip(*shards, strict=True):
        assert [ended(child) for child in [started(words) for words in both]] == [0, 0]
    assert contents(out) == contents(prepared)
    assert not list(out.rglob(".tmp-*"))
