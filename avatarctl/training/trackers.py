"""Curves and contact sheets elsewhere: TensorBoard, Weights & Biases, Trackio.

Unverified: none of the three packages was here; tests speak to stand-ins with the calls that their manuals
state. `log.jsonl` is written whatever is asked for, so a tracker that fails costs a line and no number.
Keys come from the environment alone, as a configuration is written into every run and shown around.
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from PIL import Image

from avatarctl.atomic import atomic_write_text
from avatarctl.errors import ExtraMissing
from avatarctl.events import Emit, Notice
from avatarctl.files.strict_json import read_object
from avatarctl.training.run_folder import LOG, VALIDATION, RunFolder

__all__ = ["Tracker", "Trackers", "require_trackers"]

_ID: Final = "tracker.json"
_LONGEST: Final = 1 << 16
_PROJECT: Final = "avatarctl"
_MODULES: Final = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
_NAMES: Final = {"learning_rate": "lr", "gradient_norm": "grad_norm"}
"""As other trainers call them."""


class Tracker(Protocol):
    """One place. Whatever it raises is said, and it is left out from then on."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Values of an optimizer step, by a name like train/loss; steps come in order, twice after a
        resume."""

    def image(self, step: int, name: str, path: Path) -> None:
        """An image of a validation."""

    def finish(self) -> None:
        """Nothing comes any more."""


def require_trackers(names: Sequence[str]) -> None:
    """Raises ExtraMissing (exit 4) for a tracker whose package does not import."""
    for name in (each for each in names if each in _MODULES):
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            raise ExtraMissing(
                f"the {name} package does not import here: {str(error)[:200]}",
                where="runtime.trackers",
                fix="install avatarctl[track], or leave it out: log.jsonl and curves.png are always written",
            ) from error


class Trackers:
    """All that a run asked for, at the lines of its logs (`RunFolder.watchers`)."""

    def __init__(self, names: Sequence[str], folder: RunFolder, step: int, emit: Emit) -> None:
        self._folder, self._emit = folder.path, emit
        self._held: dict[str, Tracker] = {}
        wanted = [name for name in names if name in _OPENERS]
        if not wanted:
            return
        run_id = _run_id(folder.path)
        for name in wanted:
            try:
                self._held[name] = _OPENERS[name](folder.path, run_id, step)
            except Exception as error:  # no key, no network: theirs to say, and no reason to end training
                self._lost(name, error)
        folder.watchers.append(self.line)

    def line(self, log: str, entry: Mapping[str, Any]) -> None:
        """One more line of a log of the run."""
        if log not in (LOG, VALIDATION):
            return
        group = "train" if log == LOG else "validation"
        values = {
            f"{group}/{_NAMES.get(name, name)}": float(value)
            for name, value in entry.items()
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        step = int(entry["step"])
        sheet = self._folder / "validation" / f"step-{step}" / "sheet.png"
        for name in list(self._held):
            try:
                self._held[name].numbers(step, values)
                if log == VALIDATION and sheet.is_file():
                    self._held[name].image(step, "validation/sheet", sheet)
            except Exception as error:  # the network went away
                self._lost(name, error)

    def finish(self) -> None:
        for name in list(self._held):
            try:
                self._held.pop(name).finish()
            except Exception as error:
                self._lost(name, error)

    def _lost(self, name: str, error: Exception) -> None:
        self._held.pop(name, None)
        said = str(error).strip().splitlines() or [type(error).__name__]
        self._emit(Notice(f"tracker {name}: {said[0][:200]}; training goes on without it", "warning"))


def _run_id(folder: Path) -> str:
    """Who the run is for a tracker, kept over a resume."""
    path = folder / _ID
    if path.is_file():
        return str(read_object(path, _LONGEST)["id"])
    made = secrets.token_hex(6)
    atomic_write_text(path, f'{{"id": "{made}"}}\n')
    return made


class _TensorBoard:
    """RUN/tensorboard; what a run that goes back has behind its step is hidden."""

    def __init__(self, folder: Path, run_id: str, step: int) -> None:
        module = importlib.import_module(_MODULES["tensorboard"])
        self._writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=step + 1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def finish(self) -> None:
        self._writer.close()


class _Wandb:
    """WANDB_API_KEY, or WANDB_MODE=offline; WANDB_PROJECT and WANDB_ENTITY as everywhere."""

    def __init__(self, folder: Path, run_id: str, step: int) -> None:
        if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") not in (
            "offline",
            "disabled",
        ):
            raise RuntimeError("WANDB_API_KEY is not set (WANDB_MODE=offline needs none)")
        self._module = importlib.import_module(_MODULES["wandb"])
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        self._run = self._module.init(
            project=project, id=run_id, name=folder.name, dir=str(folder), resume="allow"
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._module.Image(str(path))}, step=step)

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    """On this machine, or in the Space that TRACKIO_SPACE_ID names. A run is known by its name there."""

    def __init__(self, folder: Path, run_id: str, step: int) -> None:
        self._module = importlib.import_module(_MODULES["trackio"])
        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        self._run = self._module.init(project=project, name=f"{folder.name}-{run_id}", resume="allow")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._module.Image(str(path))}, step=step)

    def finish(self) -> None:
        self._run.finish()


_OPENERS: Final[Mapping[str, Callable[[Path, str, int], Tracker]]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
