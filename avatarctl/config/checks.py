"""Values that are right one by one and wrong together, and values that have no code yet."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from avatarctl.config.commands import keys_of
from avatarctl.config.keys import ANY, KeySpec
from avatarctl.config.sections import RunConfig
from avatarctl.errors import ConfigError, NotYetSupported

if TYPE_CHECKING:
    from avatarctl.config.reader import Setting

__all__ = ["check_compat", "check_together", "require_supported", "value_of"]


def value_of(cfg: RunConfig, dotted: str) -> Any:
    """The value of `section.key` in `cfg`."""
    section, _, name = dotted.partition(".")
    return getattr(getattr(cfg, section), name)


def check_compat(mode: str, layer: Mapping[str, Setting], asked: Mapping[str, Setting]) -> None:
    """Refuse a compat mode beside an explicit audio offset that it contradicts."""
    implied, own = layer.get("model.audio_offset"), asked.get("model.audio_offset")
    if implied is not None and own is not None and implied.value != own.value:
        raise ConfigError(
            f"model.audio_offset {own.value} contradicts model.compat {mode}, which means {implied.value}",
            where=own.origin,
            fix="remove one of the two",
        )


def check_together(cfg: RunConfig, origins: Mapping[str, str], own: Container[str]) -> None:
    """Refuse combinations that no model and no material could make work. Raises ConfigError.

    own: the keys that a person or a file sets; half a size of theirs is never completed by the model row.
    """
    overlap, frames = cfg.long_video.overlap_frames, cfg.long_video.num_frames
    if overlap is not None and frames is not None and cfg.long_video.strategy != "off" and overlap >= frames:
        raise ConfigError(
            f"long_video.overlap_frames {overlap} must be below long_video.num_frames {frames}"
            f"{_from(origins, 'long_video.num_frames')}",
            where=origins.get("long_video.overlap_frames"),
        )
    if overlap == 0 and cfg.long_video.strategy == "chunks":
        raise ConfigError(
            "long_video.overlap_frames 0 is for strategy fused only",
            where=origins.get("long_video.overlap_frames"),
            fix="chunks need at least 1",
        )
    for section in ("output", "data"):
        for given, other in (("width", "height"), ("height", "width")):
            one, two = f"{section}.{given}", f"{section}.{other}"
            if one in own and two not in own:
                raise ConfigError(f"{one} is given without {two}", where=origins.get(one))
    if cfg.input.image is not None and cfg.input.video is not None:
        raise ConfigError(
            "input.image and input.video are both given", where=origins.get("input.video"), fix="remove one"
        )


def _from(origins: Mapping[str, str], dotted: str) -> str:
    return f" (from {origins[dotted]})" if dotted in origins else ""


def require_supported(cfg: RunConfig, command: str, origins: Mapping[str, str] | None = None) -> None:
    """Refuse values that are valid but without code in `command`, of the keys that it reads.

    Raises NotYetSupported naming key and value; `origins` (see `Resolved`) adds the place.
    """
    for spec, value in _without_code(cfg, command):
        shown = str(value).lower() if isinstance(value, bool) else value
        raise NotYetSupported(
            f"{spec.dotted} {shown} is not yet supported by `avatarctl {command}`",
            where=(origins or {}).get(spec.dotted),
        )


def _without_code(cfg: RunConfig, command: str) -> Iterator[tuple[KeySpec, Any]]:
    for spec in keys_of(command).values():
        value, mark = value_of(cfg, spec.dotted), spec.not_yet(command)
        if mark == ANY:
            found = [value] if value != spec.default else []
        else:
            # Of a mapping its keys are marked: parts that have no code.
            found = [item for item in (value if isinstance(value, Mapping) else (value,)) if item in mark]
        yield from ((spec, item) for item in found)
