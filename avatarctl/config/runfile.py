"""The run file: YAML that names the command, what was asked, what was decided, and every resolved value."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from avatarctl.config.checks import value_of
from avatarctl.config.resolve import Resolved
from avatarctl.config.sections import keys

__all__ = ["dump_run"]

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.+/-]*", re.ASCII)


def dump_run(resolved: Resolved, command: str, decided: Mapping[str, Any] | None = None) -> str:
    """The text of a run file; `--config` of it repeats the run.

    decided: what the machine chose for a key that leaves it the choice; read again, the key is still open.

    Floats and texts come back exactly, in this reader and in any other YAML reader.
    """
    asked = {dotted: setting.value for dotted, setting in resolved.asked.items()}
    values = {dotted: value_of(resolved.cfg, dotted) for dotted in keys()}
    lines = [f"command: {_text(command)}"]
    if asked:
        lines += ["asked:", *(f"  {line}" for line in _sections(asked))]
    else:
        lines.append("asked: {}")
    if decided:
        lines += ["decided:", *(f"  {line}" for line in _sections(decided))]
    present = {dotted: value for dotted, value in values.items() if value is not None and value != {}}
    return "\n".join([*lines, *_sections(present)]) + "\n"


def _sections(values: Mapping[str, Any]) -> Iterator[str]:
    current = None
    for dotted in keys():
        if dotted not in values:
            continue
        section, _, name = dotted.partition(".")
        if section != current:
            yield f"{section}:"
            current = section
        value = values[dotted]
        if isinstance(value, Mapping):
            yield f"  {name}: {{{_joined(f'{_text(part)}: {_text(path)}' for part, path in value.items())}}}"
        elif isinstance(value, tuple):
            yield f"  {name}: [{_joined(map(_scalar, value))}]"
        else:
            yield f"  {name}: {_scalar(value)}"


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # YAML 1.1 takes 1e-05 for a string; 1.0e-05 is a number to everyone.
        mantissa, e, exponent = repr(value).partition("e")
        return mantissa + (".0" if e and "." not in mantissa else "") + e + exponent
    return str(value) if isinstance(value, int) else _text(value)


def _text(text: str) -> str:
    """`text` plain where every YAML reader sees a string, else in double quotes."""
    if _WORD.fullmatch(text) and not _other_type(text):
        return text
    return '"' + "".join(_escaped(char) for char in text) + '"'


def _other_type(word: str) -> bool:
    """Whether YAML 1.1 reads the plain word as a boolean, null, number or date."""
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers.get(word[0], [])
    return any(pattern.match(word) for _, pattern in resolvers) or word in {"y", "Y", "n", "N"}


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char.isprintable():
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65_536 else f"\\U{code:08x}"
