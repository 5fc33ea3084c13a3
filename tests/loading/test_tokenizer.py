"""tokenizer.json: the published kinds of steps are read, and steps that blow a prompt up are refused."""

from __future__ import annotations

import json
import struct
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from avatarctl.errors import UnusableWeights
from avatarctl.loading.tokenizer import read_tokenizer
from tests.pipelines.tiny_release import write_tokenizer

METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}


def replace(found: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": found}, "content": content}


def sequence(kind: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {kind: {"type": "Sequence", f"{kind}s" if kind == "normalizer" else "pretokenizers": list(steps)}}


def table(*texts: str) -> dict[str, Any]:
    data = struct.pack("<I", 1024) + bytes(1024) + b"".join(text.encode() + b"\0" for text in texts)
    return {"type": "Precompiled", "precompiled_charsmap": b64encode(data).decode()}


def written(place: Path, **changed: Any) -> Path:
    folder = place / "umt5"
    write_tokenizer(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return folder


@pytest.mark.parametrize(
    "changed",
    [
        {},
        sequence("normalizer", table("ss", "صلى الله عليه وسلم"), SPACES),
        sequence("normalizer", {"type": "NFKC"}, SPACES),
        sequence("pre_tokenizer", {"type": "WhitespaceSplit"}, METASPACE),
    ],
)
def test_steps_of_published_tokenizers_are_read(changed: dict[str, Any], tmp_path: Path) -> None:
    assert read_tokenizer(written(tmp_path, **changed), 1000)("").input_ids == [1]


@pytest.mark.parametrize(
    "changed",
    [
        sequence("normalizer", replace("a", "a" * 1000), replace("a", "a" * 1000)),
        sequence("normalizer", *[replace("a", "a" * 8)] * 16),
        sequence("normalizer", {"type": "Prepend", "prepend": "a" * 1000}),
        sequence("normalizer", table("a" * 1000)),
        sequence("pre_tokenizer", *[METASPACE] * 16),
        sequence("normalizer", *[{"type": "Lowercase"}] * 300),
        {"post_processor": {"type": "Sequence", "processors": []}},
        {"model": {"type": "WordPiece", "vocab": {}, "unk_token": "a", "continuing_subword_prefix": "a"}},
    ],
)
def test_steps_that_make_a_prompt_grow_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnusableWeights, match=r"tokenizer\.json"):
        read_tokenizer(written(tmp_path, **changed), 1000)


def test_a_file_larger_than_any_tokenizer_is_not_read(tmp_path: Path) -> None:
    with (written(tmp_path) / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(UnusableWeights, match="too large"):
        read_tokenizer(tmp_path / "umt5", 1000)
