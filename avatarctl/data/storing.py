"""Artifacts to their places, in the format that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from avatarctl.atomic import disk_errors
from avatarctl.config import RunConfig
from avatarctl.data.artifacts import Making, rounded, write_artifact, write_older
from avatarctl.data.checking import Todo, artifact_path, constant_path
from avatarctl.data.known import Known
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

    def _put(self, path: Path, name: str, tensor: Tensor, making: Making) -> None:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_artifact(path, name, tensor, making)
        self._known.note(path, "artifact", {"fingerprint": making.fingerprint})
