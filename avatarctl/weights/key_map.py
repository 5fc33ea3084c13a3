"""Renaming of state-dict keys between two layouts, as one reversible table.

A rule is a pair of templates; `{n}` stands for a number, `{rest}` for whatever follows, and both must
appear on both sides. A key is renamed by the first rule that matches it whole. Because the same table is
read in both directions, a key map is a bijection by construction, and a key that no rule knows is
reported, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

__all__ = ["KeyMap"]

Value = TypeVar("Value")
_FIELDS = {"n": r"\d+", "rest": r".+"}
_FIELD = re.compile(r"\{(\w+)\}")


def _pattern(template: str) -> re.Pattern[str]:
    parts = _FIELD.split(template)  # literal, field, literal, field, ...
    source = "".join(
        f"(?P<{part}>{_FIELDS[part]})" if index % 2 else re.escape(part) for index, part in enumerate(parts)
    )
    return re.compile(source)


@dataclass(frozen=True)
class KeyMap:
    """rules: (original template, internal template) pairs, first match wins."""

    rules: tuple[tuple[str, str], ...]

    def __add__(self, other: KeyMap) -> KeyMap:
        return KeyMap(self.rules + other.rules)

    @cached_property
    def _inward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(original), internal) for original, internal in self.rules]

    @cached_property
    def _outward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(internal), original) for original, internal in self.rules]

    def to_internal(self, key: str) -> str | None:
        """The internal name of an original key, None where no rule knows it."""
        return _rename(key, self._inward)

    def to_original(self, key: str) -> str | None:
        """The original name of an internal key, None where no rule knows it."""
        return _rename(key, self._outward)

    def rename_to_internal(self, state: Mapping[str, Value]) -> dict[str, Value]:
        """A state dict under internal names. Raises KeyError with the first unknown keys."""
        return _rename_all(state, self.to_internal)

    def rename_to_original(self, state: Mapping[str, Value]) -> dict[str, Value]:
        """A state dict under original names. Raises KeyError with the first unknown keys."""
        return _rename_all(state, self.to_original)


def _rename(key: str, table: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in table:
        if match := pattern.fullmatch(key):
            return template.format(**match.groupdict())
    return None


def _rename_all(state: Mapping[str, Value], rename) -> dict[str, Value]:  # type: ignore[no-untyped-def]
    renamed: dict[str, Value] = {}
    unknown = []
    for key, value in state.items():
        if (name := rename(key)) is None:
            unknown.append(key)
        else:
            renamed[name] = value
    if unknown:
        shown = ", ".join(sorted(unknown)[:5])
        raise KeyError(f"{len(unknown)} keys have no place, first: {shown}")
    return renamed
