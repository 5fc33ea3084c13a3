"""JSON that strangers wrote: an object without duplicate keys, of bounded size, or one clear error.

Two programs that read `{"a": 1, "a": 2}` differently would see two different models, so it is refused; so are
numbers that no float or 64-bit integer holds, and half surrogates, which no file of text can hold.
"""

from __future__ import annotations

import contextlib
import json
import math
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from avatarctl.errors import PathNotFound, UnusableWeights

__all__ = ["clip", "file_size", "listed", "parse_json", "parse_object", "read_object", "reading"]


def clip(text: object, length: int = 100) -> str:
    """A stranger's text, short enough for one line."""
    line = str(text)
    return line if len(line) <= length else f"{line[: length - 3]}..."


def listed(names: Sequence[str], length: int = 100, most: int = 5) -> str:
    """The first `most` of some names, each clipped to `length`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(clip(name, length) for name in names[:most]) + more


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises UnusableWeights for what the system says while `path` is read; one that names no file yet is
    told of this one."""
    try:
        yield
    except OSError as error:
        raise UnusableWeights(f"cannot be read: {error.strerror}", where=path) from error
    except UnusableWeights as error:
        error.where = error.where or path
        raise


def file_size(path: Path) -> int:
    """Bytes of a regular file (or of what a link points at), found without opening it.

    Raises PathNotFound where there is none, UnusableWeights for folders, devices and pipes.
    """
    with reading(path):
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PathNotFound("does not exist", where=path) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
        raise UnusableWeights(f"is {kind}, not a file", where=path)
    return status.st_size


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises PathNotFound where there is nothing, UnusableWeights for everything else, a dangling link included.
    """
    try:
        size = file_size(path)
    except PathNotFound as error:
        if not path.is_symlink():
            raise
        raise UnusableWeights(
            "is a link to a file that does not exist", where=path, fix="remove it, or fetch the file again"
        ) from error
    if size > limit:
        raise UnusableWeights(f"holds {size} bytes, which is too large for a JSON file here", where=path)
    with reading(path), path.open("rb") as file:
        data = file.read(limit + 1)
    return parse_object(data, path, f"{path.name} is")


def parse_object(data: bytes | str, where: Path | None, subject: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises UnusableWeights as `parse_json`, and for something else."""
    value = parse_json(data, where, subject)
    if not isinstance(value, dict):
        raise UnusableWeights(f"{subject} invalid: a JSON object is expected", where=where)
    return value


def parse_json(data: bytes | str, where: Path | None, subject: str) -> Any:
    """The JSON value in `data`; `subject` starts the error: "the header is" not valid JSON.

    Raises UnusableWeights: not UTF-8, not JSON, nested too deeply, numbers beyond reason, NaN, a duplicate
    key, or half a surrogate pair.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            twice = Counter(key for key, _ in items).most_common(1)[0][0]
            raise UnusableWeights(f"{subject} invalid: duplicate key {clip(twice)!r}", where=where)
        return result

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=pairs, parse_constant=constant, parse_int=_integer, parse_float=_float
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableWeights(
            f"{subject} invalid JSON: half a surrogate pair, which is not text", where=where
        ) from error
    except UnicodeDecodeError as error:
        raise UnusableWeights(f"{subject} invalid: not UTF-8 text", where=where) from error
    except json.JSONDecodeError as error:
        cause = f"{error.msg.lower()} at character {error.pos}"
        raise UnusableWeights(f"{subject} not valid JSON: {cause}", where=where) from error
    except RecursionError as error:
        raise UnusableWeights(f"{subject} invalid: JSON nested too deeply", where=where) from error
    except ValueError as error:  # of `_integer`, `_float` and `constant`
        cause = "a number that is not a sane one"
        raise UnusableWeights(f"{subject} invalid JSON: {cause}", where=where) from error
    return value


def _integer(text: str) -> int:
    value = int(text)  # Python bounds the digits
    if not -(2**63) <= value < 2**63:
        raise ValueError("an integer beyond 64 bits")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number beyond floats")
    return value
