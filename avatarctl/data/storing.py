"""Artifacts to their places, in the format that was asked for."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from avatarctl.atomic import atomic_write_bytes, disk_errors, held_folder
from avatarctl.config import RunConfig
from avatarctl.data.artifacts import (
    Making,
    read_artifact,
    rounded,
    write_artifact,
    write_older,
    write_padded,
)
from avatarctl.data.checking import Todo, artifact_path, constant_path, prompt_path
from avatarctl.data.known import Known
from avatarctl.data.samples import Sample
from avatarctl.errors import UnusableFile
from avatarctl.family import Artifact

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Store"]


class Store:
    """Writes what was made; what stands is remembered, so that the next run need not read it."""

    def __init__(self, cfg: RunConfig, artifacts: tuple[Artifact, ...], known: Known, own: Path) -> None:
        self._cfg, self._known, self._own = cfg, known, own
        self._by_name = {each.name: each for each in artifacts}

    def write(self, todo: Todo, made: dict[str, Tensor]) -> None:
        """The artifacts of a sample. Raises UnusableFile for numbers that are not finite, before any is
        written; WriteFailed, OutputRefused."""
        from avatarctl.finite import is_finite

        tensors = {name: rounded(made[name], self._cfg) for name in todo.names}
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise UnusableFile(f"{name} would hold numbers that are not finite", where=todo.sample.name)
        older: dict[str, dict[str, str]] = {}
        for name in todo.names:
            artifact = self._by_name[name]
            if self._cfg.data.format == "pt" and artifact.older is not None:
                older.setdefault(artifact.older[0], {})[artifact.older[1]] = name
                continue
            path = artifact_path(self._own, artifact, todo.sample, todo.prompt)
            self._put(path, name, tensors[name], todo.made[name])
        for file, entries in older.items():
            path = todo.sample.folder / file
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_older(
                path,
                {entry: tensors[name] for entry, name in entries.items()},
                {entry: todo.made[name] for entry, name in entries.items()},
            )

    def write_constants(self, makings: dict[str, Making], made: dict[str, Tensor]) -> None:
        for name, making in makings.items():
            path = constant_path(self._own, self._by_name[name])
            self._put(path, name, rounded(made[name], self._cfg), making)

    def show_prompt(self, sample: Sample, prompt: str) -> None:
        """With `--format pt`: the prompt's tensor in the sample's folder, as a link to one file for all
        samples that have it. Raises WriteFailed, OutputRefused."""
        for artifact in self._by_name.values() if self._cfg.data.format == "pt" else ():
            if artifact.padded is None:
                continue
            file, rows = artifact.padded
            ours = prompt_path(self._own, artifact, prompt)
            shared = ours.with_name(f"{ours.name.partition('.')[0]}.{file}")
            made = self._known.recall(ours, "artifact")
            if not shared.is_file() or self._known.recall(shared, "padded") != made:
                write_padded(shared, read_artifact(ours, artifact.name), rows)
                self._known.note(shared, "padded", made or {})
            _link(sample.folder / file, shared)

    def _put(self, path: Path, name: str, tensor: Tensor, making: Making) -> None:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_artifact(path, name, tensor, making)
        self._known.note(path, "artifact", {"fingerprint": making.fingerprint})


def _link(path: Path, target: Path) -> None:
    """`path` leads to `target` by a relative link; it is a copy where the system has no links."""
    relative = os.path.relpath(target, path.parent)
    if path.is_symlink() and str(path.readlink()) == relative:
        return
    with held_folder(path.parent) as hidden, disk_errors(path):
        link = hidden / path.name
        try:
            link.symlink_to(relative)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            atomic_write_bytes(path, target.read_bytes())
        else:
            link.replace(path)
