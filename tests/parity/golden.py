"""Folders of recorded numbers, and comparisons with them that account for every key they touch.

A format (the files that one published implementation was recorded into) is data: checks, which compare, and
two tables of keys that nothing compares yet or ever. Every key of every file must be claimed by a check or
stand in a table; a check that leaves a key it claims unread fails. Safetensors and JSON files are treated
alike: a JSON document is a flat mapping from dotted paths ("3.chunks.0.audio_start") to values.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

NOT_DATA = ("README.md", "subset.json")

Run = Callable[["Reader"], None]


@dataclass(frozen=True)
class Check:
    """One comparison. files: names of the files it applies to, one at a time; compares: patterns of the
    recorded results it compares; needs: patterns of the inputs it reads. `*` in a pattern crosses dots."""

    name: str
    files: tuple[str, ...]
    compares: tuple[str, ...]
    needs: tuple[str, ...]
    run: Run

    def claims(self, key: str) -> bool:
        return matches(key, self.compares + self.needs)


@dataclass(frozen=True)
class Listed:
    """A row of a table: keys that are not compared, and why. file and key are patterns."""

    file: str
    key: str
    reason: str

    def covers(self, file: str, key: str) -> bool:
        return fnmatchcase(file, self.file) and fnmatchcase(key, self.key)


@dataclass(frozen=True)
class Format:
    """waits_for: not compared yet; defects: behaviour of the reference that we do not reproduce; words: keys
    that only explain the recording to a reader."""

    name: str
    checks: tuple[Check, ...]
    waits_for: tuple[Listed, ...]
    defects: tuple[Listed, ...]
    words: tuple[Listed, ...] = ()

    @property
    def listed(self) -> tuple[Listed, ...]:
        return self.waits_for + self.defects + self.words

    def knows(self, file: str) -> bool:
        return any(file in check.files for check in self.checks) or any(
            fnmatchcase(file, entry.file) for entry in self.listed
        )


class Checks:
    """Collects the checks of a module: `@checks("file.safetensors", compares=..., needs=...)`."""

    def __init__(self) -> None:
        self._made: list[Check] = []

    def __call__(
        self, *files: str, compares: Iterable[str], needs: Iterable[str] = ()
    ) -> Callable[[Run], Run]:
        def register(run: Run) -> Run:
            self._made.append(Check(run.__name__, files, tuple(compares), tuple(needs), run))
            return run

        return register

    def __iter__(self) -> Iterator[Check]:
        return iter(self._made)


@dataclass(frozen=True, eq=False)
class Folder:
    """One folder of one format. label: how test ids name it. What was read of it stays: its files are read
    for every check, key by key."""

    path: Path
    label: str
    format: Format

    @functools.cached_property
    def files(self) -> tuple[str, ...]:
        """Everything in the folder but its documentation, unknown things included."""
        return tuple(sorted(item.name for item in self.path.iterdir() if item.name not in NOT_DATA))

    @functools.cached_property
    def left_out(self) -> dict[str, list[str]] | None:
        """Key patterns by file that a stated subset says it lacks ("*" for a whole file); None for a folder
        that states nothing and may lack anything."""
        path = self.path / "subset.json"
        return json.loads(path.read_text(encoding="utf-8"))["left_out"] if path.exists() else None

    def says_absent(self, file: str, pattern: str) -> bool:
        """Whether the folder may lack what `pattern` means in `file`."""
        if self.left_out is None:
            return True
        return matches(pattern, self.left_out.get(file, ()))

    def open(self, file: str) -> Reader:
        """A reader for a file. Skips the running test where the file is absent."""
        if file not in self.files:
            pytest.skip(f"{file} is not in {self.label}")
        return Reader(self, file)

    @functools.cache  # noqa: B019 folders live as long as the test session
    def document(self, file: str) -> Mapping[str, Any]:
        """A file as key -> value; tensors come lazily through `Reader.take`."""
        path = self.path / file
        if path.suffix == ".json":
            return dict(flatten(json.loads(path.read_text(encoding="utf-8"))))
        if path.suffix == ".safetensors":
            return dict.fromkeys(self.tensors(file).keys())
        return {}

    @functools.cache  # noqa: B019
    def tensors(self, file: str) -> Any:
        """A safetensors file, open; tensors are its own memory."""
        return safe_open(self.path / file, "pt")


@dataclass
class Reader:
    """One file, opened by one check; remembers what was read and what was compared."""

    folder: Folder
    file: str
    read: set[str] = field(default_factory=set)
    compared: set[str] = field(default_factory=set)

    @functools.cached_property
    def metadata(self) -> dict[str, str]:
        return self.folder.tensors(self.file).metadata() or {}

    def keys(self, pattern: str) -> list[str]:
        return [key for key in self.folder.document(self.file) if fnmatchcase(key, pattern)]

    def take(self, key: str) -> Any:
        """A tensor, or a value of a JSON document. Skips the running test where the file lacks it."""
        document = self.folder.document(self.file)
        if key not in document:
            skip_or_fail(self.folder, self.file, key, f"{self.file} has no {key}")
        self.read.add(key)
        if self.file.endswith(".json"):
            return document[key]
        return self.folder.tensors(self.file).get_tensor(key).clone()

    def group(self, prefix: str) -> dict[str, Any]:
        """All keys under a prefix, without it."""
        return {key.removeprefix(prefix): self.take(key) for key in self.keys(f"{prefix}*")}

    def compare(
        self,
        key: str,
        actual: Any,
        *,
        atol: float = 0.0,
        rtol: float = 0.0,
        relative_l2: float | None = None,
    ) -> None:
        """Fail unless `actual` is what the file holds: |difference| <= atol + rtol |recorded| everywhere, or
        the L2 norm of the difference at most relative_l2 of the recorded norm. Without tolerance: exactly.
        Numbers of a JSON document with a tolerance are compared as a tensor of float64."""
        expected = self.take(key)
        self.compared.add(key)
        where = f"{self.folder.label}/{self.file}: {key}"
        if not isinstance(expected, Tensor) and (atol or rtol or relative_l2):
            expected = torch.tensor(expected, dtype=torch.float64)
        if not isinstance(expected, Tensor):
            assert actual == expected, f"{where} is {actual!r}, recorded {expected!r}"
            return
        actual = torch.as_tensor(actual)
        assert actual.shape == expected.shape, f"{where}: {list(actual.shape)}, not {list(expected.shape)}"
        difference = (actual.detach().double() - expected.double()).abs()
        if relative_l2 is not None:
            error = float(difference.norm() / expected.double().norm())
            assert error <= relative_l2, f"{where}: relative L2 error {error:.3g} > {relative_l2:g}"
            return
        wrong = ~(difference <= atol + rtol * expected.double().abs())  # a NaN is wrong
        if wrong.any():
            raise AssertionError(
                f"{where}: {int(wrong.sum())} of {wrong.numel()} values differ, by up to "
                f"{float(difference.max()):.3g} (atol {atol:g}, rtol {rtol:g})"
            )


@dataclass(frozen=True)
class Comparison:
    """A check applied to one file of one folder, which may be absent."""

    folder: Folder
    check: Check
    file: str

    @property
    def id(self) -> str:
        return f"{self.folder.label}-{Path(self.file).stem}-{self.check.name}"

    def run(self) -> None:
        """Skips where file or keys are absent and may be; fails where a claimed key was not used."""
        folder, check = self.folder, self.check
        reader = folder.open(self.file)
        for pattern in check.compares + check.needs:
            if not reader.keys(pattern):
                skip_or_fail(folder, self.file, pattern, f"{self.file} has no {pattern}")
        check.run(reader)
        keys = reader.keys("*")
        unused = [key for key in keys if matches(key, check.compares) and key not in reader.compared]
        unused += [key for key in keys if matches(key, check.needs) and key not in reader.read]
        assert not unused, f"{check.name} claims keys of {self.file} but did not use {shown(unused)}"


def comparisons(folder: Folder) -> list[Comparison]:
    """Every check of the folder's format on every file it applies to."""
    return [Comparison(folder, check, file) for check in folder.format.checks for file in check.files]


