"""Any weight file or folder that somebody names, as tensors under the names that it uses.

Files are told apart by their contents. In a folder one set of weights is found: a sharded set with its
index, a file with a name that everybody knows, or the only weight file there; safetensors count before a
pickle of the same name; where two could be meant, the user is asked. What was chosen, opened or left aside is
said in `notes`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from avatarctl.errors import UnusableWeights, printable
from avatarctl.files.pickle_file import is_pickle, read_pickle
from avatarctl.files.safetensors_file import read_header
from avatarctl.files.state_dict import Wrapper
from avatarctl.files.strict_json import clip, file_size, listed, read_object, reading
from avatarctl.files.tensors import StoredTensor
from avatarctl.files.writer import SOURCES_KEY

__all__ = ["COMPANION", "COMPANION_OF", "RawWeights", "open_weights"]

COMPANION: Final = "avatarctl.companion"
"""Metadata of one of our files: name of its second file, beside it, which holds the rest of the tensors."""

COMPANION_OF: Final = "avatarctl.companion_of"
"""Metadata of such a second file: name of the first."""

MAX_CONFIG: Final = 1 << 20
MAX_INDEX: Final = 16 << 20

INDEX_SUFFIXES: Final = (".safetensors.index.json", ".bin.index.json")
PICKLE_SUFFIXES: Final = (".pt", ".pth", ".bin", ".ckpt")

_SECOND: Final = ".patch.safetensors"
"""What the name of a second file ends in, behind the stem of the first."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)", re.ASCII)
_WELL_KNOWN: Final = {
    "diffusion_pytorch_model": "diffusion_pytorch_model",
    "model": "model",
    "pytorch_model": "model",
    "adapter_model": "adapter_model",
    "pytorch_lora_weights": "pytorch_lora_weights",
    "trainable_weights": "trainable_weights",
}
"""File names that say "these are the weights of this folder"; equal values are one model in two formats."""

_TRAINING_STATE = re.compile(r"(optimizer|scheduler|scaler|random_states|rng_state|training_args)", re.ASCII)
_BLOCK: Final = re.compile(r"block_\d+\.safetensors|non_block\.safetensors", re.ASCII)
_TRAINERS: Final = (
    (
        re.compile(r"zero_to_fp32\.py|.+_(optim|model)_states\.pt", re.ASCII),
        "is a checkpoint of DeepSpeed, its weights in parts among the states of processes",
        "run `python zero_to_fp32.py . OUT` in the folder where that script lies, and name OUT",
    ),
    (
        re.compile(r".+\.distcp", re.ASCII),
        "is a distributed checkpoint of torch (DCP, also of FSDP), one part for each process",
        "name OUT of `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER OUT.pt`",
    ),
    (
        _BLOCK,
        "holds a model in files by block, as LightX2V writes them, without their index",
        "put diffusion_pytorch_model.safetensors.index.json beside them, or name the uncut model",
    ),
)
"""Names of files that tell what wrote a folder, what that is, and how it becomes a file that is read."""
_PART: Final = re.compile(rf".+\.distcp|\.metadata|.+_optim_states\.pt|{_BLOCK.pattern}", re.ASCII)
"""Names of files that are of no use without the others of such a folder. One block alone may be anything."""

_STEP = re.compile(r"(step-.*|trainable_weights)\.pt", re.ASCII)

Format = Literal["safetensors", "zip", "legacy"]


@dataclass(frozen=True)
class RawWeights:
    """What a file or folder holds.

    path:    what the user named; files: the weight files, in reading order.
    tensors: by name as in the file, after wrapper dictionaries were opened, in the order of their bytes.
    metadata: strings of the safetensors header; config: config.json or adapter_config.json, else empty.
    wrappers: dictionaries that were opened in a pickle, outermost first.
    notes:   what was chosen, opened or left aside, one line each.
    """

    path: Path
    files: tuple[Path, ...]
    format: Format
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    wrappers: tuple[Wrapper, ...] = ()
    notes: tuple[str, ...] = ()


