"""Sizes of memory as people say them, and of cards."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

from avatarctl.errors import UsageError

__all__ = ["CARDS", "read_size"]

CARDS: Final[Mapping[str, int]] = {
    "3070": 8, "4060": 8, "3080": 10, "2080ti": 11, "3060": 12, "3080ti": 12, "4070": 12, "4070ti": 12,
    "5070": 12, "4060ti": 16, "4080": 16, "5070ti": 16, "5080": 16, "t4": 16, "v100-16": 16, "3090": 24,
    "3090ti": 24, "4090": 24, "a10": 24, "a5000": 24, "l4": 24, "5090": 32, "v100-32": 32, "a100-40": 40,
    "a40": 48, "a6000": 48, "l40": 48, "l40s": 48, "rtx6000-ada": 48, "a100": 80, "a100-80": 80, "h100": 80,
    "rtx6000-pro": 96, "h200": 141, "b200": 180,
}  # fmt: skip
"""GiB of memory by name, as their makers state them."""

_LARGEST_BARE: Final = 512
"""GiB; a larger number without a unit is the name of a card that is not in the table."""
_UNITS: Final = {
    "": 1 << 30,
    "gib": 1 << 30,
    "gb": 10**9,
    "mib": 1 << 20,
    "mb": 10**6,
    "tib": 1 << 40,
    "tb": 10**12,
}


def read_size(text: str, option: str = "--fit") -> int:
    """Bytes of "24GiB", "24GB", "24" (GiB, to 512) or a card. Raises UsageError, which names the option."""
    plain = text.strip().lower().replace(" ", "")
    if card := CARDS.get(plain) or CARDS.get(plain.removeprefix("rtx")):
        return card << 30
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(gib|gb|mib|mb|tib|tb|)", plain, re.ASCII)
    size = float(match[1]) * _UNITS[match[2]] if match else math.nan
    if match and not match[2] and float(match[1]) > _LARGEST_BARE:
        size = math.nan
    if not 0 < size < 1 << 50:
        fix = f"a size such as 24GiB or 24GB, or one of {', '.join(CARDS)}"
        raise UsageError(f"no size of memory, nor a card: {text[:60]!r}", where=option, fix=fix)
    return int(size)
