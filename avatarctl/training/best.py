"""The weights of the best validation so far, by each score that has a direction."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from avatarctl.atomic import disk_errors, flush_file, flush_folder, held_folder, remove_folder
from avatarctl.errors import AvatarctlError
from avatarctl.files.strict_json import read_object
from avatarctl.files.writer import write_safetensors
from avatarctl.loading.trained import AVERAGED, STATE, TRAINED, damage, dump_state
from avatarctl.media.files import file_sha256
from avatarctl.training.checkpoints import Weights

__all__ = ["BETTER", "is_best", "keep_best"]

BETTER: Final[Mapping[str, int]] = {"flow": -1, "sync": 1, "lpips": -1, "psnr": 1}
"""1 where more is better."""

_NAME: Final = re.compile(r"best-([a-z]+)-(\d{1,9})")
_RUN: Final = "run.yaml"
_LONGEST_STATE: Final = 1 << 20


def is_best(path: Path) -> bool:
    """Whether a folder is one of these, which hold no moments: a run does not go on from them."""
    return _NAME.fullmatch(path.name) is not None and (path / STATE).is_file()


def keep_best(
    run: Path,
    step: int,
    numbers: Mapping[str, Any],
    measured_on: str,
    files: Callable[[], tuple[Weights, Weights | None]],
) -> list[str]:
    """Writes `best-METRIC-STEP` for every score of `numbers` that was never as good; the metrics.

    A folder holds the weights (linked to those of the step's checkpoint where there is one and the disk can),
    the run file, and `state.json` with step, metric, value and hashes: it can be given to --model. The one
    before goes when the new one is whole, so a kill leaves one at least. Scores that were measured on
    something else are not compared.

    files: makes the weights where no other folder has them. Raises WriteFailed and OutputRefused.
    """
    improved = []
    for metric, direction in BETTER.items():
        value = numbers.get(metric)
        if value is None:
            continue
        before = _held(run, metric)
        best = max((each["value"] * direction for each in before.values() if _fits(each, measured_on)),
                   default=None)  # fmt: skip
        if best is not None and value * direction <= best:
            continue
        state = {"metric": metric, "value": value, "step": step, "measured_on": measured_on}
        _write(run, run / f"best-{metric}-{step}", state, files)
        for path in before:
            if path.name != f"best-{metric}-{step}":
                remove_folder(path)
        improved.append(metric)
    return improved


def _fits(state: Mapping[str, Any], measured_on: str) -> bool:
    return state.get("measured_on") == measured_on and isinstance(state.get("value"), (int, float))


def _held(run: Path, metric: str) -> dict[Path, dict[str, Any]]:
    """Folders of a metric and their states; empty for one that says nothing."""
    found = {}
    for path in run.glob(f"best-{metric}-*"):
        if _NAME.fullmatch(path.name):
            try:
                found[path] = read_object(path / STATE, _LONGEST_STATE)
            except AvatarctlError:  # half removed: it goes with the next good one
                found[path] = {}
    return found


def _write(
    run: Path, final: Path, state: Mapping[str, Any], files: Callable[[], tuple[Weights, Weights | None]]
) -> None:
    with disk_errors(final), held_folder(run) as folder:
        source = _folder_of_step(run, state["step"])
        if source is None:
            weights, averaged = files()
            write_safetensors(folder / TRAINED, *weights)
            if averaged is not None:
                write_safetensors(folder / AVERAGED, *averaged)
        else:
            for name in (TRAINED, AVERAGED):
                if (source / name).is_file():
                    _link(source / name, folder / name)
        shutil.copyfile(run / _RUN, folder / _RUN)
        hashes = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        (folder / STATE).write_text(dump_state({**state, "files": hashes}), encoding="utf-8")
        for path in folder.iterdir():
            flush_file(path)
        flush_folder(folder)
        if final.is_dir():  # damaged, or measured on something else
            remove_folder(final)
        folder.rename(final)
        flush_folder(run)


def _folder_of_step(run: Path, step: int) -> Path | None:
    places = (run / f"checkpoint-{step}", *(run / f"best-{metric}-{step}" for metric in BETTER))
    return next((path for path in places if path.is_dir() and not damage(path)), None)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, which stays when a checkpoint goes; a copy where the disk has no
    links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
