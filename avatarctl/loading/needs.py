"""Which files a name, or a command as somebody would type it, needs: registry rows and names on the hub.

The text of a command is resolved by the tables below; the command itself need not exist in this version.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from avatarctl.config import Setting, find_config, nearest, read_assignment, read_config
from avatarctl.errors import ConfigError, PathNotFound, UsageError
from avatarctl.files.named_path import expanded
from avatarctl.hub.locate import read_hub_name, with_needs
from avatarctl.hub.pull import Wants
from avatarctl.registry import ROWS, find, fitting

__all__ = ["AUX_ROWS", "JOBS", "wanted_by_names", "wanted_for"]

AUX_ROWS: Final[Mapping[str, str]] = {
    "sync": "stable-syncnet",
    "lpips": "lpips-vgg16",
    "trepa": "videomae-v2-g",
}
"""Rows behind the values of `aux.losses`."""

_PROFILE: Final = ("--model", "--size", "--frames", "--aux", "--fit")

JOBS: Final[Mapping[str, tuple[str, ...]]] = {
    "infer": ("--model", "--lora", "--size"),
    "train i2v": ("--model", "--aux"),
    "train v2v": ("--model", "--aux"),
    "vram-profile": _PROFILE,
    "vram-profile infer": _PROFILE,
    "vram-profile train i2v": _PROFILE,
    "vram-profile train v2v": _PROFILE,
}
"""Commands, and their options that say something about weights. `vram-profile` predicts without any."""

_SIZE: Final = re.compile(r"(\d{1,5})x(\d{1,5})", re.IGNORECASE | re.ASCII)
_SCALE: Final = re.compile(r":[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\Z", re.IGNORECASE | re.ASCII)


def wanted_by_names(names: Iterable[str]) -> Wants:
    """What these names stand for: rows with what they need, or `org/name[/path]` on the hub.

    Raises ConfigError for an unknown name, with the nearest.
    """
    wants = Wants((), ())
    for name in names:
        on_hub = read_hub_name(name) if name not in ROWS else None
        wants += Wants((), (on_hub,)) if on_hub else Wants(tuple(with_needs(find(name))), ())
    return wants


def _no_others(job: str) -> Mapping[str, bool]:
    return {}


def wanted_for(text: str, others_of: Callable[[str], Mapping[str, bool]] = _no_others) -> Wants:
    """What a command line needs: its model with all parts, its auxiliary losses, its LoRA files on the hub.

    others_of: of a command, its other options -> whether a value follows; they are passed over, but for
    `-o model.name=...` and the like, and for `--config`, whose file counts where the command line is silent.
    `--size` chooses among the files of a model that is published for several shapes of video.
    Without `--model` it is the built-in one, which needs nothing. Raises UsageError for words that are
    unknown here, with the nearest known one; ConfigError and PathNotFound for `-o` and `--config`.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"a quotation mark is open in {text[:100]!r}", where="--for") from error
    job, rest = _job(words[1:] if words[:1] == ["avatarctl"] else words)
    wants = Wants((), ())
    if job.startswith("vram-profile"):
        _options(job, rest, {})
        return wants
    given = _options(job, rest, others_of(job))
    asked = [pair for option, value in given for pair in _of_option(option, value)]
    silent = _READERS.keys() - {option for option, _ in asked}
    in_files = [pair for option, value in given if option == "--config" for pair in _of_file(job, value)]
    for option, value in (*asked, *(pair for pair in in_files if pair[0] in silent)):
        wants += _READERS[option](value)
    sizes = [_size(value) for option, value in given if option == "--size"]
    return _for_size(wants, *sizes[-1]) if sizes else wants


def _for_size(wants: Wants, width: int, height: int) -> Wants:
    """Of models that are published for several shapes of video, the files that a run of this size takes."""
    return Wants(tuple(fitting(row, width, height) for row in wants.rows), wants.hub_names)


