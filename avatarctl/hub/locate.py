"""Where the files of a registry row lie on this disk. Nothing is fetched and nobody is asked.

Layouts: spec/weight-sources.md. The hub's cache is read by its documented layout
(`models--ORG--NAME/refs/main`, `snapshots/COMMIT/`), below the folder that `huggingface_hub` takes from its
own environment variables; its client is not imported for that. ModelScope's cache is read by the layout that
its client writes: `models/ORG/NAME` with the dots of the name as `___`, by older ones without `models/`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from avatarctl.errors import PathNotFound, UnusableWeights, UsageError
from avatarctl.files.named_path import expanded
from avatarctl.files.strict_json import read_object
from avatarctl.registry import ROWS, Row, Wanted, encoder_part

__all__ = [
    "RECORD",
    "USUAL_ROOTS",
    "WEIGHT_SUFFIXES",
    "HubName",
    "Located",
    "files_together",
    "folder_name",
    "found_in",
    "hub_cache",
    "hub_constants",
    "locate",
    "locate_hub_name",
    "missing_files",
    "places_of",
    "read_hub_name",
    "read_record",
    "recorded_owner",
    "snapshots",
    "with_needs",
]

USUAL_ROOTS: Final = ("pretrained_models", "checkpoints", "ckpt")
"""Folders of the current folder in which other toolkits keep `NAME/`."""

RECORD: Final = Path(".cache", "huggingface", "avatarctl.json")
"""What `models pull` writes down in a folder that it fills: repository, commit, licence."""

WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_SHARD: Final = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)", re.DOTALL)
_REPOSITORY: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_OUTSIDE: Final = frozenset({"", ".", ".."})
_LARGEST_RECORD: Final = 1 << 16


@dataclass(frozen=True)
class Located:
    """What was found of one row, without the rows that it needs.

    folder:  the folder that holds every file found; None if nothing was found or several folders share them.
    files:   names as in `row.files` -> the file, or what stands in for it, or the folder for a name that
             ends with "/".
    missing: what was found nowhere.
    """

    row: Row
    folder: Path | None
    files: Mapping[str, Path]
    missing: tuple[Wanted, ...]


@dataclass(frozen=True)
class HubName:
    """`org/name` or `org/name/path/in/it`; `path` is empty for a whole repository."""

    repo: str
    path: str

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}" if self.path else self.repo


def locate(row: Row, weights_root: str | None) -> Located:
    """The files of `row`: what is read together from the first place that has all of it, every other file
    from the first place that has it.

    Where no place has all that is read together, the one with the most of it counts alone: files of two
    downloads may be of two versions, and an index knows its shards only beside itself.

    Places, in this order: `weights_root/FOLDER`, `weights_root` itself, `FOLDER` in each of `USUAL_ROOTS`,
    these themselves, the hub's cache, ModelScope's; behind each the same files in another repository
    (`row.copies`). A root itself counts only if every file of the row lies directly in it, and not if it is
    named for another row: `config.json` alone says nothing about whose it is. A folder that a pull has filled
    from another repository counts nowhere.
    """
    together = files_together(row)
    files: dict[str, Path] = {}
    part: dict[str, Path] = {}
    place_of: dict[str, Path] = {}
    home = part_place = row.assets if row.source == "package" else _roots(weights_root)[0] / row.folder
    for place in _places(row, weights_root):
        absent = [names for names in row.files if names not in files]
        found = {names: path for names in absent if (path := found_in(place, row.accepted(names)))}
        here = {names: path for names, path in found.items() if names in together}
        if len(here) < len(together):
            found = {names: path for names, path in found.items() if names not in together}
            if len(here) > len(part):
                part, part_place = here, place
        files |= found
        place_of |= dict.fromkeys(found, place)
        if len(files) == len(row.files):
            break
    if files.keys().isdisjoint(together):
        files |= part
        place_of |= dict.fromkeys(part, part_place)
    missing = tuple(
        Wanted(names.replace("|", " or "), str(part_place if names in together else home), row.hub_id)
        for names in row.files
        if names not in files
    )
    in_order = {names: files[names] for names in row.files if names in files}
    places = set(place_of.values())
    return Located(row, places.pop() if len(places) == 1 else None, in_order, missing)


def files_together(row: Row) -> tuple[str, ...]:
    """The names in `row.files` that are of use only beside each other: all but encoders and folders."""
    return tuple(names for names in row.files if not encoder_part(names) and not names.endswith("/"))


def missing_files(row: Row, weights_root: str | None) -> tuple[Wanted, ...]:
    """The files of `row` and of the rows it needs that are not on this disk."""
    return tuple(wanted for each in with_needs(row) for wanted in locate(each, weights_root).missing)


def with_needs(row: Row) -> Iterator[Row]:
    """`row`, then the rows that it needs, and theirs."""
    yield row
    for name in row.needs:
        yield from with_needs(ROWS[name])


def _roots(weights_root: str | None) -> list[Path]:
    named = [expanded(weights_root)] if weights_root else []
    return [*named, *map(Path, USUAL_ROOTS)]


def _places(row: Row, weights_root: str | None) -> Iterator[Path]:
    """Folders that may hold files of `row`; the hub's are made out only when the others did not do."""
    if row.source == "package":
        yield row.assets
        return
    others = {each.folder for each in ROWS.values()} - {row.folder}
    own = {each.hub_id for each in ROWS.values() if each.folder == row.folder} | {row.hub_id, ""}
    for root in _roots(weights_root):
        if recorded_owner(root / row.folder) in own:
            yield root / row.folder
        free = recorded_owner(root) in own and root.name not in others
        if free and all(found_in(root, row.accepted(names)) for names in row.files):
            yield root
        for repo, inner in row.copies:
            if recorded_owner(root / folder_name(repo)) in ("", repo):
                yield root / folder_name(repo) / inner
    for repo, inner in ((row.hub_id, ""), *row.copies):
        if repo:
            yield from (folder / inner for folder in (*snapshots(repo), *_of_modelscope(repo)))


