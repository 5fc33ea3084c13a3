"""Sparse layers to one resolved RunConfig, every value with its origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from avatarctl.config.checks import check_compat, check_together
from avatarctl.config.reader import ConfigFile, Setting
from avatarctl.config.sections import RunConfig, keys, section_types
from avatarctl.config.values import BadValue, check_value
from avatarctl.errors import ConfigError

__all__ = ["ModelRowDefaults", "Resolved", "resolve"]

DECIDES_OTHERS = ("model.name", "model.compat")
"""Keys whose change makes the resolved values of a run file stale; what was asked is kept."""

_OF_A_ROW = "model row "

OVERRULES = {
    "long_video.max_tokens": ("long_video.num_frames",),
    "long_video.max_size": ("output.width", "output.height"),
}
"""Keys that a person sets to decide what a model row states outright: the row's value gives way."""


@dataclass(frozen=True)
class ModelRowDefaults:
    """What a registry row contributes: values by dotted key.

    audio_offset_stated: the row's own weights say which offset they were made with, so that no compat
    layer may change it.
    compat: what each `model.compat` sets for this model; None for the common layers.
    """

    name: str
    defaults: Mapping[str, Any]
    audio_offset_stated: bool = False
    compat: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Resolved:
    """The configuration of a run.

    asked:   what a person set, in a file or by options; run files repeat it.
    origins: where each value that is not a plain default comes from.
    notices: lines that a person should read.
    """

    cfg: RunConfig
    asked: Mapping[str, Setting]
    origins: Mapping[str, str]
    notices: tuple[str, ...]

    def is_of_the_row(self, dotted: str) -> bool:
        """Whether a value is the model row's, so that nobody set it, nor a compat mode."""
        return self.origins.get(dotted, "").startswith(_OF_A_ROW)


def resolve(
    row_of: Callable[[str], ModelRowDefaults],
    compat: Mapping[str, Mapping[str, Any]],
    file: ConfigFile | None,
    asked: Mapping[str, Setting],
    *,
    default_model: str = "cartoon-i2v",
    ambient: Mapping[str, Setting] | None = None,
    stated_by: Callable[[str, str], Mapping[str, Any]] | None = None,
) -> Resolved:
    """Merge defaults < model row < transformer named by `model.weights` < compat < ambient < file < asked.

    row_of:  finds the row of `model.name`, which is settled first; raises for unknown names.
    compat:  what each `model.compat` other than "none" sets, by dotted key, unless the row states its own.
    ambient: settings of the surroundings, such as environment variables.
    stated_by: what such a transformer of a model states, by dotted key.
    Raises ConfigError for values that are impossible together.
    """
    own = dict(file.settings) if file else {}
    if any(name in asked and name in own and asked[name].value != own[name].value for name in DECIDES_OTHERS):
        own = {name: setting for name, setting in own.items() if file and name in file.asked}
    all_asked = {name: setting for name, setting in own.items() if file and name in file.asked} | dict(asked)

    name = (asked.get("model.name") or own.get("model.name") or Setting(default_model, "default")).value
    row = row_of(name)
    row_layer = _layer(row.defaults, f"{_OF_A_ROW}{row.name}")
    base = {"model.name": Setting(name, "default")} | row_layer
    modes = row_layer | own | dict(asked)
    mode = modes["model.compat"].value if "model.compat" in modes else "none"
    compat_layer = _layer((compat if row.compat is None else row.compat).get(mode, {}), f"compat {mode}")
    check_compat(mode, compat_layer, all_asked)
    notices = []
    if row.audio_offset_stated and "model.audio_offset" in compat_layer:
        stated, wanted = row.defaults["model.audio_offset"], compat_layer.pop("model.audio_offset").value
        if stated != wanted:
            notices.append(f"{row.name} states audio_offset {stated} and keeps it under compat {mode}")

    for winner, losers in OVERRULES.items():
        # From the row only: beside a value that a person gave, both count as given.
        if winner in own or winner in asked or winner in (ambient or {}):
            for loser in losers:
                base.pop(loser, None)
    weights = modes["model.weights"].value if "model.weights" in modes else {}
    if stated_by is not None and "dit" in weights:
        base |= _layer(stated_by(name, weights["dit"]), f"header of {weights['dit']}")
    settings = base | compat_layer | dict(ambient or {}) | own | dict(asked)
    cfg = _build({dotted: setting.value for dotted, setting in settings.items()})
    origins = {dotted: setting.origin for dotted, setting in settings.items()}
    check_together(cfg, origins, own.keys() | asked.keys())
    return Resolved(cfg, all_asked, origins, tuple(notices))


def _layer(values: Mapping[str, Any], origin: str) -> dict[str, Setting]:
    layer = {}
    for dotted, value in values.items():
        try:
            layer[dotted] = Setting(check_value(keys()[dotted], value), origin)
        except BadValue as error:
            raise ConfigError(f"{dotted}: {error}", where=origin) from error
    return layer


def _build(values: Mapping[str, Any]) -> RunConfig:
    sections = {}
    for section, cls in section_types().items():
        own = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{section}.")}
        sections[section] = cls(**own)
    return RunConfig(**sections)
