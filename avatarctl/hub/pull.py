"""`models pull`: what is lacking is listed, then fetched, checked and put where `locate` finds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from avatarctl.errors import WeightsMissing
from avatarctl.events import Emit, Notice
from avatarctl.files.named_path import expanded
from avatarctl.hub.client import HubFile, Listing, check_access, fetch, list_files
from avatarctl.hub.locate import (
    WEIGHT_SUFFIXES,
    HubName,
    Located,
    files_together,
    found_in,
    hub_cache,
    locate,
    locate_hub_name,
    places_of,
)
from avatarctl.hub.store import Store
from avatarctl.registry import Row

__all__ = ["ByHand", "PullPlan", "Wants", "plan_pull", "run_pull"]

_SAFE: Final = ".safetensors"
_BESIDE: Final = (".json", ".model", ".txt")


@dataclass(frozen=True)
class Wants:
    """Rows in the order in which they are needed, each once, and names on the hub that are no rows."""

    rows: tuple[Row, ...]
    hub_names: tuple[HubName, ...]

    def __add__(self, other: Wants) -> Wants:
        rows = {row.name: row for row in (*self.rows, *other.rows)}
        return Wants(tuple(rows.values()), tuple(dict.fromkeys((*self.hub_names, *other.hub_names))))


@dataclass(frozen=True)
class ByHand:
    """A file that cannot be fetched here: where it comes from, as far as known, and the folder it goes to."""

    row: str
    file: str
    source: str
    folder: str

    def __str__(self) -> str:
        return f"{self.folder}/{self.file} ({self.source})"


@dataclass(frozen=True)
class PullPlan:
    """What a pull would do.

    fetch:    files to fetch -> bytes still to come (0 where the hub states no size).
    present:  (row or hub name, path) of what is on this disk already.
    by_hand:  what somebody has to fetch.
    listings: what the hub said about each repository that files are fetched from.
    """

    store: Store
    fetch: Mapping[HubFile, int]
    present: tuple[tuple[str, Path], ...]
    by_hand: tuple[ByHand, ...]
    listings: Mapping[str, Listing]

    @property
    def total_bytes(self) -> int:
        return sum(self.fetch.values())


def plan_pull(wants: Wants, weights_root: str | None, emit: Emit) -> PullPlan:
    """Compares what is wanted with this disk and asks the hub for the rest: names, sizes, licences, access.

    Raises what `list_files`, `check_access` and `Store.check_owner` raise.
    """
    root = expanded(weights_root) if weights_root else None
    planner = _Planner(Store(root), weights_root, emit)
    for row in wants.rows:
        planner.add_row(row)
    for name in wants.hub_names:
        planner.add_name(name)
    return planner.plan()


class _Planner:
    """Gathers the plan; asks the hub once per repository."""

    def __init__(self, store: Store, weights_root: str | None, emit: Emit) -> None:
        self._store = store
        self._weights_root = weights_root
        self._emit = emit
        self._listings: dict[str, Listing] = {}
        self._fetch: dict[HubFile, int] = {}
        self._present: list[tuple[str, Path]] = []
        self._by_hand: list[ByHand] = []

    def add_row(self, row: Row) -> None:
        located = locate(row, self._weights_root)
        lacking = [names for names in row.files if names not in located.files]
        together = files_together(row) if row.hub_id else ()
        if set(lacking).isdisjoint(together):
            together = ()
        for names, path in located.files.items():
            if names in together:
                continue
            if names.endswith("/") and row.hub_id:
                self._add_folder(row, names, path, alone=not located.missing)
            else:
                self._present.append((row.name, path))
        if together:
            self._add_together(located, together)
        for wanted, names in zip(located.missing, lacking, strict=True):
            if names in together:
                continue
            if row.hub_id:
                self._add_files(self._listing(row.hub_id).select(names))
            else:
                source = row.obtained or "no source is confirmed"
                self._by_hand.append(ByHand(row.name, wanted.file, source, wanted.folder))

    def _add_together(self, located: Located, together: tuple[str, ...]) -> None:
        """Files that are of use only in one folder: they are completed in the one that a pull fills."""
        row = located.row
        listing = self._listing(row.hub_id)
        target = self._store.place(listing.repo, listing.commit)
        for names in together:
            path = found_in(target, row.accepted(names))
            if path is not None:
                self._present.append((row.name, path))
            else:
                self._add_files(listing.select(names))
        others = {path.parent for names, path in located.files.items() if names in together} - {target}
        for other in others:
            if not other.is_relative_to(hub_cache()):  # which nobody completes but its client
                hint = f"; --weights-root {other.parent} completes them there" * (other.name == row.folder)
                self._emit(Notice(f"{other} has a part of {row.name}, which is read from one folder{hint}"))

    def _add_folder(self, row: Row, name: str, path: Path, *, alone: bool) -> None:
        """A folder that exists may lack files: an earlier pull may have been stopped in the middle of it."""
        try:
            files = self._listing(row.hub_id).select(name)
        except WeightsMissing as error:
            if not alone:
                raise
            self._emit(Notice(f"{path}: whether it is complete is not known: {error.what}", "warning"))
            self._present.append((row.name, path))
            return
        absent = [file for file in files if not (path / file.name.removeprefix(name)).is_file()]
        if not absent:
            self._present.append((row.name, path))
        elif self._store.root is not None or path.is_relative_to(hub_cache()):
            self._add_files(file for file in files if not self._store.path(file).is_file())
        else:  # found before anything that a pull could put elsewhere
            lacking = ", ".join(file.name.removeprefix(name) for file in absent)
            self._by_hand.append(ByHand(row.name, lacking, f"incomplete, from {row.hub_id}", str(path)))

    def add_name(self, name: HubName) -> None:
        path = locate_hub_name(name, self._weights_root)
        if path is not None and name.path:
            self._present.append((str(name), path))
            return
        listing = self._listing(name.repo)
        files = _of_repository(listing) if not name.path else listing.select(name.path)
        places = places_of(name.repo, self._weights_root)
        whole = (place for place in places if all((place / file.name).is_file() for file in files))
        target = next(whole, self._store.place(listing.repo, listing.commit))
        for file in files:
            if (target / file.name).is_file():
                self._present.append((str(file), target / file.name))
            else:
                self._add_files([file])

    def _listing(self, repo: str) -> Listing:
        if repo not in self._listings:
            self._store.check_owner(repo)
            self._listings[repo] = list_files(repo)
        return self._listings[repo]

    def _add_files(self, files: Iterator[HubFile] | list[HubFile]) -> None:
        for file in files:
            self._fetch[file] = max(0, (file.size or 0) - self._store.kept(file))

    def plan(self) -> PullPlan:
        used = {file.repo: file for file in reversed(self._fetch)}
        for repo, first in used.items():
            if self._listings[repo].gated:
                check_access(first)
        listings = {repo: self._listings[repo] for repo in used}
        return PullPlan(
            self._store, self._fetch, tuple(dict.fromkeys(self._present)), tuple(self._by_hand), listings
        )


def _of_repository(listing: Listing) -> list[HubFile]:
    """Of a whole repository: weights, and the small files that say what they are. Pickles only where there
    are no safetensors."""
    safe = any(name.endswith(_SAFE) for name in listing.files)
    endings = (*((_SAFE,) if safe else WEIGHT_SUFFIXES), *_BESIDE)
    found = [file for name, file in listing.files.items() if name.endswith(endings)]
    if not any(file.name.endswith(WEIGHT_SUFFIXES) for file in found):
        raise WeightsMissing("the repository has no weight files", where=listing.repo)
    return found


def run_pull(plan: PullPlan, emit: Emit, should_stop: Callable[[], bool]) -> dict[HubFile, Path]:
    """Fetches what `plan` lists, file after file; each is checked before it gets its name.

    Returns the path of each. Raises what `Store.check_space`, `Store.lend` and `fetch` raise; the files
    before stay, and so does the part of the file that was being fetched.
    """
    plan.store.check_space(plan.fetch)
    paths = {}
    unrecorded = dict(plan.listings)
    for line in plan.store.left_behind(plan.fetch):
        emit(Notice(line))
    for file in plan.fetch:
        with plan.store.lend(file) as partial:
            if partial is not None:
                fetch(file, partial, emit, should_stop)
                plan.store.keep(file, partial)
        paths[file] = plan.store.finish(file)
        emit(Notice(f"fetched {file}"))
        if file.repo in unrecorded:
            plan.store.record(unrecorded.pop(file.repo))
    return paths