def unaccounted(folder: Folder) -> list[str]:
    """What is in the folder and neither claimed by a check nor listed: one line each."""
    lines = []
    for file in folder.files:
        if not folder.format.knows(file):
            lines.append(f"{file}: no check reads it and no table lists it")
            continue
        claimed = [check for check in folder.format.checks if file in check.files]
        for key in folder.document(file):
            listed = [entry for entry in folder.format.listed if entry.covers(file, key)]
            checked = [check for check in claimed if check.claims(key)]
            if not checked and not listed:
                lines.append(f"{file}: {key}: no check reads it and no table lists it")
            if listed and any(matches(key, check.compares) for check in checked):
                lines.append(f"{file}: {key}: compared, and listed as not compared ({listed[0].reason})")
    return lines


def listed_here(folder: Folder, table: Iterable[Listed]) -> list[tuple[Listed, str, int]]:
    """Rows of a table that apply to the folder, with file and number of keys."""
    rows = []
    for entry in table:
        for file in folder.files:
            if count := sum(entry.covers(file, key) for key in folder.document(file)):
                rows.append((entry, file, count))
    return rows


def matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def skip_or_fail(folder: Folder, file: str, pattern: str, reason: str) -> None:
    """Absence is a skip with a reason, but in a stated subset it must be stated."""
    if folder.says_absent(file, pattern):
        pytest.skip(reason)
    pytest.fail(f"{reason}, and subset.json does not say so")


def shown(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a JSON document by dotted path; a list of plain values is one leaf."""
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        items = enumerate(value)
    else:
        yield path, value
        return
    for name, item in items:
        yield from flatten(item, f"{path}.{name}" if path else str(name))
