"""Words that were retired for those of the field stay retired, in code, tests and docs.

Audio and image, branch, sigmas, LoRA pair, WeightFile, StoredTensor: docs/contributing.md has a glossary.
"""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RETIRED_PARTS = {"sound", "sounds", "picture", "pictures", "hear", "hears", "heard", "hearing"}
"""As a word of an identifier: `sound_frames`, `SoundSurvey`, `load_picture`, `HearingBlock`."""

RETIRED = {
    "ChunkFinished": "SpanFinished", "LowRank": "LoraPair", "low_rank": "lora_pairs",
    "extract_low_rank": "extract_adapter", "read_checkpoint": "read_weight_file",
    "batch_passes": "batch_branches", "noise_levels": "sigmas", "Picture": "StillImage", "Sound": "Audio",
    "PickledTensor": "StoredTensor", "sees_pictures": "sees_images",
}  # fmt: skip
"""Whole identifiers, and what they are called now."""

FOREIGN = {"soundfile", "SoundFile", "Soundtrack", "soundtrack", "surrogatepass"}
"""Of other libraries, and the field's own word for what a video is played with."""

WORDS = re.compile(
    r"\b(sounds?|pictures?|hears?|heard|hearing|noise levels?|blended windows?"
    r"|low-rank (pair|update|adapter)s?|(guidance|two|three|window) passes)\b",
    re.IGNORECASE,
)

OLDER = ("CHANGELOG.md", "docs/log.md")
"""What was written in its time stays as it was."""


def files(suffix: str) -> list[Path]:
    places = [*(ROOT / top for top in ("avatarctl", "tests", "docs", "configs")), ROOT / "README.md"]
    found = [path for place in places for path in (place.rglob(f"*{suffix}") if place.is_dir() else [place])]
    return [
        path
        for path in sorted(found)
        if path.suffix == suffix
        and path != Path(__file__)
        and not path.is_relative_to(ROOT / "tests" / "golden")
        and path.relative_to(ROOT).as_posix() not in OLDER
    ]


def parts(name: str) -> set[str]:
    """ "ArraySound_of" -> {"array", "sound", "of"}."""
    return {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def retired(name: str) -> bool:
    return name not in FOREIGN and (name in RETIRED or not RETIRED_PARTS.isdisjoint(parts(name)))


@pytest.mark.parametrize(
    "name", ["sound_frames", "SoundSurvey", "HearingBlock", "LowRank", "_SOUND", "heard"]
)
def test_a_retired_identifier_is_found(name: str) -> None:
    assert retired(name)


@pytest.mark.parametrize("name", ["soundfile", "Soundtrack", "audio_frames", "image", "shear", "hearth"])
def test_a_name_of_the_field_is_not(name: str) -> None:
    assert not retired(name)


def test_no_retired_identifier_is_left() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}"
        for path in files(".py")
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        if token.type == tokenize.NAME and retired(token.string)
    }
    assert not found


def test_no_file_has_a_retired_name() -> None:
    assert [
        str(path) for suffix in (".py", ".md", ".yaml") for path in files(suffix) if retired(path.stem)
    ] == []


def test_no_retired_word_is_left_in_texts() -> None:
    """Strings and comments of the code, whole pages of the docs."""
    found = []
    for path in files(".py"):
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type in (tokenize.STRING, tokenize.COMMENT) and (match := WORDS.search(token.string)):
                found.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {match[0]}")
    for path in (*files(".md"), *files(".yaml")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := WORDS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found
