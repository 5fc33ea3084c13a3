"""The card of the built-in models tells of the files that stand beside it."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files


def test_the_card_has_the_hash_of_every_file() -> None:
    home = files("avatarctl") / "assets" / "cartoon"
    card = (home / "README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"`?([\w.]+\.(?:safetensors|json))`?\D*?\b([0-9a-f]{64})\b", card))
    there = {
        each.name: hashlib.sha256(each.read_bytes()).hexdigest()
        for each in home.iterdir()
        if each.name != "README.md"
    }
    assert told == there