def _size(value: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(value)
    if match is None:
        raise UsageError(f"expected WIDTHxHEIGHT such as 720x400, got {value[:60]!r}", where="--for")
    return int(match[1]), int(match[2])


def _of_option(option: str, value: str) -> list[tuple[str, str]]:
    """What an option says about weights, as (option, value)."""
    if option in _READERS:
        return [(option, value)]
    return _of_settings(dict([read_assignment(value, option)])) if option in ("-o", "--option") else []


def _of_file(job: str, name: str) -> list[tuple[str, str]]:
    return _of_settings(read_config(find_config(name, job), command=job).settings)


def _of_settings(settings: Mapping[str, Setting]) -> list[tuple[str, str]]:
    found = []
    for key, option in _KEYS.items():
        value = settings[key].value if key in settings else None
        found += [(option, item) for item in ([value] if isinstance(value, str) else value or ())]
    return found


def _job(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The longest command that `words` begin with, and what is left of them."""
    for count in range(min(3, len(words)), 0, -1):
        if " ".join(words[:count]) in JOBS:
            return " ".join(words[:count]), words[count:]
    asked = " ".join(word for word in words[:3] if not word.startswith("-"))
    like = nearest(asked, JOBS)
    known = f"did you mean {like}?" if like else f"it knows {', '.join(JOBS)}"
    raise UsageError(f"{asked[:100]!r} is no command that needs weights", where="--for", fix=known)


def _options(job: str, words: Sequence[str], others: Mapping[str, bool]) -> list[tuple[str, str]]:
    """(option, value) pairs; `--option=value` and `--option value`. A switch has the value ""."""
    known = {**dict.fromkeys(JOBS[job], True), **others}
    found = []
    left = list(words)
    while left:
        option, equals, value = left.pop(0).partition("=")
        if option not in known:
            like = nearest(option, known)
            fix = f"did you mean {like}?" if like else f"{job} knows {', '.join(JOBS[job])} here"
            raise UsageError(f"{option[:100]!r} says nothing about weights", where="--for", fix=fix)
        if not equals and known[option]:
            if not left:
                raise UsageError(f"{option} needs a value", where="--for")
            value = left.pop(0)
        found.append((option, value))
    return found


def _model(value: str) -> Wants:
    if value and value not in ROWS and expanded(value).exists():
        # Not before: it reads weights, which names need not wait for.
        from avatarctl.loading.model_row import row_named

        return Wants(tuple(with_needs(row_named(value))), ())
    row = find(value)
    if row.kind != "model":
        users = [model.name for model in ROWS.values() if value in model.needs]
        raise ConfigError(
            f"{value} is a row of kind {row.kind}, no model",
            where="--for",
            fix=f"did you mean {users[0]}?" if users else None,
        )
    return Wants(tuple(with_needs(row)), ())


def _aux(value: str) -> Wants:
    wants = Wants((), ())
    for loss in filter(None, (part.strip() for part in value.split(","))):
        if loss not in AUX_ROWS:
            like = nearest(loss, AUX_ROWS)
            known = f"did you mean {like}?" if like else f"there are {', '.join(AUX_ROWS)}"
            raise UsageError(f"there is no loss {loss[:100]!r}", where="--for", fix=known)
        wants += Wants((find(AUX_ROWS[loss]),), ())
    return wants


def _lora(value: str) -> Wants:
    """A LoRA on the hub; a file that is here already needs nothing."""
    path = _SCALE.sub("", value)
    if Path(path).exists():
        return Wants((), ())
    name = read_hub_name(path)
    if name is None:
        raise PathNotFound("does not exist, and is no name on the hub (org/name/file)", where=path[:200])
    return Wants((), (name,))


_KEYS: Final = {"model.name": "--model", "aux.losses": "--aux", "model.lora": "--lora"}
_READERS: Final = {"--model": _model, "--aux": _aux, "--lora": _lora}
