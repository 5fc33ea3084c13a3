"""The folder of a run: who works in it, what was asked for, and the log."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from avatarctl.atomic import atomic_write_text, disk_errors, ensure_writable_folder, flush_file
from avatarctl.config import RunConfig, read_config, value_of
from avatarctl.config.commands import keys_of
from avatarctl.errors import ConfigError, OutputRefused, UnusableWeights
from avatarctl.files.strict_json import read_object
from avatarctl.loading.trained import STATE, checkpoints

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "DRAWN", "LOG", "RUN", "TIMING", "VALIDATION", "RunFolder", "changed", "length_so_far", "require_same",
]  # fmt: skip

RUN: Final = "run.yaml"
LOG: Final = "log.jsonl"
TIMING: Final = "timing.jsonl"
VALIDATION: Final = "validation.jsonl"
DRAWN: Final = "samples"
"""Folder of the clips that are drawn where no data set is given."""
_LOCK: Final = "lock"
_LONGEST_STATE: Final = 1 << 20

_FREE: Final = (
    "output.path", "checkpoint.", "runtime.log_level", "runtime.device", "data.workers", "data.path",
    "data.force", "data.videos", "data.shard", "memory.vae_gradient", "memory.activation_checkpointing",
    "memory.optimizer_device", "memory.swap_blocks", "memory.shard", "train.max_steps", "model.weights_root",
    "validation.", "runtime.trackers",
)  # fmt: skip
"""What may differ when a run goes on: no number depends on it. Of the length of a run only a cosine does, and
of the path of the data its samples, which are compared by name."""


CUT: Final = ("train.batch_size", "train.gradient_accumulation", "runtime.gpus")
"""Their product is what counts: the samples of a step."""


class RunFolder:
    """One folder; `log` and `timing` are lines of JSON, one for each optimizer step, and `validation` one for
    each validation. watchers: are told of each line that is written, by the name of its log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.watchers: list[Callable[[str, Mapping[str, Any]], None]] = []

    @property
    def is_begun(self) -> bool:
        return (self.path / RUN).is_file()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Alone in the folder, by a lock of the operating system: it is gone with the process, however that
        ended, and two containers whose processes have the same numbers cannot mistake each other's.

        Raises OutputRefused while another run is in it.
        """
        ensure_writable_folder(self.path)
        with disk_errors(self.path / _LOCK):
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    fix = "wait for it to end, or choose another --out"
                    raise OutputRefused("another run is training in it", where=self.path, fix=fix) from error
            yield
        finally:
            os.close(descriptor)

    def remove_unbegun(self) -> None:
        """Removes what a command had made before it was refused: the lock, and samples that were drawn. A run
        that began, here or meanwhile by another command, stays as it is."""
        if not self.path.is_dir() or self.is_begun:
            return
        try:
            with self.held():
                if (self.path / DRAWN).is_dir():
                    shutil.rmtree(self.path / DRAWN)
                (self.path / _LOCK).unlink()
        except OutputRefused:
            return

    def begin(self, run_text: str) -> None:
        """Writes the run file, unless one is there: it is of the first start."""
        if not self.is_begun:
            atomic_write_text(self.path / RUN, run_text)

    def cut_log(self, step: int) -> None:
        """Forgets log lines behind `step`, and what a kill or a power cut left of a line, so that logs of
        equal runs are equal."""
        for name in (LOG, TIMING, VALIDATION):
            path = self.path / name
            if not path.is_file():
                continue
            kept = [entry for entry in _entries(path) if entry["step"] <= step]
            atomic_write_text(path, "".join(f"{json.dumps(entry)}\n" for entry in kept))

    def write(self, name: str, entry: Mapping[str, Any]) -> None:
        """One more line of a log."""
        path = self.path / name
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for watcher in self.watchers:
            watcher(name, entry)

    def flush(self) -> None:
        """Waits until the logs are on the disk: a checkpoint is not to be there without its lines."""
        for path in (self.path / LOG, self.path / TIMING):
            if path.is_file():
                with disk_errors(path):
                    flush_file(path)

    def entries(self) -> list[dict[str, Any]]:
        """What the log says so far, and validations, whose numbers have `validation` in front."""
        seen = [
            {"step": entry["step"], **{f"validation_{name}": entry[name] for name in entry if name != "step"}}
            for entry in self.entries_of(VALIDATION)
        ]
        return sorted([*self.entries_of(LOG), *seen], key=lambda entry: int(entry["step"]))

    def entries_of(self, name: str) -> list[dict[str, Any]]:
        """What one of the logs says so far."""
        path = self.path / name
        return list(_entries(path)) if path.is_file() else []


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log up to the first that is none: half of one, or after a power cut zeros."""
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line.decode())
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            return
        yield entry


def changed(run: Path, cfg: RunConfig, command: str) -> dict[str, tuple[Any, Any]]:
    """Keys that decide numbers and are not what they were at the first start: what was, what is asked now."""
    before = read_config(run / RUN, command=command).settings
    found = {}
    for dotted in keys_of(command):
        was = before[dotted].value if dotted in before else None
        now = value_of(cfg, dotted)
        if now != was and not (was is None and now in ({}, ())) and not dotted.startswith((*_FREE, *CUT)):
            found[dotted] = (was, now)
    return found | _cut(before, cfg)


def _cut(before: Mapping[str, Any], cfg: RunConfig) -> dict[str, tuple[Any, Any]]:
    """How a step is cut into processes, forward passes and batches, where it has fewer or more samples."""
    was = {dotted: before[dotted].value if dotted in before else 1 for dotted in CUT}
    now = {dotted: value_of(cfg, dotted) for dotted in CUT}
    if math.prod(was.values()) == math.prod(now.values()):
        return {}  # the same samples, and the same step
    return {dotted: (was[dotted], now[dotted]) for dotted in CUT if was[dotted] != now[dotted]}


def length_so_far(run: Path, step: int | None = None) -> int:
    """`train.max_steps` with which the newest checkpoint was made, or that of `step`: a run may have been
    lengthened. Without a checkpoint that says it, what was asked for at the first start."""
    for number, path in reversed(checkpoints(run)):
        if step in (None, number) and (path / STATE).is_file():
            try:
                stated = read_object(path / STATE, _LONGEST_STATE).get("max_steps")
            except UnusableWeights:
                continue  # it is passed over, and named, when weights are looked for
            if isinstance(stated, int):
                return stated
    first: int = read_config(run / RUN).settings["train.max_steps"].value
    return first


def require_same(run: Path, cfg: RunConfig, command: str) -> None:
    """Raises ConfigError with every difference to the run's own configuration."""
    found = changed(run, cfg, command)
    if found:
        lines = "; ".join(f"{dotted} was {was} and is {now}" for dotted, (was, now) in found.items())
        fix = "ask for what it was, or start anew in another --out"
        if found.keys() <= set(CUT):
            fix = "batch size x accumulation x processes has to stay what it was: the samples of a step"
        raise ConfigError(f"this run was started otherwise: {lines}", where=run / RUN, fix=fix)
