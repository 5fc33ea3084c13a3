"""What `--lora PATH[:SCALE]` means: a file or folder here, or a hub name whose files were fetched before."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from avatarctl.errors import ConfigError, PathNotFound, WeightsMissing
from avatarctl.files.named_path import expanded
from avatarctl.hub.locate import WEIGHT_SUFFIXES, locate_hub_name, read_hub_name
from avatarctl.loading.trained import is_run_folder, trained_weights

__all__ = ["Lora", "absolute_lora", "find_here", "find_lora", "read_lora", "split_scale"]

_SCALED: Final = re.compile(r"(?P<path>.+):(?P<scale>[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?)", re.ASCII)


@dataclass(frozen=True)
class Lora:
    """A LoRA to be merged: its file or folder, and the factor that a person gave it; notes: lines for people
    on how it was found."""

    path: Path
    strength: float
    notes: tuple[str, ...] = ()


def split_scale(text: str) -> tuple[str, float]:
    """`path[:scale]` taken apart. Only a number behind the last colon is a scale: `C:\\x.safetensors` and
    `a:b/c` are paths. Raises ConfigError for a number without bounds."""
    match = _SCALED.fullmatch(text)
    if match is None:
        return text, 1.0
    scale = float(match["scale"])
    if not math.isfinite(scale):
        raise ConfigError(f"the scale {match['scale']} is no finite number", where="model.lora")
    return match["path"], scale


def read_lora(text: str) -> tuple[str, float, Path | None]:
    """Name and scale of `path[:scale]`, and the file or folder of this name here. Raises as `split_scale`."""
    if (whole := find_here(text)) is not None:  # a file may be called `a:1`
        return text, 1.0, whole
    name, strength = split_scale(text)
    return name, strength, find_here(name)


def find_lora(text: str, weights_root: str | None) -> Lora:
    """The LoRA that `text` names; a hub name is looked up on this disk and never fetched. Of a run of
    `avatarctl train` it is the newest good checkpoint, as with `--model`.

    Raises PathNotFound for a path, WeightsMissing with the command that fetches it for a hub name,
    UnusableWeights for a run without a good checkpoint.
    """
    name, strength, here = read_lora(text)
    if here is not None and is_run_folder(here):
        path, notes = trained_weights(here)
        return Lora(path, strength, notes)
    if here is not None:
        return Lora(here, strength)
    hub_name = read_hub_name(name)
    if hub_name is None or (not hub_name.path and name.endswith(WEIGHT_SUFFIXES)):
        raise PathNotFound("no such file or folder", where=name, fix="model.lora takes PATH[:SCALE]")
    found = locate_hub_name(hub_name, weights_root)
    if found is None:
        raise WeightsMissing(
            "no such file here, and the hub's files of this name were not fetched",
            where=name,
            fix=f"run `avatarctl models pull {name}`",
        )
    return Lora(found, strength)


def absolute_lora(text: str) -> str:
    """`text` so that it means the same from every folder; a hub name stays as it is."""
    name, _, here = read_lora(text)
    return text if here is None else f"{here.absolute()}{text[len(name) :]}"


def find_here(name: str) -> Path | None:
    """The file or folder of this name on this disk, None where there is none."""
    path = expanded(name)
    try:
        return path if path.exists() else None
    except OSError:  # too long for a path
        return None
