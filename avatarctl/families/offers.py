"""Settings that one family has and another has not: refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from avatarctl.config import RunConfig, keys, value_of
from avatarctl.errors import UsageError

__all__ = ["OF_A_SOURCE", "require_offered"]

OF_A_SOURCE: Final = ("output.length", "data.mask", "data.mask_rule")
"""Keys that mean something to a model that takes a video alone."""


def require_offered(
    cfg: RunConfig, family: str, *, choices: Mapping[str, Sequence[object]], without: Sequence[str] = ()
) -> None:
    """choices: the values a family offers, by dotted key; without: keys that mean nothing to it and must keep
    their default; a switch that is off asks for nothing. Raises UsageError for the first that is otherwise,
    naming what the family offers."""
    for dotted, offered in choices.items():
        if (value := value_of(cfg, dotted)) not in offered:
            raise UsageError(
                f"{cfg.model.name} has no {_word(value)} here",
                where=dotted,
                fix=f"{family} offers {' and '.join(_word(each) for each in offered if each is not None)}",
            )
    strategies = choices.get("long_video.strategy", ())
    for dotted in without:
        default = keys()[dotted].default
        if (value := value_of(cfg, dotted)) != default and value is not False:
            means = "" if default is None else f", which means {_word(default)}"
            # A word of another way to make a long video: say which ways there are.
            about_length = strategies and dotted.startswith("long_video.")
            offers = f"; long_video.strategy is {' or '.join(map(str, strategies))}" if about_length else ""
            raise UsageError(
                f"{cfg.model.name} does not know this setting, {_word(value)} was asked",
                where=dotted,
                fix=f"leave it out{means}{offers}",
            )


def _word(value: object) -> str:
    """As people write it in a file."""
    return str(value).lower() if isinstance(value, bool) else str(value)
