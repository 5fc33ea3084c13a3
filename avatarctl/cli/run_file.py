"""What a run file holds of paths: absolute ones, so that it repeats the run from any folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from avatarctl.config import Resolved, RunConfig, value_of
from avatarctl.config.rules import FACE_WORDS
from avatarctl.registry import ROWS

__all__ = ["with_absolute_paths"]


def with_absolute_paths(resolved: Resolved, cfg: RunConfig, keys: Iterable[str]) -> Resolved:
    """`resolved` with `cfg`, whose paths are absolute: those of `keys`, of sets to
    validate on, of the model, of its files and LoRAs.

    A model's registry name, a LoRA's hub name and the words of `data.faces` are no paths and stay.
    """
    from avatarctl.loading.loras import absolute_lora

    absolute: dict[str, Any] = {dotted: _absolute(value_of(cfg, dotted)) for dotted in keys}
    absolute["validation.sets"] = tuple(str(_absolute(path)) for path in cfg.validation.sets)
    absolute["model.lora"] = tuple(absolute_lora(text) for text in cfg.model.lora)
    absolute["model.weights"] = {part: _absolute(path) for part, path in cfg.model.weights.items()}
    absolute["model.weights_root"] = _absolute(cfg.model.weights_root)
    if cfg.model.name not in ROWS:
        absolute["model.name"] = _absolute(cfg.model.name)
    if cfg.data.faces in FACE_WORDS:
        absolute.pop("data.faces", None)
    asked = dict(resolved.asked)
    sections: dict[str, Any] = {}
    for dotted, value in absolute.items():
        if value:
            section, _, name = dotted.partition(".")
            sections[section] = replace(sections.get(section, getattr(cfg, section)), **{name: value})
            if dotted in asked:
                asked[dotted] = replace(asked[dotted], value=value)
    return replace(resolved, cfg=replace(cfg, **sections), asked=asked)


def _absolute(path: str | None) -> str | None:
    from avatarctl.files.named_path import expanded

    return str(expanded(path).absolute()) if path else None
