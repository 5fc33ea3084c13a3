"""What a configuration key is: its type, its range, its help, and what of it has no code yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["ANY", "Key", "KeySpec", "Mark", "Rule", "key"]

ANY: Final = "any"
"""`not_yet` of a key whose every value other than the default is still without code."""

Mark = str | tuple[Any, ...]
"""Valid values without code: `ANY`, or those values (of a mapping its keys)."""


@dataclass(frozen=True)
class Rule:
    """A condition on one value; `says` completes the sentence "expected …"."""

    says: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Key:
    """The part of a field that its annotation cannot say; it lives in the field's metadata.

    low, high: inclusive bounds of a number, or of each number of a list; `above` is exclusive.
    from_row:  None until the model row fills it.
    not_yet:   a `Mark` that counts in every command that reads the key, or marks by command; commands that
               are not named then take all values. Deleted when the code lands.
    split:     separator that makes a list of one text ("sync,lpips"); None where items may hold it.
    formerly:  an older name, which keeps working in files, in `-o` and as a flag.
    """

    help: str
    low: float | None = None
    above: float | None = None
    high: float | None = None
    rule: Rule | None = None
    from_row: bool = False
    not_yet: Mark | Mapping[str, Mark] = ()
    split: str | None = ","
    formerly: str = ""


@dataclass(frozen=True)
class KeySpec:
    """One key of one section, as readers, options and documents see it."""

    section: str
    name: str
    type: Any
    default: Any
    key: Key

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.name}"

    def not_yet(self, command: str) -> Mark:
        """The valid values that `command` has no code for."""
        mark = self.key.not_yet
        return mark.get(command, ()) if isinstance(mark, Mapping) else mark


def key(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its `Key`; takes the keyword arguments of `Key`."""
    info = {"key": Key(help, **metadata)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=info)
    return dataclasses.field(default=default, metadata=info)
