"""Configuration files and `section.key=value` texts to typed settings with their origin."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avatarctl.config.keys import KeySpec
from avatarctl.config.sections import section_names, spec_named
from avatarctl.config.suggest import unknown_key, unknown_section
from avatarctl.config.tree import Mapping, Node, Scalar, read_tree
from avatarctl.config.values import BadValue, parse_items, parse_mapping, parse_scalar
from avatarctl.errors import ConfigError

__all__ = ["ConfigFile", "Setting", "read_assignment", "read_config", "read_text"]


@dataclass(frozen=True)
class Setting:
    """A value and where it comes from: "job.yaml:5", "--steps", "model row cartoon-i2v"."""

    value: Any
    origin: str


@dataclass(frozen=True)
class ConfigFile:
    """What a configuration or run file sets, by dotted key.

    command: the command that the file belongs to, if it says so.
    asked:   the keys that a person asked for; in a plain configuration file all of them, in a run
             file those of its `asked:` section.
    """

    path: str
    command: str | None
    settings: MappingOf[str, Setting]
    asked: frozenset[str]


def read_config(path: Path, *, command: str | None = None) -> ConfigFile:
    """Read and check a file; nothing in it is executed and no key is ignored.

    command: the command that wants to use it; a file that belongs to another one is refused.
    Raises PathNotFound, and ConfigError naming file, line, key and what was expected.
    """
    root = read_tree(path)
    own_command = _command(path, root)
    if command and own_command and own_command != command:
        raise ConfigError(
            f"this file belongs to `avatarctl {own_command}`, not to `avatarctl {command}`",
            where=path,
            fix=f"run `avatarctl {own_command} --config {path}`, or remove its `command:` line",
        )
    settings = dict(_settings(path, root, reserved=("command", "asked", "decided")))
    if "decided" in root.entries:  # for people: a repeated run decides anew, perhaps on another machine
        line, node = root.entries["decided"]
        if not isinstance(node, Mapping):
            raise ConfigError("decided: expected sections as a mapping", where=f"{path}:{line}")
        dict(_settings(path, node))
    if "asked" not in root.entries:
        return ConfigFile(str(path), own_command, settings, frozenset(settings))
    line, node = root.entries["asked"]
    if not isinstance(node, Mapping):
        raise ConfigError("asked: expected sections as a mapping", where=f"{path}:{line}")
    asked = dict(_settings(path, node))
    for name, setting in asked.items():
        if settings.setdefault(name, setting).value != setting.value:
            raise ConfigError(
                f"{name} is given another value in line {settings[name].origin.rpartition(':')[2]}",
                where=setting.origin,
                fix="change both, or remove the line under asked:",
            )
    return ConfigFile(str(path), own_command, settings, frozenset(asked))


def read_assignment(text: str, origin: str) -> tuple[str, Setting]:
    """`section.key=value` from the command line; `model.weights.dit=PATH` sets one part."""
    dotted, equals, value = text.partition("=")
    section, dot, name = dotted.strip().partition(".")
    if not equals or not dot:
        raise ConfigError(f"expected section.key=value, got {text[:100]!r}", where=origin)
    if section not in section_names():
        what, fix = unknown_section(section)
        raise ConfigError(what, where=origin, fix=fix)
    name, sub, part = name.partition(".")
    spec = spec_named(section, name)
    if spec is None or (sub and not isinstance(spec.default, dict)):
        what, fix = unknown_key(section, name + sub + part)
        raise ConfigError(what, where=origin, fix=fix)
    return spec.dotted, read_text(spec, f"{part}={value}" if sub else value, origin)


def read_text(spec: KeySpec, text: str, origin: str) -> Setting:
    """The setting that an option's text makes for a key. Raises ConfigError."""
    try:
        return Setting(parse_scalar(spec, text), origin)
    except BadValue as error:
        raise ConfigError(f"{spec.dotted}: {error}", where=origin) from error


def _command(path: Path, root: Mapping) -> str | None:
    if "command" not in root.entries:
        return None
    line, node = root.entries["command"]
    if not isinstance(node, Scalar) or node.missing:
        raise ConfigError("command: expected the name of a command", where=f"{path}:{line}")
    return node.text


def _settings(path: Path, root: Mapping, reserved: tuple[str, ...] = ()) -> Iterator[tuple[str, Setting]]:
    for section, (line, node) in root.entries.items():
        if section in reserved:
            continue
        if section not in section_names():
            what, fix = unknown_section(section)
            raise ConfigError(what, where=f"{path}:{line}", fix=fix)
        if isinstance(node, Scalar) and node.missing:
            raise ConfigError(
                f"section {section} has no keys",
                where=f"{path}:{line}",
                fix="remove the line to keep the defaults",
            )
        if not isinstance(node, Mapping):
            raise ConfigError(f"section {section}: expected keys and values", where=f"{path}:{line}")
        for name, (key_line, value) in node.entries.items():
            spec = spec_named(section, name)
            where = f"{path}:{key_line}"
            if spec is None:
                what, fix = unknown_key(section, name)
                raise ConfigError(what, where=where, fix=fix)
            if spec.name != name and spec.name in node.entries:
                raise ConfigError(f"{section}.{name} is {spec.dotted}, which is set too", where=where)
            yield spec.dotted, Setting(_value(path, spec, value, where), where)


def _value(path: Path, spec: KeySpec, node: Node, where: str) -> Any:
    try:
        if isinstance(node, Scalar):
            return parse_scalar(spec, _present(spec.dotted, node, where).text, quoted=node.quoted)
        if isinstance(node, Mapping):
            texts = _texts(spec, [part for _, part in node.entries.values()], path)
            return parse_mapping(spec, zip(node.entries, (text for text, _ in texts), strict=True))
        return parse_items(spec, _texts(spec, node.items, path))
    except BadValue as error:
        raise ConfigError(f"{spec.dotted}: {error}", where=where) from error


def _texts(spec: KeySpec, nodes: Any, path: Path) -> list[tuple[str, bool]]:
    """(text, quoted) of each scalar; lists and mappings inside a value are refused."""
    texts = []
    for node in nodes:
        where = f"{path}:{node.line}"
        if not isinstance(node, Scalar):
            raise ConfigError(
                f"{spec.dotted}: a value inside it is nested; expected plain values", where=where
            )
        texts.append((_present(spec.dotted, node, where).text, node.quoted))
    return texts


def _present(name: str, node: Scalar, where: str) -> Scalar:
    if node.missing:
        raise ConfigError(f"{name} has no value", where=where, fix="remove the line to keep the default")
    return node
