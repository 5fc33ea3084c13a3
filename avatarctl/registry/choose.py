"""A name -> its row, and what a person should know of a run of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from avatarctl.config import RunConfig, Setting, nearest, read_assignment, resolve
from avatarctl.errors import ConfigError
from avatarctl.registry.defaults import COMPAT
from avatarctl.registry.row import Row, VideoShape
from avatarctl.registry.rows import MODELS, ROWS

__all__ = ["based_on", "configure", "find", "find_model", "fitting", "outside_training", "video_shape"]


def find(name: str) -> Row:
    """The row of this name. Raises ConfigError with the nearest name."""
    if name in ROWS:
        return ROWS[name]
    like = nearest(name, ROWS)
    raise ConfigError(
        f"there is no model {name[:100]!r}",
        fix=f"did you mean {like}?" if like else "`avatarctl models list` shows all",
    )


def find_model(name: str) -> Row:
    """The row of a registry name that can run; loading/model_row.py reads paths as well.

    Raises ConfigError for unknown names and for rows that are no models.
    """
    row = find(name)
    if row.kind != "model":
        users = [model.name for model in MODELS if name in model.needs]
        raise ConfigError(
            f"model.name {name} is a row of kind {row.kind}, which cannot run alone",
            fix=f"did you mean {users[0]}?" if users else None,
        )
    return row


def based_on(name: str) -> Row | None:
    """For the name of a base the row of the model that is made of it, without the adapter that is published:
    training makes another one, and no audio was learnt. None for other names."""
    base = ROWS.get(name)
    if base is None or base.kind != "base":
        return None
    for row in MODELS:
        if name in row.needs:
            needs = tuple(each for each in row.needs if ROWS[each].kind != "adapter")
            defaults = {**row.defaults, "model.audio_offset": 0}
            return replace(row, title=f"{row.title}, from its base", needs=needs, defaults=defaults)
    return None


def video_shape(width: int, height: int) -> VideoShape:
    """The word of `Row.made_for` for a video of this size."""
    return "square" if width == height else "landscape or portrait"


def fitting(row: Row, width: int, height: int) -> Row:
    """Of `row` and those that run in its place the one that is made for videos of this size, else `row`."""
    shape = video_shape(width, height)
    return next((each for each in (row, *map(find, row.instead)) if each.made_for == shape), row)


def configure(
    *assignments: str,
    origin: str = "configure",
    row_named: Callable[[str], Row] = find_model,
    stated_by: Callable[[str, str], Mapping[str, Any]] | None = None,
) -> RunConfig:
    """The resolved configuration of a run from `section.key=value` texts; the library's short way.

    row_named: finds the row of `model.name`; `loading.model_row.row_named` takes files and folders as well.
    stated_by: what a transformer that `model.weights` names says of how it is to be used, the mask rule for
    one; `loading.model_row.stated_by`, as the command line has it. Both read files, which this room may not.
    Raises ConfigError for unknown keys, wrong types and impossible values.
    """
    asked: dict[str, Setting] = {}
    for dotted, setting in (read_assignment(text, origin) for text in assignments):
        if isinstance(setting.value, Mapping) and dotted in asked:  # one part of `model.weights` at a time
            setting = Setting({**asked[dotted].value, **setting.value}, origin)
        asked[dotted] = setting
    found = resolve(lambda name: row_named(name).for_config, COMPAT, None, asked, stated_by=stated_by)
    return found.cfg


def outside_training(
    row: Row,
    *,
    width: int,
    height: int,
    num_frames: int,
    overlap_frames: int | None,
    shift: float,
    guidance_scale: float,
) -> tuple[str, ...]:
    """One line for each value that the row's model was not trained for; sizes in pixels and pixel frames,
    None for an overlap that is not used."""
    known = row.trained_for
    checks = (
        (f"size {width}x{height}", (width, height), known.sizes),
        (f"{num_frames} frames at a time", num_frames, known.num_frames),
        (f"overlap {overlap_frames}", overlap_frames, known.overlap_frames),
        (f"shift {shift:g}", shift, known.shifts),
        (f"guidance {guidance_scale:g}", guidance_scale, known.guidance_scales),
    )
    return tuple(
        f"{row.name} was not trained for {what}"
        for what, value, seen in checks
        if seen and value is not None and value not in seen
    )
