"""The card of the built-in models tells of the files that stand beside it, which are ordinary weights."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.resources import files

import pytest
from click.testing import CliRunner

from avatarctl.cli import app
from avatarctl.demo.making.card import card_text
from avatarctl.demo.making.recipe import FULL, PARTS


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


def test_what_a_build_writes_now_is_the_card_that_is_shipped() -> None:
    """But for what came out of the parts, and the hashes."""
    card = (files("avatarctl") / "assets" / "cartoon" / "README.md").read_text(encoding="utf-8")
    written = card_text(1, FULL, {part: {} for part in PARTS}, {})
    for first, behind in ((None, "## How they were made"), ("| recipe |", "| file | digest |")):
        here, there = (text[first and text.index(first) : text.index(behind)] for text in (written, card))
        assert here == there


@pytest.mark.parametrize(("name", "channels"), [("dit_i2v", 33), ("dit_v2v", 49)])
def test_the_transformers_are_ordinary_weights_of_no_delay(name: str, channels: int) -> None:
    path = files("avatarctl") / "assets" / "cartoon" / f"{name}.safetensors"
    found = CliRunner().invoke(app, ["convert-ckpt", "--inspect", str(path), "--json"])
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert (facts["channels"], facts["audio_offset"]) == (channels, 0), facts