def open_weights(path: Path) -> RawWeights:
    """Reads what `path` declares; its tensors are read later.

    Raises PathNotFound where it does not exist, UnusableWeights for everything that is wrong with it.
    """
    notes: list[str] = []
    chosen = path
    if path.is_dir():
        chosen = _choose(path, notes)
    elif shard := _part_of_many(path):
        file_size(path)
        name, count = shard
        index = path.with_name(f"{name}.index.json")
        hint = f"name {index.name} or the folder" if index.exists() else f"its index {index.name} is missing"
        raise UnusableWeights(f"is one of {count} files of a model, not the whole", where=path, fix=hint)
    elif _PART.fullmatch(path.name) and path.is_file():
        _refuse_of_trainers([path.parent], blocks=2)
    raw = _read_index(chosen) if chosen.name.endswith(INDEX_SUFFIXES) else _with_companion(_read_file(chosen))
    config_path = _config_beside(chosen, anything=chosen != path)
    config = read_object(config_path, MAX_CONFIG) if config_path else {}
    told = tuple(printable(note) for note in dict.fromkeys((*notes, *raw.notes)))
    return replace(raw, path=path, config=config, notes=told)


def _part_of_many(path: Path) -> tuple[str, int] | None:
    """(file name without the number, count) of one of several shards."""
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) < 2:
        return None
    return match["stem"] + match["suffix"], int(match["count"])


# --- files ---------------------------------------------------------------------------------------


def _read_file(path: Path) -> RawWeights:
    """One weight file; a name that says otherwise than the contents is refused, not believed."""
    file_size(path)
    with reading(path), path.open("rb") as file:
        start = file.read(16)
    header_follows = start[8:9] == b"{" and not is_pickle(start)
    if path.suffix == ".safetensors" and not header_follows and is_pickle(start, of_torch=False):
        raise UnusableWeights(
            "refused: it is a pickle (torch.save), not a safetensors file", where=path,
            fix="give it the suffix .pt if that is what you meant to have",
        )  # fmt: skip
    if path.suffix == ".safetensors" or header_follows:
        if path.suffix in PICKLE_SUFFIXES:
            raise UnusableWeights(
                "refused: it is a safetensors file, not a pickle", where=path,
                fix="give it the suffix .safetensors",
            )  # fmt: skip
        header = read_header(path)
        return RawWeights(path, (path,), "safetensors", header.tensors, header.metadata)
    found = read_pickle(path)
    return RawWeights(path, (path,), found.format, found.tensors, wrappers=found.wrappers, notes=found.notes)


def _with_companion(raw: RawWeights) -> RawWeights:
    """Adds the tensors of the second file that our own first file names."""
    if first := raw.metadata.get(COMPANION_OF):
        return replace(raw, notes=(*raw.notes, f"this is the second file of {clip(first)}"))
    if (name := raw.metadata.get(COMPANION)) is None:
        return raw
    second = _sibling(raw.path, name, "its second file")
    if not second.exists():
        renamed = raw.path.with_name(f"{raw.path.stem}{_SECOND}")
        there = renamed.is_file()
        if not (there and _belong(raw.metadata, read_header(renamed).metadata)):
            other = f"; {clip(renamed.name)} is of another conversion" if there else ""
            raise UnusableWeights(
                f"its second file {clip(name)} is missing{other}",
                where=raw.path,
                fix="put it beside this one"
                + (f", under that name or as {clip(renamed.name)}" if renamed.name != name else ""),
            )
        second = renamed
    name = second.name
    header = read_header(second)
    _check_companion(raw, name, header.metadata)
    if twice := raw.tensors.keys() & header.tensors.keys():
        what = f"tensor {clip(min(twice))!r} is in both {raw.path.name} and {clip(name)}"
        raise UnusableWeights(f"duplicate: {what}", where=raw.path)
    note = f"read together with its second file {clip(name)}"
    files, tensors = (*raw.files, second), {**raw.tensors, **header.tensors}
    return replace(raw, files=files, tensors=tensors, notes=(*raw.notes, note))


def _check_companion(raw: RawWeights, name: str, theirs: Mapping[str, str]) -> None:
    """Both halves come from one conversion: another's would fit by its names and be silently wrong.

    A first file that was given another name is still known by the hashes of what both were made from.
    """
    first = theirs.get(COMPANION_OF)
    if first is None:
        raise UnusableWeights(f"its second file {clip(name)} is no second half of an adapter", where=raw.path)
    ours, others = _of_conversion(raw.metadata), _of_conversion(theirs)
    different = sorted(key for key in ours | others if ours.get(key) != others.get(key))
    if first != raw.path.name and SOURCES_KEY not in raw.metadata:
        different.append(COMPANION_OF)
    if different:
        raise UnusableWeights(
            f"its second file {clip(name)} is of another conversion: {different[0]} differs",
            where=raw.path,
            fix="convert the adapter again, with --overwrite",
        )


