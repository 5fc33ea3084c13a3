"""Where fetched files are kept: the hub's own cache, or `ROOT/FOLDER` as the hub's tool fills it.

Both are written so that `huggingface_hub` and its command line take the files for their own, and both say
what a file's digest should be without asking anybody: the cache names its blobs by it, a folder has
`.cache/huggingface/download/NAME.metadata` (commit, digest, time).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from avatarctl.atomic import (
    atomic_write_text,
    disk_errors,
    ensure_writable_folder,
    flush_file,
    flush_folder,
    remove_left_behind,
)
from avatarctl.errors import EnvironmentMissing, OutputRefused, WriteFailed
from avatarctl.files.named_path import expanded
from avatarctl.hub.client import DIGEST, HubFile, Listing, hub_errors, kept_bytes
from avatarctl.hub.locate import RECORD, folder_name, hub_cache, read_record, recorded_owner

__all__ = ["Store", "recorded_digest", "recorded_license"]

_LOCAL: Final = Path(".cache", "huggingface")


@dataclass(frozen=True)
class Store:
    """The place for fetched files. root: a folder of folders; None is the hub's cache."""

    root: Path | None

    @property
    def top(self) -> Path:
        """The folder whose disk fills."""
        return self.root or hub_cache()

    def home(self, repo: str) -> Path:
        """The folder of a repository."""
        if self.root is None:
            return hub_cache() / f"models--{repo.replace('/', '--')}"
        return self.root / folder_name(repo)

    def place(self, repo: str, commit: str) -> Path:
        """The folder of a repository's files at one commit."""
        return self.home(repo) / "snapshots" / commit if self.root is None else self.home(repo)

    def path(self, file: HubFile) -> Path:
        """The final name of a file."""
        return self.place(file.repo, file.commit) / file.name

    def kept(self, file: HubFile) -> int:
        """Bytes of `file` that need not be fetched."""
        whole = self._whole(file)
        return kept_bytes(whole if whole.is_file() else self._partial(file))

    def check_space(self, files: Mapping[HubFile, int]) -> None:
        """Raises WriteFailed unless the disk has room for these bytes."""
        needed = sum(files.values())
        existing = next(path for path in (self.top, *self.top.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise WriteFailed(
                f"{needed:,} bytes are needed and {free:,} are free",
                where=self.top,
                fix="free some space, or choose another place by --weights-root",
            )

    def check_owner(self, repo: str) -> None:
        """Raises OutputRefused if the folder of `repo` was filled from another repository."""
        owner = recorded_owner(self.home(repo)) if self.root is not None else ""
        if owner not in ("", repo):
            raise OutputRefused(
                f"holds files of {owner[:100]}, not of {repo}",
                where=self.home(repo),
                fix="move it away, or choose another place by --weights-root",
            )

    @contextlib.contextmanager
    def lend(self, file: HubFile) -> Iterator[Path | None]:
        """Lends the place of a partial file, alone; None if the file is whole already.

        Raises OutputRefused if the place cannot be written or another program fetches the same file,
        EnvironmentMissing if it is the hub's cache that cannot be written; WriteFailed if the disk is full
        meanwhile, and then the part is kept.
        """
        from huggingface_hub.utils import WeakFileLock

        partial = self._partial(file)
        lock = self._lock(file)
        with self._writable():
            ensure_writable_folder(partial.parent)
            ensure_writable_folder(lock.parent)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(WeakFileLock(lock, timeout=1))
            except TimeoutError as error:
                raise OutputRefused("another program is fetching this file", where=file) from error
            with self._writable(), disk_errors(partial, refusals=False):
                yield None if self._whole(file).is_file() else partial

    def keep(self, file: HubFile, partial: Path) -> None:
        """Gives a checked partial file its name among the blobs or in its folder."""
        target = self._whole(file)
        with self._writable(), disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            flush_file(partial)
            partial.replace(target)
            flush_folder(target.parent)

    def finish(self, file: HubFile) -> Path:
        """Makes a kept file findable; returns its final path. Not within `lend`: it takes the same lock.

        Raises WeightsMissing without a connection: the cache asks the hub once more before it links.
        """
        if self.root is not None:
            text = f"{file.commit}\n{file.digest}\n{time.time()}\n"
            atomic_write_text(self.home(file.repo) / _LOCAL / "download" / f"{file.name}.metadata", text)
            return self.path(file)
        from huggingface_hub import hf_hub_download

        with hub_errors(str(file)):
            path = Path(hf_hub_download(file.repo, file.name, revision=file.commit))
        reference = self.home(file.repo) / "refs" / "main"
        with self._writable(), disk_errors(reference):
            reference.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(reference, file.commit)
        return path

    def record(self, listing: Listing) -> None:
        """Writes down what was fetched, and under which licence."""
        record = {"repository": listing.repo, "commit": listing.commit, "license": listing.license}
        atomic_write_text(_record_path(self, listing.repo), json.dumps(record, indent=1) + "\n")

    def left_behind(self, files: Iterable[HubFile]) -> Iterator[str]:
        """Removes what dead pulls left hidden where something about these files is written, unfinished
        downloads excepted; yields a line for each."""
        homes = {self.home(file.repo) for file in files}
        notes = {home / below for home in homes for below in ("", "refs", _LOCAL)}
        for folder in sorted(notes | {self._partial(file).parent for file in files}):
            yield from remove_left_behind(folder)

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """Says what to do about a place that cannot be written."""
        try:
            yield
        except WriteFailed as error:
            error.fix = "free some space, or choose another place by --weights-root"
            raise
        except OutputRefused as error:
            error.fix = "choose another place by --weights-root"
            if self.root is not None:
                raise
            fix = f"set HF_HOME or HF_HUB_CACHE to a folder that can be written, or {error.fix}"
            raise EnvironmentMissing(error.what, where=error.where, fix=fix) from error

    def _whole(self, file: HubFile) -> Path:
        """Where the content goes: in the cache under its digest, and `path` becomes a link to it."""
        return self.home(file.repo) / "blobs" / file.digest if self.root is None else self.path(file)

    def _partial(self, file: HubFile) -> Path:
        home = self.home(file.repo)
        below = home / "blobs" if self.root is None else (home / _LOCAL / "download" / file.name).parent
        return below / f"{file.digest}.incomplete"

    def _lock(self, file: HubFile) -> Path:
        """In the cache the very file that the hub's client locks."""
        if self.root is None:
            return hub_cache() / ".locks" / self.home(file.repo).name / f"{file.digest}.lock"
        return self._partial(file).with_suffix(".lock")


def _record_path(store: Store, repo: str) -> Path:
    home = store.home(repo)
    return home / RECORD.name if store.root is None else home / RECORD


def recorded_license(repo: str, weights_root: str | None) -> str:
    """The licence that the hub's card stated when files of `repo` were fetched; empty if none was."""
    roots = [expanded(weights_root)] if weights_root else []
    for store in (*map(Store, roots), Store(None)):
        record = read_record(_record_path(store, repo))
        stated = record.get("license")
        if isinstance(stated, str) and record.get("repository") == repo:
            return stated[:200]
    return ""


def recorded_digest(place: Path, name: str) -> str:
    """The digest that the file `place/name` had when it was fetched; empty if nothing says so."""
    path = place / name
    if path.is_symlink() and path.is_relative_to(hub_cache()):
        target = path.readlink().name  # one step: a blob may itself be a link to a store of other names
        return target if DIGEST.fullmatch(target) else ""
    metadata = place / _LOCAL / "download" / f"{name}.metadata"
    if not metadata.is_file():
        return ""
    lines = metadata.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[1] if len(lines) >= 2 and DIGEST.fullmatch(lines[1]) else ""
