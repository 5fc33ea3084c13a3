"""Run folders of training, and what a trained file says of the model that it belongs to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from avatarctl.errors import PathNotFound, UnusableWeights
from avatarctl.files.safetensors_file import read_header
from avatarctl.files.strict_json import parse_object, read_object
from avatarctl.media.files import file_sha256

__all__ = [
    "AVERAGED",
    "BASE_KEY",
    "STATE",
    "TRAINED",
    "base_of",
    "checkpoints",
    "damage",
    "full_model_below",
    "is_run_folder",
    "trained_weights",
]

BASE_KEY: Final = "avatarctl.base"
"""Metadata key: JSON of the model that was trained, {"model": registry name, ...}; of an adapter on a full
model in a file also {"path": of that, "sha256": {name of a file: digest}}."""

TRAINED: Final = "trainable_weights.safetensors"
AVERAGED: Final = "ema_weights.safetensors"
STATE: Final = "state.json"
RUN: Final = "run.yaml"
_NAME: Final = re.compile(r"checkpoint-(\d{1,9})")
_LONGEST_STATE: Final = 1 << 20


def is_run_folder(path: Path) -> bool:
    """Whether a folder is one that `avatarctl train` made: a run or one of its checkpoints."""
    if not path.is_dir():
        return False
    return (path / RUN).is_file() and (bool(checkpoints(path)) or (path / STATE).is_file())


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Checkpoints of a run by their step, the oldest first; as numbers, since "10" is less than "9" as text.

    Folders with another name are none, whatever is in them.
    """
    found = []
    for path in run.iterdir() if run.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def damage(checkpoint: Path, *, weights_only: bool = False) -> str:
    """What is wrong with a checkpoint, empty for nothing: its files are compared with the hashes in its
    state file, which is written last. weights_only: those that whoever uses the weights reads; moments are
    twice as large."""
    state = checkpoint / STATE
    if not state.is_file():
        return f"{STATE} is missing"
    try:
        stated = read_object(state, _LONGEST_STATE).get("files", {})
    except UnusableWeights as problem:
        return str(problem)
    for name, digest in stated.items():
        if weights_only and name not in (_used(stated), RUN):
            continue
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != digest:
            return f"{name} is damaged: its SHA-256 is another one"
    return "" if stated else f"{STATE} names no files"


def _used(files: Mapping[str, Any]) -> str:
    """Of the files of a checkpoint the one that is used: averaged weights, where it has them."""
    return AVERAGED if AVERAGED in files else TRAINED


def trained_weights(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The weight file of a run folder or a checkpoint, and lines about checkpoints that were passed over.

    Of a run the newest good checkpoint counts; of a checkpoint the averaged weights, where it has them.
    Raises UnusableWeights, PathNotFound.
    """
    notes = []
    found = [path] if (path / STATE).is_file() else [each for _, each in reversed(checkpoints(path))]
    for checkpoint in found:
        if wrong := damage(checkpoint, weights_only=True):
            notes.append(f"{checkpoint} is passed over: {wrong}")
            continue
        files = read_object(checkpoint / STATE, _LONGEST_STATE)["files"]
        return checkpoint / _used(files), tuple(notes)
    if notes:
        raise UnusableWeights(notes[0].replace(" is passed over", ""), where=path)
    raise PathNotFound("holds no checkpoint yet", where=path)


def base_of(path: Path) -> Mapping[str, Any]:
    """What the header of a trained file says of its base; empty where it says nothing."""
    text = read_header(path).metadata.get(BASE_KEY)
    return {} if text is None else parse_object(text, None, f"the metadata {BASE_KEY} is")


def full_model_below(path: Path) -> tuple[str, dict[str, str]]:
    """The full model that an adapter's header says it was trained on: its path, and the SHA-256 of its files
    by name; empty where it is an adapter of a published model.

    Raises UnusableWeights for a statement that nobody could check.
    """
    stated = base_of(path)
    if "path" not in stated:
        return "", {}
    place, digests = stated["path"], stated.get("sha256")
    if not isinstance(digests, dict) or not digests:
        raise UnusableWeights(f"{BASE_KEY} names a model without its SHA-256", where=path)
    return str(place), {str(name): str(digest) for name, digest in digests.items()}


def dump_state(state: Mapping[str, Any]) -> str:
    """The text of a state file."""
    return json.dumps(state, sort_keys=True, indent=1) + "\n"
