"""What a pickle holds: a dictionary of tensors, often inside another dictionary with other things.

Trainers save `{"state_dict": {...}, "epoch": 3, "optimizer": {...}}` and the like. One such wrapper is
opened, and everything that is left out is named; where two could be meant, neither is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from avatarctl.errors import UnusableWeights
from avatarctl.files.strict_json import clip, listed

if TYPE_CHECKING:
    import torch

__all__ = ["WRAPPERS", "Opened", "Wrapper", "open_wrappers", "tensors_in"]

WRAPPERS: Final = ("state_dict", "model_state", "model_state_dict", "model", "module")
"""Entries that hold the weights of a model by everybody's convention."""

_NOT_WEIGHTS: Final = ("optim", "scheduler", "scaler", "rng", "random", "grad")
"""Parts of names of entries whose tensors belong to training, not to the model."""

MAX_WRAPPERS: Final = 8


@dataclass(frozen=True)
class Wrapper:
    """A dictionary around the tensors: the name of its entry that holds them."""

    name: str


@dataclass(frozen=True)
class Opened:
    """tensors: by name; wrappers: what was opened to reach them, outermost first; notes: that, and what was
    left out, for people."""

    tensors: dict[str, torch.Tensor]
    wrappers: tuple[Wrapper, ...]
    notes: tuple[str, ...]


def open_wrappers(loaded: object, path: Path) -> Opened:
    """The tensors of what a pickle holds.

    Raises UnusableWeights where that is not a dictionary of tensors, or more than one.
    """
    notes: list[str] = []
    wrappers: list[Wrapper] = []
    for _ in range(MAX_WRAPPERS):
        entries = _entries(loaded, path)
        wrapper = _wrapper(entries, path)
        if wrapper is None:
            return Opened(_tensors(entries, notes, path), tuple(wrappers), tuple(notes))
        wrappers.append(Wrapper(wrapper))
        notes.append(f"opened the wrapper {wrapper!r}")
        _note_left_out([name for name in entries if name != wrapper], notes)
        loaded = entries[wrapper]
    raise UnusableWeights(f"wraps its tensors in more than {MAX_WRAPPERS} dictionaries", where=path)


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Every tensor within nested dictionaries, lists and tuples; what is met twice comes once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if _is_tensor(item):
            yield item
        elif isinstance(item, dict):
            waiting.extend(dict.keys(item))
            waiting.extend(dict.values(item))
        elif isinstance(item, (list, tuple, set)):
            waiting.extend(item)


def _is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    import torch

    return isinstance(value, torch.Tensor)


def _entries(loaded: object, path: Path) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        found = "a bare tensor" if _is_tensor(loaded) else f"a {type(loaded).__name__}"
        raise UnusableWeights(f"holds {found}, where a dictionary of tensors is expected", where=path)
    # dict.items: an OrderedDict from a pickle may carry an attribute of that name.
    entries = dict(dict.items(loaded))
    if not entries:
        raise UnusableWeights("holds an empty dictionary: no tensors", where=path)
    for name in entries:
        if not isinstance(name, str):
            what = f"a key of type {type(name).__name__}"
            raise UnusableWeights(f"invalid: the dictionary has {what}, not a name", where=path)
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnusableWeights(f"invalid: the name {clip(name)!r} is not text", where=path) from error
    return entries


def _wrapper(entries: dict[str, Any], path: Path) -> str | None:
    """The entry that holds the weights, None where `entries` are the weights themselves."""
    held = [
        name
        for name, value in entries.items()
        if not _is_tensor(value)
        and not any(part in name.lower() for part in _NOT_WEIGHTS)
        and next(tensors_in(value), None) is not None
    ]
    known = [name for name in held if name in WRAPPERS and isinstance(entries[name], dict)]
    if not held:
        return None
    if not known:
        listed = ", ".join(repr(clip(name, 40)) for name in held[:3])
        raise UnusableWeights(
            f"its tensors are nested under {listed}; only {', '.join(WRAPPERS)} are opened", where=path,
            fix="save that dictionary alone",
        )  # fmt: skip
    tensors = {name: value for name, value in entries.items() if _is_tensor(value)}
    beside = [name for name, value in tensors.items() if value.dtype.is_floating_point and value.ndim]
    if len(held) > 1 or beside:
        names = [*known, *(name for name in held if name not in known), *beside]
        listed = ", ".join(repr(clip(name, 40)) for name in names[:3])
        raise UnusableWeights(
            f"it holds more than one set of tensors ({listed}), and which is meant is unclear", where=path,
            fix="save the one that is meant as a file of its own",
        )  # fmt: skip
    return known[0]


def _tensors(entries: dict[str, Any], notes: list[str], path: Path) -> dict[str, torch.Tensor]:
    """`entries` as weights; dictionaries and lists without weights are left out and noted."""
    import torch

    # Detached from the attributes that a pickle may give a parameter: one named `stride` hides the method.
    tensors = {name: torch.Tensor.detach(value) for name, value in entries.items() if _is_tensor(value)}
    others = [name for name in entries if name not in tensors]
    for name in others:
        value = entries[name]
        if value is not None and not isinstance(value, (dict, list, tuple, set)):
            found = type(value).__name__
            raise UnusableWeights(f"invalid: {clip(name)!r} is of type {found}, not a tensor", where=path)
    if not tensors:
        raise UnusableWeights("holds no tensors", where=path)
    _note_left_out(others, notes)
    return tensors


def _note_left_out(names: list[str], notes: list[str]) -> None:
    if names:
        notes.append(f"left out, not weights: {listed(names, 40)}")
