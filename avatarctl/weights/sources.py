"""Which file each part of a run comes from, all found before anything large is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from avatarctl.config import Model
from avatarctl.errors import ConfigError, PathNotFound, UnusableWeights
from avatarctl.registry import ENCODER_FILES, ROWS, Row, VideoShape, Wanted, encoder_part
from avatarctl.weights.checkpoint import Checkpoint
from avatarctl.weights.files.named_path import expanded
from avatarctl.weights.hub.locate import Located, locate, with_needs
from avatarctl.weights.loras import Lora, find_lora
from avatarctl.weights.metadata import read_own
from avatarctl.weights.recognise import read_checkpoint

__all__ = ["Sources", "find_sources", "made_for_others", "missing_line", "video_shape"]

_SHARD: Final = re.compile(r"(?P<stem>.*-)(?P<number>\d{5})(?P<rest>-of-\d{5}\..*)")


@dataclass(frozen=True)
class Sources:
    """dit: a full model, or a base and the adapters that make it the model, in order; empty where built in.
    encoders: "vae", "text", "tokenizer" (a folder), "audio" (a folder), "clip", as far as found.
    notes: one line each, for people.
    """

    dit: tuple[Path, ...] = ()
    encoders: Mapping[str, Path] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()
    missing: tuple[Wanted, ...] = ()
    notes: tuple[str, ...] = ()


def find_sources(row: Row, model: Model, size: tuple[int, int] | None = None) -> Sources:
    """The files of a run of `row`; `model.weights` wins over what the row's repositories hold.

    size: (width, height) of the video. Of weights that are published for several shapes it chooses; without
    it they are the first that are here.

    Raises PathNotFound for a path that was named and is not there, WeightsMissing for a LoRA that was not
    fetched, UnusableWeights for an adapter without a base.
    """
    named = _named(row, model)
    loras = tuple(find_lora(text, model.weights_root) for text in model.lora)
    if row.source == "package":
        return Sources(loras=loras)
    needed = [locate(each, model.weights_root) for each in with_needs(row) if each is not row]
    own, notes = _made_for(row, model.weights_root, size)
    places = [own, *needed]
    encoders, missing = _encoders(places, named, model.weights_root)
    dit, wanted = _transformer(row, places, named.get("dit"))
    return Sources(dit, encoders, loras, (*wanted, *missing), () if "dit" in named else notes)


def video_shape(width: int, height: int) -> VideoShape:
    """The word of `Row.made_for` for a video of this size."""
    return "square" if width == height else "landscape or portrait"


def made_for_others(row: Row, held: Checkpoint, size: tuple[int, int]) -> str:
    """What to say of weights that were trained for videos of another shape than (width, height), empty for
    nothing. No tensor tells: it is known by the name of the file, or of the file it was converted from."""
    origins = (str(step.get("source")) for step in read_own(held.metadata).operations)
    names = [held.path.name, *(file.name for file in held.files), *origins]
    for end, shape in row.made_for.items():
        if shape != video_shape(*size) and any(Path(name).stem == end for name in names):
            return f"{held.path} was trained for {shape} videos, and this one is {size[0]}x{size[1]}"
    return ""


def _made_for(
    row: Row, weights_root: str | None, size: tuple[int, int] | None
) -> tuple[Located, tuple[str, ...]]:
    """What is here of the row's own files, of several published sets the one made for videos of `size`."""
    if size is None or not row.made_for:
        return locate(row, weights_root), ()
    fitting, others = _split(row, video_shape(*size))
    chosen = locate(fitting, weights_root)
    if chosen.missing or not chosen.files:
        return locate(row, weights_root), ()
    if locate(others, weights_root).missing:
        return chosen, ()
    file = next(iter(chosen.files.values()))
    return chosen, (f"{file.name} is used, of several, as the video is {size[0]}x{size[1]}",)


def _split(row: Row, shape: VideoShape) -> tuple[Row, Row]:
    """The row with the alternatives that are made for `shape` alone, and with the others alone."""
    fitting = tuple(end for end, made_for in row.made_for.items() if made_for == shape)

    def only(fits: bool) -> Row:
        files: list[str] = []
        stand_ins: dict[str, str] = {}
        for names in row.files:
            kept = [_chosen(each, fitting, fits) for each in (names, row.stand_ins.get(names, ""))]
            files.append(kept[0])
            stand_ins |= {kept[0]: kept[1]} if kept[1] else {}
        return replace(row, files=tuple(files), stand_ins=stand_ins)

    return only(True), only(False)


def _chosen(names: str, ends: tuple[str, ...], fits: bool) -> str:
    return "|".join(name for name in names.split("|") if Path(name).stem.endswith(ends) == fits)


def _named(row: Row, model: Model) -> dict[str, Path]:
    """`model.weights` as existing paths."""
    if model.weights and row.source == "package":
        raise ConfigError(f"{row.name} is built in; its parts come from no file", where="model.weights")
    paths = {part: expanded(text) for part, text in model.weights.items()}
    for part, path in paths.items():
        if not path.exists():
            raise PathNotFound(f"no such file or folder: {path}", where=f"model.weights.{part}")
    return paths