def _belong(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Whether two headers are those of two files that one conversion wrote."""
    alike = _of_conversion(first) == _of_conversion(second)
    return COMPANION in first and COMPANION_OF in second and SOURCES_KEY in first and alike


def _of_conversion(metadata: Mapping[str, str]) -> dict[str, str]:
    """What both files of one conversion say of it."""
    return {
        key: value
        for key, value in metadata.items()
        if key.startswith("avatarctl.") and key not in (COMPANION, COMPANION_OF)
    }


def _sibling(path: Path, name: str, what: str) -> Path:
    """The file `name` beside `path`; a name that could lead elsewhere is refused."""
    if not name or name in (".", "..") or re.search(r"[/\\:\0]", name) or not name.isprintable():
        raise UnusableWeights(
            f"{what} {clip(name)!r} is not a plain file name: an unsafe path outside the folder", where=path
        )
    return path.with_name(name)


def _read_index(path: Path) -> RawWeights:
    """A sharded set: every tensor exactly where the index says, and no others."""
    index = read_object(path, MAX_INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UnusableWeights("invalid index: weight_map must map tensor names to file names", where=path)
    if not places:
        raise UnusableWeights("the index names no tensors", where=path)
    wanted: dict[str, set[str]] = {}
    for tensor, name in places.items():
        wanted.setdefault(name, set()).add(tensor)
    files = [_sibling(path, name, "shard") for name in sorted(wanted)]
    for file in files:
        if not file.is_file():
            raise UnusableWeights(f"shard {clip(file.name)} is missing", where=path, fix="download it again")
    shards = [_read_file(file) for file in files]
    if len({shard.format for shard in shards}) > 1:
        raise UnusableWeights("its shards have different formats", where=path)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    notes: list[str] = []
    for shard in shards:
        _check_shard(shard, wanted[shard.path.name], places, path)
        tensors.update(shard.tensors)
        notes.extend(shard.notes)
        for key, value in shard.metadata.items():
            if metadata.setdefault(key, value) != value:
                notes.append(f"metadata {clip(key)} differs between shards; the first one counts")
    return RawWeights(path, tuple(files), shards[0].format, tensors, metadata, notes=tuple(notes))


def _check_shard(shard: RawWeights, wanted: set[str], places: Mapping[str, str], path: Path) -> None:
    name = clip(shard.path.name)
    if missing := wanted - shard.tensors.keys():
        what = f"{clip(min(missing))!r} is missing from shard {name}, where the index says it is"
        raise UnusableWeights(what, where=path)
    if extra := shard.tensors.keys() - wanted:
        tensor = min(extra)
        elsewhere = f"puts it into {clip(places[tensor])}" if tensor in places else "does not name it"
        raise UnusableWeights(f"shard {name} holds {clip(tensor)!r}, but the index {elsewhere}", where=path)


# --- folders -------------------------------------------------------------------------------------


def _choose(folder: Path, notes: list[str]) -> Path:
    """The one set of weights of a folder: a file or an index. Raises UnusableWeights."""
    with reading(folder):
        inside = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    names = {entry.name for entry in inside}
    if "model_index.json" in names and (folder / "transformer").is_dir():
        more = [name for name in sorted(names) if re.fullmatch(r"transformer.+", name)]
        aside = f"; not {', '.join(more)}" if more else ""
        notes.append(f"a diffusers pipeline: read its folder transformer{aside}")
        return _choose(folder / "transformer", notes)
    sets = _weight_sets(inside)
    if len(sets) > 1 and all(any(told.fullmatch(path.name) for told, *_ in _TRAINERS) for path in sets):
        _refuse_of_trainers([folder])
    if not sets:
        return _choose_checkpoint(folder, inside, notes)
    newer = {_stem(path) for path in sets if ".safetensors" in path.suffixes}
    candidates = [path for path in sets if ".safetensors" in path.suffixes or _stem(path) not in newer]
    known: dict[str, list[Path]] = {}
    for path in candidates:
        if (stem := _WELL_KNOWN.get(_stem(path))) is not None:
            known.setdefault(stem, []).append(path)
    if len(candidates) == 1:
        chosen = candidates[0]
    elif len(known) == 1 and (best := _one_model(*known.values())):
        chosen = best
    else:
        raise UnusableWeights(
            f"holds several weight files: {_listed(candidates)}", where=folder, fix="name the one you mean"
        )
    if others := [path for path in sets if path != chosen]:
        notes.append(f"read {chosen.name}; beside it, not read: {_listed(others)}")
    return chosen


def _refuse_of_trainers(folders: Iterable[Path], blocks: int = 1) -> None:
    """Raise UnusableWeights for the first folder whose files a trainer has cut into parts, at least `blocks`
    where they are blocks."""
    for folder in folders:
        with reading(folder):
            names = [path.name for path in folder.iterdir()]
        whole = any(name.endswith(INDEX_SUFFIXES) for name in names)
        for told, what, fix in _TRAINERS:
            if not whole and sum(map(bool, map(told.fullmatch, names))) >= (blocks if told is _BLOCK else 1):
                raise UnusableWeights(what, where=folder, fix=fix)


def _choose_checkpoint(folder: Path, inside: Sequence[Path], notes: list[str]) -> Path:
    """Weights of a training run's folder that holds nothing but `checkpoint-N` folders."""
    entries = [entry for entry in inside if entry.name.startswith("checkpoint-")]
    found = [weights for entry in entries if (weights := entry / "trainable_weights.pt").is_file()]
    if not found:
        below = [*folder.glob("*"), *(path for entry in entries for path in entry.glob("*"))]
        _refuse_of_trainers([folder, *sorted(path for path in below if path.is_dir())])
        raise UnusableWeights("holds no weight file", where=folder, fix="name the file or its folder")
    if len(found) > 1:
        listed = _listed([weights.parent for weights in found])
        raise UnusableWeights(
            f"holds several checkpoints: {listed}", where=folder, fix="name the one you mean"
        )
    notes.append(f"read {found[0].relative_to(folder)}")
    return found[0]


def _weight_sets(inside: Sequence[Path]) -> list[Path]:
    """Indexes, and weight files that belong to no index and to no other file."""
    indexes = [path for path in inside if path.name.endswith(INDEX_SUFFIXES)]
    covered = {path.name.removesuffix(".index.json") for path in indexes}
    single: list[Path] = []
    for path in inside:
        if path.suffix not in (".safetensors", *PICKLE_SUFFIXES) or path.is_dir():
            continue
        if shard := _part_of_many(path):
            if shard[0] not in covered:
                what = f"holds {clip(path.name)}, but its index {clip(shard[0])}.index.json is missing"
                raise UnusableWeights(what, where=path.parent)
        elif not _TRAINING_STATE.match(path.name) and not (indexes and _BLOCK.fullmatch(path.name)):
            single.append(path)
    if len(single) > 1:
        single = [path for path in single if not _is_companion(path, single)]
    return [*indexes, *single]


def _is_companion(path: Path, others: Sequence[Path]) -> bool:
    """Whether this is the second file of another one in the folder, also if both were renamed alike."""
    if path.suffix != ".safetensors":
        return False
    renamed = path.with_name(f"{path.name.removesuffix(_SECOND)}.safetensors")
    try:
        metadata = read_header(path).metadata
        if (first := metadata.get(COMPANION_OF)) is None:
            return False
        if path.with_name(Path(first).name) in others:
            return True
        return renamed in others and _belong(read_header(renamed).metadata, metadata)
    except UnusableWeights:
        return False  # told when it is chosen; among others it stays a candidate


def _one_model(paths: Sequence[Path]) -> Path | None:
    """The one to read of files with well-known names: safetensors before the same model as `.bin`."""
    newer = [path for path in paths if ".bin" not in path.suffixes]
    if len(newer) == 1 and (len(paths) == 1 or ".safetensors" in newer[0].suffixes):
        return newer[0]
    return paths[0] if len(paths) == 1 else None


def _stem(path: Path) -> str:
    for suffix in INDEX_SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem


def _listed(paths: Sequence[Path]) -> str:
    return listed([path.name for path in paths], 60)


def _config_beside(weights: Path, *, anything: bool) -> Path | None:
    """The configuration that belongs to a weight file or index.

    anything: a folder was named, so whatever configuration lies in it belongs to it. For a file that
    was named itself only the pairs that everybody writes count: a download folder holds many things.
    diffusers writes no config.json beside a LoRA, so that one there describes another file.
    """
    stem = _WELL_KNOWN.get(_stem(weights))
    if stem == "adapter_model":
        names = ["adapter_config.json", "config.json"]
    elif stem == "pytorch_lora_weights":
        names = ["adapter_config.json"] if anything else []
    elif stem is not None or anything:
        names = ["config.json", *(["adapter_config.json"] if anything else [])]
    else:
        names = ["config.json"] if _STEP.fullmatch(weights.name) else []
    folders = [weights.parent]
    if _STEP.fullmatch(weights.name):
        folders.append(weights.absolute().parent.parent)
    candidates = (folder / name for folder in folders for name in names)
    # One that is there and cannot be read is an error: it may state the scale of an adapter.
    return next((config for config in candidates if os.path.lexists(config)), None)
