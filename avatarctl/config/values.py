"""From the text of a scalar to the typed value of a key.

YAML 1.1 would make False of `off`, 21 of `025` and a string of `1e-4`; here the key's own type decides
what its text means, whether it stands in a file or on the command line.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from avatarctl.config.keys import KeySpec

__all__ = [
    "BadValue",
    "check_value",
    "expected",
    "kind_of",
    "parse_items",
    "parse_mapping",
    "parse_scalar",
    "shown",
]

_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_LONGEST_NUMBER = 400
_LONGEST_SHOWN = 60


class BadValue(ValueError):
    """The text or value does not fit the key; the message is "expected …, got …".

    An answer to the caller, who raises ConfigError with the place.
    """


def kind_of(annotation: Any) -> Any:
    """`annotation` without its `| None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        (inner,) = (arg for arg in get_args(annotation) if arg is not type(None))
        return inner
    return annotation


def shown(value: object) -> str:
    """`value` for a message: quoted if it is text, and not longer than a line bears."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 4]}...{text[-1]}"


def expected(spec: KeySpec) -> str:
    """What the key takes, as the end of the sentence "expected …"."""
    kind = kind_of(spec.type)
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        many = "a list, each item" if inner[-1] is Ellipsis else f"{len(inner)} values, each"
        text = f"{many} {_one(inner[0], spec)}"
        return f"{text}, {spec.key.rule.says}" if spec.key.rule else text
    return _one(kind, spec)


def _one(kind: Any, spec: KeySpec) -> str:
    rule = spec.key.rule if get_origin(kind_of(spec.type)) is not tuple else None
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        noun = "an integer" if kind is int else "a finite number"
        return " ".join(filter(None, (noun, _range(spec), rule.says if rule else "")))
    return rule.says if rule else "text"


def _range(spec: KeySpec) -> str:
    low, above, high = spec.key.low, spec.key.above, spec.key.high
    head = f"above {_plain(above)}" if above is not None else f"from {_plain(low)}" if low is not None else ""
    if high is None:
        return head
    if above is not None:
        return f"{head} and at most {_plain(high)}"
    return f"{head} to {_plain(high)}" if head else f"up to {_plain(high)}"


def _plain(number: float | None) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def parse_scalar(spec: KeySpec, text: str, *, quoted: bool = False) -> Any:
    """The value of a key from one scalar's text; lists are split at the key's separator.

    quoted: the scalar stood in quotes, so it is text and never a number or a switch.
    Raises BadValue.
    """
    kind = kind_of(spec.type)
    if get_origin(kind) is tuple:
        split = spec.key.split
        parts = text.split(split) if split and not quoted else [text]
        return parse_items(spec, [(part.strip() if split else part, quoted) for part in parts])
    if _is_mapping(kind):
        part, equals, path = text.partition("=")
        if not equals:
            raise BadValue(f"expected part=path, got {shown(text)}")
        return parse_mapping(spec, [(part, path)])
    value = _read(kind, spec, text, quoted)
    return check_value(spec, value)


def parse_items(spec: KeySpec, items: Sequence[tuple[str, bool]]) -> tuple[Any, ...]:
    """The value of a list key from its items' (text, quoted). Raises BadValue."""
    kind = kind_of(spec.type)
    if get_origin(kind) is not tuple:
        raise BadValue(f"expected {expected(spec)}, got a list")
    inner = get_args(kind)
    if inner[-1] is not Ellipsis and len(inner) != len(items):
        raise BadValue(f"expected {expected(spec)}, got {len(items)}")
    value: tuple[Any, ...] = check_value(
        spec, tuple(_read(inner[0], spec, text, quoted) for text, quoted in items)
    )
    return value


def parse_mapping(spec: KeySpec, pairs: Iterable[tuple[str, str]]) -> Mapping[str, str]:
    """The value of a key that maps names to texts. Raises BadValue."""
    if not _is_mapping(kind_of(spec.type)):
        raise BadValue(f"expected {expected(spec)}, got keys and values")
    value: Mapping[str, str] = check_value(spec, dict(pairs))
    return value


def _is_mapping(kind: Any) -> bool:
    return (
        get_origin(kind) is not None
        and isinstance(get_origin(kind), type)
        and issubclass(get_origin(kind), Mapping)
    )


def _read(kind: Any, spec: KeySpec, text: str, quoted: bool) -> Any:
    """One scalar of type `kind`; ranges are checked later, on the whole value."""
    if kind is str:
        return text
    wrong = BadValue(f"expected {expected(spec)}, got {shown(text)}")
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if text == str(choice) and (isinstance(choice, str) or not quoted):
                return choice
        raise wrong
    if quoted or len(text) > _LONGEST_NUMBER:
        raise wrong
    if kind is bool:
        if text not in {"true", "false"}:
            raise wrong
        return text == "true"
    if not (_INTEGER if kind is int else _NUMBER).fullmatch(text):
        raise wrong
    return kind(text)


def check_value(spec: KeySpec, value: Any) -> Any:
    """`value` if it has the key's type and range. Raises BadValue."""
    kind = kind_of(spec.type)
    wrong = BadValue(f"expected {expected(spec)}, got {shown(value)}")
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            raise wrong
        item, last = get_args(kind)[0], get_args(kind)[-1]
        if last is not Ellipsis and len(value) != len(get_args(kind)):
            raise wrong
        value = tuple(_typed(item, part, wrong) for part in value)
        if len(set(value)) != len(value) and get_origin(item) is Literal:
            raise BadValue(f"names an item twice: {shown(value)}")
        parts: tuple[Any, ...] = value
    elif _is_mapping(kind):
        if not isinstance(value, Mapping) or not all(
            isinstance(x, str) for pair in value.items() for x in pair
        ):
            raise wrong
        parts = ()
    else:
        value = _typed(kind, value, wrong)
        parts = (value,)
    if any(isinstance(part, (int, float)) and not _in_range(spec, part) for part in parts):
        raise wrong
    if spec.key.rule and not spec.key.rule.holds(value):
        raise wrong
    return value


def _typed(kind: Any, value: Any, wrong: BadValue) -> Any:
    if get_origin(kind) is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
            raise wrong
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise wrong
    return value


def _in_range(spec: KeySpec, number: float) -> bool:
    low, above, high = spec.key.low, spec.key.above, spec.key.high
    return (
        math.isfinite(number)
        and (low is None or number >= low)
        and (above is None or number > above)
        and (high is None or number <= high)
    )
