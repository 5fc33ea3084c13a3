"""Checkpoints of a run: written aside and renamed when they are whole, kept in number, read back verified."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from avatarctl.atomic import disk_errors, flush_file, flush_folder, held_folder, remove_folder
from avatarctl.errors import PathNotFound, UnusableWeights, WriteFailed
from avatarctl.files.strict_json import read_object
from avatarctl.files.tensors import StoredTensor
from avatarctl.files.writer import write_safetensors
from avatarctl.loading.trained import (
    AVERAGED,
    STATE,
    TRAINED,
    checkpoints,
    damage,
    dump_state,
)
from avatarctl.media.files import file_sha256
from avatarctl.training.weights_file import read_trained, stored

__all__ = ["Checkpoint", "find_checkpoint", "rotate", "set_aside", "write_checkpoint"]

_OPTIMIZER: Final = "optimizer.safetensors"
_RUN: Final = "run.yaml"
_LONGEST_STATE: Final = 1 << 20
_OF_A_STEP: Final = re.compile(r"(?:checkpoint|best-[a-z]+|validation/step)-(\d{1,9})")
"""Folders of a run that belong to one of its steps."""

Weights = tuple[Mapping[str, StoredTensor], Mapping[str, str]]
"""Tensors and header of a weight file."""


@dataclass(frozen=True)
class Checkpoint:
    """One that was verified: the optimizer steps before it, and what its state file says."""

    path: Path
    step: int
    state: Mapping[str, Any]

    def trained(self) -> dict[str, Tensor]:
        return read_trained(self.path / TRAINED)

    def averaged(self) -> dict[str, Tensor] | None:
        path = self.path / AVERAGED
        return read_trained(path) if path.is_file() else None

    def optimizer(self) -> dict[str, Tensor]:
        import safetensors.torch

        return safetensors.torch.load_file(str(self.path / _OPTIMIZER))


def write_checkpoint(
    run: Path,
    step: int,
    weights: Weights,
    averaged: Weights | None,
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """`checkpoint-STEP` of a run. A kill at any moment leaves none, or a whole one.

    Raises WriteFailed where the disk is full; older checkpoints are then what they were.
    """
    final = run / f"checkpoint-{step}"
    with _told_of(final), disk_errors(final), held_folder(run) as folder:
        write_safetensors(folder / TRAINED, *weights)
        if averaged is not None:
            write_safetensors(folder / AVERAGED, *averaged)
        moments = {name: stored(tensor) for name, tensor in optimizer.items()}
        write_safetensors(folder / _OPTIMIZER, moments, {"format": "pt"})
        shutil.copyfile(run / _RUN, folder / _RUN)
        files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        (folder / STATE).write_text(dump_state({**state, "step": step, "files": files}), encoding="utf-8")
        for path in folder.iterdir():
            flush_file(path)
        flush_folder(folder)
        if final.is_dir():  # damaged, or resuming would have begun behind it
            final.rename(_aside(run) / final.name)
        folder.rename(final)
        flush_folder(run)
    return final


@contextmanager
def _told_of(final: Path) -> Iterator[None]:
    """A full disk is told by the name that a file would have had, and by what to do then."""
    try:
        yield
    except WriteFailed as error:
        path = final if Path(str(error.where)) == final else final / Path(str(error.where)).name
        fix = "free some space: the same command with --resume auto goes on"
        raise WriteFailed(error.what, where=path, fix=fix) from error


def find_checkpoint(run: Path, step: int | None = None) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The newest good checkpoint, or that of `step`, and a line for each damaged one that was passed over.

    Raises UnusableWeights where there are checkpoints and none is good, PathNotFound for a step without one.
    """
    notes: list[str] = []
    held = dict(checkpoints(run))
    if step is not None and step not in held:
        there = f"there are those of {', '.join(map(str, held))}" if held else "the run has none"
        raise PathNotFound(f"no checkpoint of step {step}", where=run, fix=there)
    for number, path in sorted(held.items(), reverse=True):
        if step is not None and number != step:
            continue
        if wrong := damage(path):
            notes.append(f"{path} is passed over: {wrong}")
            continue
        state = read_object(path / STATE, _LONGEST_STATE)
        if state.get("step") != number:
            notes.append(f"{path} is passed over: {STATE} is of step {state.get('step')}")
            continue
        return Checkpoint(path, number, state), tuple(notes)
    if notes:
        others = len(held) - len(notes)
        fix = "name another checkpoint" if others else "no other is left: start anew in another --out"
        raise UnusableWeights(notes[0].replace(" is passed over", ""), fix=fix)
    return None, ()


def rotate(run: Path, keep: int) -> Iterator[Path]:
    """Removes all but the `keep` newest; yields what is gone. Nothing goes before the newest was read back.

    Raises WriteFailed where the disk gives back something else than was written.
    """
    held = checkpoints(run)
    if held[:-keep] and (wrong := damage(held[-1][1])):
        what = f"was not written as it should be: {wrong}"
        raise WriteFailed(what, where=held[-1][1], fix="older ones stay")
    for _, path in held[:-keep]:
        remove_folder(path)
        yield path


def set_aside(run: Path, step: int) -> tuple[Path, ...]:
    """Moves what was made behind `step` into a folder `aside-N`: checkpoints, which neither resuming nor
    rotation finds there, weights that nothing is to be compared with any more, and validations; their new
    places."""
    newer = list(_behind(run, step))
    if not newer:
        return ()
    place = _aside(run)
    moved = []
    for path in newer:
        target = place / path.relative_to(run)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        moved.append(target)
    flush_folder(run)
    return tuple(moved)


def _behind(run: Path, step: int) -> Iterator[Path]:
    for path in sorted((*run.glob("*-*"), *run.glob("validation/*"))):
        match = _OF_A_STEP.fullmatch(path.relative_to(run).as_posix())
        if match and int(match[1]) > step and path.is_dir():
            yield path


def _aside(run: Path) -> Path:
    """A new folder for what is not to be taken any more."""
    number = 1
    while True:
        place = run / f"aside-{number}"
        try:
            place.mkdir()
        except FileExistsError:
            number += 1
            continue
        return place
