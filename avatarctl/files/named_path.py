"""A path as a person typed it."""

from __future__ import annotations

from pathlib import Path

from avatarctl.errors import PathNotFound

__all__ = ["expanded"]


def expanded(text: str) -> Path:
    """`text` with `~` and `~user` replaced by home folders.

    Raises PathNotFound for a user that nobody is, and for an empty text: `Path("")` is the current folder,
    which is not what an unset variable of a shell means.
    """
    if not text:
        raise PathNotFound("the path is empty")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise PathNotFound("no such user, so no home folder", where=text) from error
