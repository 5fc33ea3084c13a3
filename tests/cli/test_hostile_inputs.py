"""Every configuration, audio, image and weight file of the hostile corpus, through what reads it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from avatarctl.config import RunConfig, read_config, resolve, value_of
from avatarctl.files.source import open_weights
from avatarctl.files.tensors import read_whole
from avatarctl.registry import COMPAT, find_model

HOSTILE = Path(__file__).resolve().parents[3] / "shared" / "hostile"
MANIFEST = HOSTILE / "manifest.json"

FAMILIES = {
    "cartoon-i2v": ("--model", "cartoon-i2v"),
    "stableavatar-tiny": ("--model", "stableavatar-tiny", "--fit", "stretch"),
}
"""A built-in model of each family, and words that let it treat images in its own way."""

LONG = "audio/flac_bomb_25min_8ch.flac"

pytestmark = pytest.mark.skipif(not MANIFEST.is_file(), reason="../shared/hostile is absent")


def rows(kind: str) -> list[Any]:
    if not MANIFEST.is_file():
        return []
    every = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return [pytest.param(row, id=row["file"]) for row in every if row["kind"] == kind]


@pytest.fixture
def judged(run: Callable[..., Result], here: Path) -> Callable[..., dict[str, Any] | None]:
    """Runs a row; its plan where it was accepted, None where it was refused as the manifest wants it."""

    def judge(row: dict[str, Any], flag: str, *words: str) -> dict[str, Any] | None:
        path = HOSTILE / row["file"]
        beside = sorted(path.parent.iterdir())
        result = run("infer", "--dry-run", "--json", flag, str(path), *words)
        assert result.exit_code in row["exit"], result.output
        assert not list(here.iterdir()) and sorted(path.parent.iterdir()) == beside
        assert result.output.replace("\n", "").isprintable()
        for raw in row.get("output_must_not_contain", []):
            assert raw not in result.output
        if result.exit_code == 0:
            found: dict[str, Any] = json.loads(result.stdout)
            return found
        assert result.stdout == ""
        (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert path.name in error
        cause = error.replace(str(path), "")  # a name such as tabs.yaml proves nothing
        wanted = row.get("message_should_mention", [])
        place = f"line {match[1]}" if (match := re.match(r"error: :(\d+)", cause)) else ""
        assert not wanted or any(re.search(want, f"{place} {cause}", re.IGNORECASE) for want in wanted), error
        return None

    return judge


def resolved(path: Path) -> RunConfig:
    return resolve(lambda name: find_model(name).for_config, COMPAT, read_config(path), {}).cfg


@pytest.mark.parametrize("row", rows("config"))
def test_config(row: dict[str, Any], judged: Callable[..., dict[str, Any] | None]) -> None:
    plan = judged(row, "--config")
    if plan is None:
        return
    cfg = resolved(HOSTILE / row["file"])
    for dotted, value in row.get("expect", {}).items():
        assert value_of(cfg, dotted) == value, dotted
    assert plan["steps"] == cfg.sampling.steps and plan["seed"] == cfg.runtime.seed


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("row", rows("audio"))
def test_audio(row: dict[str, Any], model: str, judged: Callable[..., dict[str, Any] | None]) -> None:
    if row["file"] == LONG and model != "cartoon-i2v":
        pytest.skip("25 minutes of 8 channels are read once: no family sees them before they are judged")
    plan = judged(row, "--audio", "--model", model)
    expect = row.get("expect", {})
    if plan is not None and "samples" in expect:
        slack = expect.get("tolerance_samples", 0)
        least, most = (math.ceil((expect["samples"] + way * slack) / 640) for way in (-1, 1))
        assert least <= plan["frames"] <= most


@pytest.mark.parametrize("words", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("row", rows("image"))
def test_image(
    row: dict[str, Any], words: tuple[str, ...], judged: Callable[..., dict[str, Any] | None]
) -> None:
    judged(row, "--image", *words)


@pytest.mark.parametrize("row", rows("checkpoint"))
def test_checkpoint(row: dict[str, Any], run: Callable[..., Result], here: Path) -> None:
    """Inspected, converted, damaged ones named as a LoRA, those with code also as a model."""
    path = HOSTILE / row["file"]
    beside = sorted(path.parent.iterdir())
    out = here / "converted.safetensors"
    for command in (
        ("convert-ckpt", str(path), "--inspect"),
        ("convert-ckpt", str(path), "--out", str(out)),
        # What could be accepted is of another size than the built-in model, which is another refusal.
        *([("infer", "--lora", str(path), "--dry-run")] if 0 not in row["exit"] else []),
        *([("infer", "--model", str(path), "--dry-run")] if row["malicious"] else []),
    ):
        result = run(*command)
        assert result.exit_code in row["exit"], (command, result.output)
        assert result.output.replace("\n", "").isprintable()
        if result.exit_code:
            assert not list(here.iterdir()) and sorted(path.parent.iterdir()) == beside
            (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
            assert path.name in error
            cause = error.replace(str(path), "")
            wanted = row.get("message_should_mention", [])
            assert not wanted or any(re.search(want, cause, re.IGNORECASE) for want in wanted), error
    if path.name in ("pytorch_model.pt", "good_lora.safetensors") and row["exit"] == [0]:
        ours, theirs = open_weights(out).tensors, open_weights(path).tensors
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].info == tensor.info
            assert np.array_equal(read_whole(ours[name]), read_whole(tensor))
