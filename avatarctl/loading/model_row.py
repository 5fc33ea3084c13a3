"""What `--model` means: a registry name, or a file or folder that says itself what it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from avatarctl.config import read_config
from avatarctl.errors import PathNotFound, UnusableWeights
from avatarctl.hub.locate import WEIGHT_SUFFIXES
from avatarctl.loading.loras import find_here
from avatarctl.loading.trained import base_of, full_model_below, is_run_folder, trained_weights
from avatarctl.registry import NEEDS_WEIGHTS, ROWS, Row, encoder_part, find_model
from avatarctl.weights.loaders import avatars_on
from avatarctl.weights.made_for import trained_shape
from avatarctl.weights.metadata import data_of
from avatarctl.weights.recognise import open_model
from avatarctl.weights.weight_file import WeightFile

__all__ = ["row_named", "stated_by"]

_UNKNOWN_HEAD_WIDTH: Final = 128
"""Where only the base of an adapter can tell: that of every published Wan transformer."""


def row_named(name: str) -> Row:
    """The row of a registry name, or one made for the file or folder `name`.

    Raises ConfigError for names that nobody has, PathNotFound, and UnusableWeights for files that are no
    avatar model, naming what they are.
    """
    if name in ROWS:
        return find_model(name)
    path = find_here(name)
    if path is not None and is_run_folder(path):
        return _row_of_run(path.absolute())
    if path is None:
        for row in ROWS.values():
            if name == row.hub_id:
                return find_model(row.name)  # says which model uses it
        if "/" in name or name.endswith(WEIGHT_SUFFIXES):
            raise PathNotFound("no such file or folder, and no model of this name", where=name)
        return find_model(name)
    return _row_of(path.absolute(), open_model(path))


def stated_by(model: str, transformer: str) -> dict[str, Any]:
    """What a transformer that is named in place of a published model's own states of how it is to be used:
    `data.mask_rule` where its header has one. Below a file or folder that is a model itself it is a base,
    and says nothing. Raises UnusableWeights."""
    path = find_here(transformer) if model in ROWS else None
    if path is None:
        return {}  # where it should be there, `find_sources` says so
    rule = data_of(open_model(path)).get("mask_rule")
    return {"data.mask_rule": rule} if rule else {}


def _row_of_run(folder: Path) -> Row:
    """The row of what `avatarctl train` made: of the model that was trained, with these weights in it.

    A model that comes with the program needs no file beside them.
    """
    path, passed_over = trained_weights(folder)
    told: dict[str, Any] = {"passed_over": passed_over, "chosen": f"{path.parent.name}/{path.name}"}
    held = open_model(path)
    base = ROWS.get(str(base_of(path).get("model")))
    size = _trained_size(path)
    sizes = ((size["data.width"], size["data.height"]),) if size else ()
    if base is None or base.source != "package":
        row = replace(_row_of(path, held), name=folder.name)
        seen = replace(row.trained_for, sizes=sizes)
        return replace(row, defaults={**row.defaults, **size}, trained_for=seen, **told)
    data = data_of(held)
    video = {key: value for key, value in base.defaults.items() if key.startswith("output.")}
    shown = {f"output.{side}": size[f"data.{side}"] for side in ("width", "height") if size and video}
    defaults = {
        **base.defaults,
        **size,
        **shown,
        "model.channels": held.sizes.in_channels,
        "model.audio_offset": held.audio_offset,
        "train.init": "zero_channels",  # these weights are there, whatever its row says of its own
        **({"data.mask_rule": data["mask_rule"]} if "mask_rule" in data else {}),
    }
    network = {**base.network, "dit": {**base.network["dit"], "in_channels": held.sizes.in_channels}}
    below, digests = full_model_below(path) if held.kind == "adapter" else ("", {})
    return replace(
        base,
        name=folder.name,
        title=f"{held.variant}, trained from {base.name}",
        network=network,
        defaults=defaults,
        audio_offset_stated=True,
        trained_with=data,
        trained=True,
        trained_for=replace(base.trained_for, sizes=sizes),
        path=str(path),
        base_path=below,
        base_sha256=digests,
        **told,
    )


def _trained_size(path: Path) -> dict[str, int]:
    """Width and height of the clips that the weights in a checkpoint learnt from, as its run file says."""
    settings = read_config(path.parent / "run.yaml").settings
    keys = ("data.width", "data.height")
    return {key: settings[key].value for key in keys} if all(key in settings for key in keys) else {}


def _row_of(path: Path, held: WeightFile) -> Row:
    """The row of a full model or of an adapter."""
    published = _like(held)
    adapter = held.kind == "adapter"
    stated: dict[str, Any] = {"model.channels": held.sizes.in_channels}
    data = data_of(held)
    if "mask_rule" in data:
        stated["data.mask_rule"] = data["mask_rule"]
    if held.audio_offset is not None:
        stated["model.audio_offset"] = held.audio_offset
    encoders: dict[str, Any] = {}
    if not adapter:
        # Of the base's release, what stands beside the transformer.
        base = next((ROWS[name] for name in published.needs if ROWS[name].kind == "base"), None)
        if base is not None:
            encoders = {"hub_id": base.hub_id, "files": tuple(filter(encoder_part, base.files))}
    kinds = ("base", "encoder") if adapter else ("encoder",)
    own = adapter and path.suffix == ".safetensors"
    below, digests = full_model_below(path) if own else ("", {})
    heads = held.heads or held.sizes.width // _UNKNOWN_HEAD_WIDTH or 1
    return Row(
        name=path.name,
        kind="model",
        title=held.variant,
        status=NEEDS_WEIGHTS,
        source="path",
        family=held.layout.family,
        network={"dit": {"attention_head_dim": held.sizes.width // heads}},
        defaults={**published.defaults, **stated},
        audio_offset_stated=held.audio_offset is not None and not held.audio_offset_assumed,
        trained_with=data,
        trained_for=published.trained_for,
        compat=published.compat,
        needs=tuple(name for name in published.needs if ROWS[name].kind in kinds),
        path=str(path),
        base_path=below,
        base_sha256=digests,
        **encoders,
    )


def _like(held: WeightFile) -> Row:
    """The published model whose defaults and encoders `held` takes: the one of its width, else the smallest;
    of several, the one that is made for the same shape of video.

    Raises UnusableWeights for everything that cannot be a model.
    """
    published = [row for row in ROWS.values() if _is_published(row, held.layout.family)]
    bases = any(ROWS[name].kind == "base" for row in published for name in row.needs)
    if held.layout.supported and published and (bases or held.kind == "model"):
        widths = {row.width for row in published}
        width = held.sizes.width if held.sizes.width in widths else min(widths)
        alike = [row for row in published if row.width == width]
        shape = trained_shape(held)
        return next((row for row in alike if shape and row.made_for == shape), alike[0])
    if held.kind == "adapter":
        raise UnusableWeights(
            f"is {_article(held.variant)} {held.variant}: it changes a model and is none",
            where=held.path,
            fix="name the model by --model and this file by --lora",
        )
    if held.layout.family == "wan":
        place = "; this file is found, or named by --weights dit=PATH" if avatars_on(held) else ""
        raise UnusableWeights(
            f"is {held.variant}, which has no audio layers",
            where=held.path,
            fix=f"name an avatar model or its adapter by --model{place}",
        )
    raise UnusableWeights(f"is {held.variant}, which this version does not run", where=held.path)


def _article(what: str) -> str:
    return "an" if what[0] in "aeiou" else "a"


def _is_published(row: Row, family: str) -> bool:
    return row.kind == "model" and row.source == "hub" and row.family == family and row.width > 0
