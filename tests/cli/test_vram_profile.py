"""`avatarctl vram-profile`, typed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from click.testing import CliRunner, Result

from avatarctl.cli import app
from avatarctl.config import read_config
from avatarctl.registry import ROWS


def typed(*words: str) -> Result:
    return CliRunner().invoke(app, ["vram-profile", *words], prog_name="avatarctl")


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in models with four blocks: counting goes through each operation."""
    for name in ("cartoon-i2v", "cartoon-v2v"):
        row = ROWS[name]
        network = {**row.network, "dit": {**row.network["dit"], "num_layers": 4}}
        monkeypatch.setitem(ROWS, name, replace(row, network=MappingProxyType(network)))  # type: ignore[index]


def test_a_table_and_whether_it_fits(shallow: None) -> None:
    words = ("train", "v2v", "--model", "cartoon-v2v", "--size", "16x16", "--frames", "5", "--fit")
    fits = typed(*words, "4090")
    assert fits.exit_code == 0, fits.output
    assert "backward" in fits.stdout and "moments" in fits.stdout and "trained numbers" in fits.stdout
    # There is room for all activations: that is faster.
    assert "of 24.0 GiB, memory.activation_checkpointing none" in fits.stdout
    assert "-o memory.activation_checkpointing=none" in fits.stdout
    too_large = typed(*words, "4MB")
    assert too_large.exit_code == 5 and "at least" in too_large.stderr, too_large.stderr
    assert "Traceback" not in too_large.output


def test_a_plan_is_written_as_a_configuration(shallow: None, tmp_path: Path) -> None:
    """A smaller mode than asked for, and the file of it."""
    words = ("infer", "--model", "cartoon-i2v", "--size", "16x16", "-o", "long_video.num_frames=5")
    whole = json.loads(typed(*words, "--json").stdout)
    card, plan = f"{whole['peak_bytes'] * 0.999 / 1e6:.3f}MB", tmp_path / "plan.yaml"
    found = typed(*words, "--fit", card, "--out", str(plan))
    assert found.exit_code == 0, found.output
    read = read_config(plan, command="infer")
    assert read.asked == {
        "model.name",
        "output.width",
        "output.height",
        "long_video.num_frames",
        "memory.mode",
    }
    assert f"avatarctl infer --config {plan}" in found.stdout and "given up: " in found.stdout
    again = typed("infer", "--config", str(plan), "--fit", card, "--out", str(plan))
    assert again.exit_code == 2 and "exists already" in again.stderr


def test_json_is_one_document(shallow: None) -> None:
    made = typed(
        "infer", "--model", "cartoon-i2v", "--size", "16x16", "--json", "-o", "long_video.num_frames=5"
    )
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["peak_bytes"] > found["live_bytes"] == max(found["stages"].values())
    assert found["components"]["weights of dit"] > 0 and found["assumptions"]


@pytest.mark.parametrize("size", ["0", "-1GB", "12 bananas", "nan", "", "1e9GB", "٣GB"])
def test_no_size(size: str) -> None:
    refused = typed("infer", "--model", "cartoon-i2v", "--fit", size)
    assert refused.exit_code == 2 and "no size of memory" in refused.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("infer", "--host", "32GiB"), "means nothing without --fit"),
        (("infer", "--out", "plan.yaml"), "means nothing without --fit"),
        (("infer", "--fit", "4090", "--host", "much"), "--host: no size of memory"),
        (("infer", "--model", "liveavatar-14b"), "has no code for it yet"),
        (("train", "i2v", "--model", "stableavatar-1.3b"), "has no code for it yet"),
        (("infer", "--size", "500x24"), "multiple of 16"),
    ],
)
def test_refused(words: tuple[str, ...], said: str) -> None:
    refused = typed(*words)
    assert refused.exit_code == 2 and said in refused.stderr, refused.output
