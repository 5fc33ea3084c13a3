"""Cases that say once more what others say."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["repeats"]


def repeats(telling: list[Any], again: list[Any]) -> list[Any]:
    """Parameters of a test: `telling` always, `again` in `make torture` (tests/torture/repeats.py)."""
    return telling + (again if os.environ.get("AVATARCTL_REPEATS") else [])
