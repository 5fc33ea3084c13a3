"""Which file each part of a run comes from, all found before anything large is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from avatarctl.config import Model, RunConfig
from avatarctl.errors import ConfigError, PathNotFound, UnusableWeights, WeightsMissing
from avatarctl.files.named_path import expanded
from avatarctl.hub.locate import Located, locate, with_needs
from avatarctl.loading.loras import Lora, find_lora
from avatarctl.media.files import file_sha256
from avatarctl.registry import (
    ENCODER_FILES,
    JUDGES,
    ROWS,
    Row,
    Wanted,
    encoder_part,
    fitting,
)
from avatarctl.weights.recognise import open_model, read_weight_file

__all__ = [
    "Sources",
    "asked_size",
    "check_base",
    "check_packaged",
    "find_sources",
    "missing_line",
    "weights_missing",
]

_SHARD: Final = re.compile(r"(?P<stem>.*-)(?P<number>\d{5})(?P<rest>-of-\d{5}\..*)")


@dataclass(frozen=True)
class Sources:
    """dit: a full model, or a base and the adapters that make it the model, in order; empty where built in.
    encoders: "vae", "text", "tokenizer" (a folder), "audio" (a folder), "clip", as far as found; of a row
             that comes with the program "vae", "config" (of the VAE), "text" and "audio", each a file.
    base_configs: for one full model, each config.json that may be that of the base it came out of.
    row:    name of the row whose own files these are: the one that was asked for, or one of its `instead`.
    notes:  one line each, for people.
    """

    dit: tuple[Path, ...] = ()
    encoders: Mapping[str, Path] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()
    missing: tuple[Wanted, ...] = ()
    row: str = ""
    notes: tuple[str, ...] = ()
    base_configs: tuple[Path, ...] = ()


def find_sources(row: Row, model: Model, size: tuple[int, int] | None = None) -> Sources:
    """The files of a run of `row`; `model.weights` wins over what the row's repositories hold.

    size: (width, height) of the video. Of weights that are published for several shapes it chooses; where
    those are not here, others are taken.

    Raises PathNotFound for a path that was named and is not there, WeightsMissing for a LoRA that was not
    fetched, UnusableWeights for an adapter without a base.
    """
    named = _named(row, model)
    loras = tuple(find_lora(text, model.weights_root) for text in model.lora)
    if row.source == "package":
        packaged = _packaged(row)
        dit = packaged.dit
        if row.path and read_weight_file(Path(row.path)).kind == "adapter":
            loras = (Lora(Path(row.path), 1.0), *loras)
            dit = (_stated_base(row, named.get("dit")),) if row.base_path else dit
        elif row.path:
            dit = (Path(row.path),)
        return Sources(dit, packaged.encoders, loras, packaged.missing, row.name)
    needed = [locate(each, model.weights_root) for each in with_needs(row) if each is not row]
    own, notes = _own(row, model.weights_root, size)
    places = [own, *needed]
    encoders, missing = _encoders(places, named, model.weights_root)
    dit, wanted = _transformer(row, places, named.get("dit"))
    notes = () if "dit" in named else notes
    configs = _base_configs(dit[0], encoders) if len(dit) == 1 else ()
    return Sources(dit, encoders, loras, (*wanted, *missing), own.row.name, notes, configs)


def _base_configs(model: Path, encoders: Mapping[str, Path]) -> tuple[Path, ...]:
    """config.json beside a full model, and in the release that its encoders are of: what was trained out of
    that release has none of its own."""
    beside = (path.parent for path in (model, *map(encoders.get, ("clip", "vae"))) if path and path.is_file())
    return tuple(path for home in dict.fromkeys(beside) if (path := home / "config.json").is_file())


def _packaged(row: Row) -> Sources:
    """The files that come with the program, by the first word of their names, without judges."""
    found = locate(row, None)
    parts = {Path(name).stem.partition("_")[0]: path for name, path in found.files.items()}
    parts = {part: path for part, path in parts.items() if part not in JUDGES}
    dit = (parts.pop("dit"),) if "dit" in parts else ()
    return Sources(dit, parts, missing=found.missing)


def check_packaged(row: Row, sources: Sources) -> None:
    """Raises WeightsMissing (exit 4) for a file of the package that is gone or has other bytes than the
    release."""
    fix = "install avatarctl again"
    for path in (*sources.dit, *sources.encoders.values()):
        if path == Path(row.path) or (row.base_path and path in sources.dit):
            continue  # trained since; its own header says what it is, see `check_base` for the other
        if not path.is_file():
            raise WeightsMissing("is missing", where=path, fix=fix)
        stated = row.sha256[path.relative_to(row.assets).as_posix()]
        if hashlib.sha256(path.read_bytes()).hexdigest() != stated:
            raise WeightsMissing(f"is damaged: its SHA-256 is not {stated}", where=path, fix=fix)


def check_base(row: Row, sources: Sources) -> None:
    """Raises UnusableWeights where the full model below an adapter is not the one that it was trained on: the
    sum would look like a model, and be none."""
    if not row.base_path:
        return
    files = open_model(sources.dit[0]).files
    if sorted(map(file_sha256, files)) != sorted(row.base_sha256.values()):
        raise UnusableWeights(
            f"is not the model that {row.path} was trained on: its SHA-256 is another one",
            where=sources.dit[0],
            fix="name that model by --weights dit=PATH",
        )


def _stated_base(row: Row, named: Path | None) -> Path:
    """Where the full model below an adapter is: as its header says, or as somebody named it since.

    Raises PathNotFound.
    """
    path = named or Path(row.base_path)
    if not path.exists():
        raise PathNotFound(
            f"was trained on {row.base_path}, which is not there",
            where=row.path,
            fix="bring it back, or name it by --weights dit=PATH",
        )
    return path


def asked_size(cfg: RunConfig) -> tuple[int, int] | None:
    """(width, height) of the video, None where the image decides."""
    width, height = cfg.output.width, cfg.output.height
    return (width, height) if width and height else None


def _own(row: Row, weights_root: str | None, size: tuple[int, int] | None) -> tuple[Located, tuple[str, ...]]:
    """What is here of the row's own files or of those that run in their place: first what is made for videos
    of `size`, then what is here."""
    fits = fitting(row, *size) if size else row
    others = [each for each in (row, *(ROWS[name] for name in row.instead)) if each is not fits]
    places = [locate(each, weights_root) for each in (fits, *others)]
    chosen = next((place for place in places if not place.missing), places[0])
    several = sum(not place.missing for place in places) > 1
    if size is None or not several:
        return chosen, ()
    file = next(iter(chosen.files.values()))
    return chosen, (f"{file.name} is used, of several, as the video is {size[0]}x{size[1]}",)


def _named(row: Row, model: Model) -> dict[str, Path]:
    """`model.weights` as existing paths."""
    # Judges of auxiliary losses are found by loading/judges.py, for training alone.
    paths = {part: expanded(text) for part, text in model.weights.items() if part not in JUDGES}
    if paths and row.source == "package" and not (row.base_path and paths.keys() == {"dit"}):
        raise ConfigError(f"{row.name} is built in; its parts come from no file", where="model.weights")
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
    if row.base_path:
        return (_stated_base(row, named), Path(row.path)), ()
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
    held = read_weight_file(named)
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


def weights_missing(row: Row, sources: Sources) -> WeightsMissing:
    """The error of a run of `row` without `sources.missing`."""
    pull = {"path": None, "package": "install avatarctl again"}.get(
        row.source, f"`avatarctl models pull {sources.row}` fetches them"
    )
    return WeightsMissing(missing_line(sources.missing), where=row.name, fix=pull)


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
