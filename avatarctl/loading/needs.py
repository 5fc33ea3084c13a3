"""Which published files a run needs: registry rows, and names on the hub that have no row."""

from __future__ import annotations

from collections.abc import Iterable

from avatarctl.config import RunConfig
from avatarctl.errors import PathNotFound
from avatarctl.hub.locate import HubName, read_hub_name, with_needs
from avatarctl.hub.pull import Wants
from avatarctl.loading.loras import read_lora
from avatarctl.loading.model_row import row_named
from avatarctl.loading.sources import asked_size
from avatarctl.registry import ROWS, find, fitting

__all__ = ["needs", "wanted_by_names"]


def wanted_by_names(names: Iterable[str]) -> Wants:
    """What these names stand for: rows with what they need, or `org/name[/path]` on the hub.

    Raises ConfigError for an unknown name, with the nearest.
    """
    wants = Wants((), ())
    for name in names:
        on_hub = read_hub_name(name) if name not in ROWS else None
        wants += Wants((), (on_hub,)) if on_hub else Wants(tuple(with_needs(find(name))), ())
    return wants


def needs(cfg: RunConfig) -> Wants:
    """The model of a resolved run with all its parts, and its LoRA files on the hub.

    Of a model that is published for several shapes of video it is the files for the size that was asked for.
    Raises PathNotFound for a LoRA that is neither here nor a name on the hub.
    """
    assert cfg.model.name is not None
    row, size = row_named(cfg.model.name), asked_size(cfg)
    if size is not None:
        row = fitting(row, *size)
    loras = (_on_hub(text) for text in cfg.model.lora)
    return Wants(tuple(with_needs(row)), tuple(name for name in loras if name is not None))


def _on_hub(text: str) -> HubName | None:
    """The hub name that `--lora` means; None for a file that is here already."""
    name, _, here = read_lora(text)
    if here is not None:
        return None
    hub_name = read_hub_name(name)
    if hub_name is None:
        raise PathNotFound("does not exist, and is no name on the hub (org/name/file)", where=name[:200])
    return hub_name