def _encoders(
    places: list[Located], named: Mapping[str, Path], weights_root: str | None
) -> tuple[dict[str, Path], tuple[Wanted, ...]]:
    found: dict[str, Path] = {}
    missing: list[Wanted] = []
    for place in places:
        if part := place.row.part:
            if part not in named:
                missing += place.missing
            if place.files and not place.missing:
                found[part] = _only_folder(place)
            continue
        for name in place.row.files:
            part = encoder_part(name)
            if part and part not in named:
                path = place.files.get(name) or _of_another_release(part, weights_root)
                if path is not None:
                    found[part] = path
                else:
                    missing += [wanted for wanted in place.missing if wanted.file == name]
    found |= {part: path for part, path in named.items() if part != "dit"}
    if "text" in named:
        found["text"], beside = _text(named["text"])
        if beside is not None:
            found["tokenizer"] = beside
            missing = [wanted for wanted in missing if encoder_part(wanted.file) != "tokenizer"]
    return found, tuple(missing)


def _of_another_release(part: str, weights_root: str | None) -> Path | None:
    """Every Wan 2.1 release carries the same encoders: the one that is here will do."""
    for row in ROWS.values():
        for name in row.files:
            if encoder_part(name) == part and name in (found := locate(row, weights_root).files):
                return found[name]
    return None


def _text(path: Path) -> tuple[Path, Path | None]:
    """The encoder's file, and the tokenizer's folder where one stands beside it."""
    file = path / ENCODER_FILES["text"] if path.is_dir() else path
    if not file.is_file():
        raise PathNotFound(f"no such file: {file}", where="model.weights.text")
    tokenizer = file.parent / ENCODER_FILES["tokenizer"]
    return file, tokenizer if tokenizer.is_dir() else None


def _only_folder(place: Located) -> Path:
    if place.folder is None:
        raise UnusableWeights(
            f"the files of {place.row.name} lie in several folders: "
            f"{', '.join(str(path.parent) for path in place.files.values())}",
            fix="put them into one",
        )
    return place.folder


def _transformer(
    row: Row, places: list[Located], named: Path | None
) -> tuple[tuple[Path, ...], tuple[Wanted, ...]]:
    """Files of the diffusion transformer, base first, and what is missing of them.

    A row that needs a base is one, or an adapter's; any other is a full model, at `row.path` or published as
    one file.
    """
    if not any(place.row.kind == "base" for place in places):
        if row.path and named is not None:
            raise ConfigError(f"{row.path} is a full model and has no base", where="model.weights.dit")
        if row.path or named is not None:
            return (named or Path(row.path),), ()
        own = places[0]
        return (() if own.missing else tuple(own.files.values())), own.missing
    of_base = [place for place in places if place.row.kind == "base"]
    of_adapters = [place for place in places if place.row.kind == "adapter"]
    adapters = tuple(_only_folder(place) for place in of_adapters if not place.missing)
    wanted = tuple(item for place in of_adapters for item in place.missing)
    if row.path:
        adapters = (*adapters, Path(row.path))
    if named is not None:
        return _on_named_base(row, named, adapters, wanted)
    lacking = [item for place in of_base for item in place.missing if not encoder_part(item.file)]
    base = () if lacking else tuple(_transformer_of(place) for place in of_base)
    return (*base, *adapters), (*lacking, *wanted)


def _on_named_base(
    row: Row, named: Path, adapters: tuple[Path, ...], wanted: tuple[Wanted, ...]
) -> tuple[tuple[Path, ...], tuple[Wanted, ...]]:
    held = read_checkpoint(named)
    if held.kind != "model":
        raise UnusableWeights(
            f"is {held.variant}, neither a base nor a full model", where=named, fix="name it by --model"
        )
    if held.layout.family == row.family:
        if row.path:
            raise UnusableWeights(
                f"is {held.variant}, complete, and --model names an adapter of one: {row.path}",
                where=named,
                fix="name it by --model, and the adapter by --lora if it comes on top",
            )
        return (named,), ()  # the row's adapter is in it
    return (named, *adapters), wanted


def _transformer_of(place: Located) -> Path:
    """The only weight file of a base, or the index of its shards, which a row names last."""
    return [path for name, path in place.files.items() if not encoder_part(name)][-1]


def missing_line(missing: tuple[Wanted, ...]) -> str:
    """All files in one line, grouped by the folder they go to."""
    folders: dict[str, list[str]] = {}
    for item in missing:
        source = f" from {item.hub_id}" if item.hub_id else ""
        folders.setdefault(f"{item.folder}/{source}", []).append(item.file)
    places = "; ".join(
        f"{', '.join(_shards_as_ranges(files))} in {place}" for place, files in folders.items()
    )
    return f"weights are missing: {places}"


def _shards_as_ranges(files: Iterable[str]) -> list[str]:
    """The names, neighbouring shards as one: `model-00001..00006-of-00006.safetensors`."""
    shown: list[str] = []
    first, previous = "", None
    for name in files:
        shard = _SHARD.fullmatch(name)
        if shard and previous and _follows(shard, previous):
            shown[-1] = f"{shard['stem']}{first}..{shard['number']}{shard['rest']}"
        else:
            shown.append(name)
            first = shard["number"] if shard else ""
        previous = shard
    return shown


def _follows(shard: re.Match[str], previous: re.Match[str]) -> bool:
    same = (shard["stem"], shard["rest"]) == (previous["stem"], previous["rest"])
    return same and int(shard["number"]) == int(previous["number"]) + 1
