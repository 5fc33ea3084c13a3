"""YAML text to a small tree of texts with line numbers; nothing is interpreted, nothing constructed.

Built from the event stream, so that an alias, an anchor or a tag is refused where it stands, before it
can expand, and nesting is bounded without recursion into the library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from avatarctl.errors import ConfigError, PathNotFound

__all__ = ["Mapping", "Node", "Scalar", "Sequence", "read_tree"]

LARGEST_FILE = 1 << 20
DEEPEST = 5
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Scalar:
    """The text of a scalar; `quoted` unless it stands plain."""

    line: int
    text: str
    quoted: bool

    @property
    def missing(self) -> bool:
        """Nothing was written, or YAML's word for nothing."""
        return not self.quoted and self.text in {"", "~", "null", "Null", "NULL"}


@dataclass(frozen=True)
class Sequence:
    line: int
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Mapping:
    line: int
    entries: dict[str, tuple[int, Node]]


Node = Scalar | Sequence | Mapping


def read_tree(path: Path) -> Mapping:
    """The root mapping of a YAML file of at most 1 MiB.

    Accepts UTF-8 with or without byte order mark, and UTF-16 with one. Raises PathNotFound; ConfigError
    with file and line for anything that is not one plain document of keys and values.
    """
    text = _decoded(path, _bytes_of(path))
    bad = _FORBIDDEN.search(text)
    if bad:
        line = text.count("\n", 0, bad.start()) + 1
        raise ConfigError(f"control character {bad.group()!r} in YAML text", where=f"{path}:{line}")
    try:
        return _Builder(path, yaml.parse(text, Loader=yaml.SafeLoader)).document()
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, text, error) from error
    except (ValueError, OverflowError) as error:  # the library's own slips, such as "\\UFFFFFFFF"
        raise ConfigError(f"not valid YAML: {error}", where=path) from error


def _bytes_of(path: Path) -> bytes:
    if not path.exists():
        raise PathNotFound("no such configuration file", where=path)
    if not path.is_file():
        raise ConfigError("not a regular file", where=path)
    try:
        with path.open("rb") as handle:
            content = handle.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=path) from error
    if len(content) > LARGEST_FILE:
        raise ConfigError("larger than 1 MiB: not a configuration", where=path)
    return content


def _decoded(path: Path, content: bytes) -> str:
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        name = "UTF-16" if encoding == "utf-16" else "UTF-8"
        raise ConfigError(
            f"not {name} text: byte 0x{content[error.start]:02x} cannot be decoded",
            where=f"{path}:{line}",
            fix="save the file as UTF-8",
        ) from error


def _syntax_error(path: Path, text: str, error: yaml.MarkedYAMLError) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    indent = re.match(r"\s*", lines[line - 1]) if line <= len(lines) else None
    if indent and "\t" in indent.group():
        return ConfigError("a tab in the indentation is not YAML", where=f"{path}:{line}", fix="use spaces")
    problem = error.problem or error.context or "cannot be parsed"
    return ConfigError(f"not valid YAML: {problem}", where=f"{path}:{line}")


class _Builder:
    """Walks the events of one document."""

    def __init__(self, path: Path, events: Iterator[yaml.Event]) -> None:
        self._path = path
        self._events = events

    def document(self) -> Mapping:
        root: Node | None = None
        for event in self._events:
            if isinstance(event, (yaml.StreamStartEvent, yaml.DocumentEndEvent, yaml.StreamEndEvent)):
                continue
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise self._error(event, "a second YAML document begins here; only a single one is read")
                root = self._node(next(self._events), depth=0)
        if root is None or (isinstance(root, Scalar) and root.missing):
            raise ConfigError(
                "the file is empty; expected sections as a mapping",
                where=self._path,
                fix="leave out --config",
            )
        if not isinstance(root, Mapping):
            kind = "list" if isinstance(root, Sequence) else "string"
            raise ConfigError(
                f"the root is a {kind}; expected sections as a mapping", where=f"{self._path}:{root.line}"
            )
        return root

    def _node(self, event: yaml.Event, depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            raise self._error(
                event, f"YAML alias *{str(event.anchor)[:60]} is not allowed; write the value itself"
            )
        if not isinstance(event, yaml.NodeEvent):
            raise self._error(event, "expected a value")
        if event.anchor is not None:
            raise self._error(
                event,
                f"YAML anchor &{event.anchor[:60]} is not allowed; instead of an alias write the value",
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise self._error(event, f"YAML tag {tag[:60]} is not allowed; values are typed by their key")
        if depth > DEEPEST:
            raise self._error(event, "nested too deeply; a configuration has sections and keys")
        line = self._line(event)
        if isinstance(event, yaml.ScalarEvent):
            return Scalar(line, event.value, quoted=event.style is not None)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
                items.append(self._node(event, depth + 1))
            return Sequence(line, tuple(items))
        return self._mapping(line, depth)

    def _mapping(self, line: int, depth: int) -> Mapping:
        entries: dict[str, tuple[int, Node]] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            name = self._node(event, depth + 1)
            if not isinstance(name, Scalar):
                raise self._error(event, "a key must be a word, not a list or a mapping")
            if name.text in entries:
                first = entries[name.text][0]
                raise self._error(
                    event, f"duplicate key {name.text[:100]!r}; it stands in line {first} already"
                )
            entries[name.text] = (name.line, self._node(next(self._events), depth + 1))
        return Mapping(line, entries)

    def _line(self, event: yaml.Event) -> int:
        return event.start_mark.line + 1 if event.start_mark else 1

    def _error(self, event: yaml.Event, what: str) -> ConfigError:
        return ConfigError(what, where=f"{self._path}:{self._line(event)}")