def found_in(folder: Path, names: str) -> Path | None:
    """The first of "a|b" that is in `folder`."""
    return next((folder / name for name in names.split("|") if _present(folder, name)), None)


def _present(folder: Path, name: str) -> bool:
    path = folder / name
    if name.endswith("/"):
        return path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir())
    return path.is_file()


def folder_name(repo: str) -> str:
    """The folder of a repository below a weights root.

    NAME for the repositories of the registry, as toolkits keep them; `ORG--NAME` for any other: two owners
    may choose one name, and the files of one must not pass for those of the other. No owner's name holds
    `--` (`read_hub_name`), so that these differ whenever the repositories do.
    """
    known = {row.hub_id for row in ROWS.values()}
    return repo.rpartition("/")[2] if repo in known else repo.replace("/", "--")


def read_record(path: Path) -> Mapping[str, Any]:
    """What an earlier pull wrote down; empty if there is nothing, or nothing that can be read."""
    try:
        return read_object(path, _LARGEST_RECORD)
    except (PathNotFound, UnusableWeights):
        return {}


def recorded_owner(folder: Path) -> str:
    """The repository that a pull has filled `folder` from; empty if nothing says so."""
    repository = read_record(folder / RECORD).get("repository")
    return repository if isinstance(repository, str) else ""


def hub_cache() -> Path:
    """The hub's cache on this machine (`HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`)."""
    return Path(hub_constants().HF_HUB_CACHE)


def hub_constants() -> Any:
    """What `huggingface_hub` makes of its environment variables, which it reads when it is first imported.

    Raises UsageError if it cannot.
    """
    try:
        from huggingface_hub import constants
    except ValueError as error:
        raise UsageError(f"a variable HF_... has a wrong value: {error}", where="environment") from error
    return constants


def snapshots(repo: str) -> Iterator[Path]:
    """Folders of the cached commits of a repository: what `main` was last seen as, then newest first.

    Older commits count too: rows share repositories, and fetching a file of one row moves `main`.
    """
    home = hub_cache() / f"models--{repo.replace('/', '--')}"
    folder = home / "snapshots"
    commits = [path for path in folder.iterdir() if path.is_dir()] if _is_folder(folder) else []
    reference = home / "refs" / "main"
    main = reference.read_text(encoding="utf-8", errors="replace").strip() if reference.is_file() else ""
    yield from sorted(commits, key=lambda path: (path.name == main, path.stat().st_mtime), reverse=True)


def _of_modelscope(repo: str) -> Iterator[Path]:
    """Folders of a repository in ModelScope's cache, which `MODELSCOPE_CACHE` may move, and in `models/` of
    the current folder, where DiffSynth-Studio puts them."""
    cache = os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope"
    home = Path(os.path.expanduser(cache))  # noqa: PTH111 unlike Path's no error where there is no home
    owner, _, name = repo.partition("/")
    for root in (Path("models"), home / "models", home, home / "hub" / "models", home / "hub"):
        for folder in (root / owner / name.replace(".", "___"), root / owner / name):
            if _is_folder(folder):
                yield folder


def _is_folder(path: Path) -> bool:
    """No, instead of an error, also in a home that is not ours to enter: root's, in a container."""
    return os.path.isdir(path)  # noqa: PTH112


def read_hub_name(text: str) -> HubName | None:
    """`org/name[/path]` taken apart; None if `text` cannot be such a name."""
    owner, _, rest = text.partition("/")
    name, _, path = rest.partition("/")
    repo = f"{owner}/{name}"
    if not _REPOSITORY.fullmatch(repo) or "--" in repo or ".." in repo or len(repo) > 200:
        return None
    if path and (not _OUTSIDE.isdisjoint(path.split("/")) or "\\" in path or not path.isprintable()):
        return None
    return HubName(repo, path)


def places_of(repo: str, weights_root: str | None) -> Iterator[Path]:
    """Folders that may hold files of a repository that is no row."""
    for root in _roots(weights_root):
        if recorded_owner(root / folder_name(repo)) in ("", repo):
            yield root / folder_name(repo)
    yield from snapshots(repo)
    yield from _of_modelscope(repo)


def locate_hub_name(name: HubName, weights_root: str | None) -> Path | None:
    """The file that `name` means, or the folder of a whole repository, where `models pull` puts it; None if
    it was never fetched. Of several folders it is the first that lacks no shard."""
    incomplete = None
    for place in places_of(name.repo, weights_root):
        if name.path:
            if (place / name.path).is_file():
                return place / name.path
        elif (lacks_shards := _lacks_shards(place)) is not None:
            if not lacks_shards:
                return place
            incomplete = incomplete or place
    return incomplete


def _lacks_shards(folder: Path) -> bool | None:
    """Whether weight files below `folder` are numbered and not all there; None if there are none at all."""
    files = [path for path in folder.rglob("*") if path.suffix in WEIGHT_SUFFIXES and path.is_file()]
    shards = Counter(
        (match["stem"], int(match["count"]), match["suffix"])
        for path in files
        if (match := _SHARD.fullmatch(str(path)))
    )
    return any(number < count for (_, count, _), number in shards.items()) if files else None
