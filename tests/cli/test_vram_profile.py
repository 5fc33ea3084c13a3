"""`avatarctl vram-profile`, typed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from avatarctl.cli import app
from avatarctl.config import RunConfig, read_config
from avatarctl.media import Audio, survey, write_audio
from avatarctl.profiling import inference, training
from avatarctl.profiling.account import Account
from avatarctl.registry import ROWS, Row
from tests.accounts import account


def typed(*words: str) -> Result:
    return CliRunner().invoke(app, ["vram-profile", *words], prog_name="avatarctl")


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in models with four blocks: counting goes through each operation."""
    for name in ("cartoon-i2v", "cartoon-v2v"):
        row = ROWS[name]
        network = {**row.network, "dit": {**row.network["dit"], "num_layers": 4}}
        monkeypatch.setitem(ROWS, name, replace(row, network=MappingProxyType(network)))  # type: ignore[index]


@pytest.fixture
def once(shallow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What several tests, or two commands of one, ask for is counted once."""
    for module, name in ((inference, "profile_inference"), (training, "profile_training")):
        monkeypatch.setattr(module, name, _remembered(getattr(module, name), name))


@pytest.fixture
def on_real_tensors(shallow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes as on fakes (tests/profiling/test_counts.py), in a fifth of the time."""
    for module, name in ((inference, "profile_inference"), (training, "profile_training")):
        count = functools.partial(getattr(module, name), mode="real")
        monkeypatch.setattr(module, name, _remembered(count, f"{name} on real tensors"))


ACCOUNTS: dict[str, Account] = {}


def _remembered(count: Callable[..., Account], name: str) -> Callable[..., Account]:
    def counted(row: Row, cfg: RunConfig, *words: Any, **more: Any) -> Account:
        key = f"{name} {row} {cfg} {words} {more}"
        if key not in ACCOUNTS:
            ACCOUNTS[key] = count(row, cfg, *words, **more)
        return ACCOUNTS[key]

    return counted


INFER = (
    "infer",
    "--model",
    "cartoon-i2v",
    "--size",
    "16x16",
    "-o",
    "long_video.num_frames=5",
    "--overlap",
    "1",
    "--device",
    "cpu",
)
TRAIN = (
    "train", "v2v", "--model", "cartoon-v2v", "--size", "16x16", "--frames", "5", "--batch-size", "1",
    "--device", "cpu",
)  # fmt: skip


def test_a_table_and_whether_it_fits(on_real_tensors: None) -> None:
    words = (*TRAIN, "--fit")
    fits = typed(*words, "4090")
    assert fits.exit_code == 0, fits.output
    assert "backward" in fits.stdout and "moments" in fits.stdout and "trained numbers" in fits.stdout
    # There is room for all activations: that is faster.
    assert "of 24.0 GiB, memory.activation_checkpointing none" in fits.stdout
    assert "-o memory.activation_checkpointing=none" in fits.stdout
    assert "on cpu" not in fits.stdout, "nothing was measured"
    too_large = typed(*words, "4MB")
    assert too_large.exit_code == 5 and "at least" in too_large.stderr, too_large.stderr
    assert "Traceback" not in too_large.output


def test_a_plan_is_written_as_a_configuration(on_real_tensors: None, tmp_path: Path) -> None:
    """A smaller mode than asked for, and the file of it."""
    words = INFER
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
        "long_video.overlap_frames",
        "memory.mode",
        "runtime.device",
    }
    assert f"avatarctl infer --config {plan}" in found.stdout and "given up: " in found.stdout
    again = typed("infer", "--config", str(plan), "--fit", card, "--out", str(plan))
    assert again.exit_code == 2 and "exists already" in again.stderr


def test_json_is_one_document_with_what_was_measured_here(once: None) -> None:
    made = typed(*INFER, "--json", "--measure")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    measured = found["measured"]
    assert measured["device"] == "cpu" and measured["stages"].keys() == found["stages"].keys()
    assert measured["stages"] == found["stages"] and measured["live_bytes"] == found["live_bytes"]
    assert found["peak_bytes"] > found["live_bytes"] == max(found["stages"].values())
    assert found["components"]["weights of dit"] > 0 and found["assumptions"]


@pytest.mark.parametrize("size", ["0", "-1GB", "12 bananas", "nan", "", "1e9GB", "٣GB", "4091"])
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
        (("infer", "-o", "long_video.num_frames=82"), "4k + 1"),
        (("train", "v2v", "--frames", "10000"), "4k + 1"),
        (("train", "v2v", "--size", "24x16"), "multiple of 16"),
        (("train", "v2v", "--model", "stableavatar-1.3b", "--fit", "4090"), "has no code for it yet"),
        (("infer", "--model", "liveavatar-14b", "--fit", "24GiB"), "has no code for it yet"),
        (("infer", "--fit", "9999x"), "no size of memory, nor a card: '9999x'"),
    ],
)
def test_refused(words: tuple[str, ...], said: str) -> None:
    refused = typed(*words)
    assert refused.exit_code == 2 and said in refused.stderr, refused.output


def test_training_is_measured_phase_by_phase(once: None) -> None:
    """On a CPU the padding of a text is one row: a step takes less than a card's, and says so."""
    made = typed(*TRAIN, "--measure")
    assert made.exit_code == 0, made.output
    table = {line.split()[0]: line.split()[1:] for line in made.stdout.splitlines() if "," in line}
    assert table["load"][0] == table["load"][1] and len(table["load"]) == 2
    predicted, measured = (int(text.replace(",", "")) for text in table["backward"][:2])
    assert 0.9 * predicted < measured < predicted and table["backward"][2].startswith("-")


def test_what_does_not_fit_here_is_not_measured(shallow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from avatarctl.cli import vram_profile
    from avatarctl.profiling.fit import Room

    loaded = account({"load": 100 << 20}, {"dit": 10 << 20})
    monkeypatch.setattr("avatarctl.profiling.inference.profile_inference", lambda *_, **__: loaded)
    room = Room(125 << 20, is_one=True, where="the container (/sys/fs/cgroup/job/memory.max)")
    monkeypatch.setattr(vram_profile, "free_room", lambda device: room)
    refused = typed("infer", "--model", "cartoon-i2v", "--device", "cpu", "--measure")
    assert refused.exit_code == 5 and refused.stdout == ""
    said = (
        "--measure: 126.0 MiB are needed on cpu, and 125.0 MiB are free there: the container (/sys/fs/cgroup/"
    )
    assert said in refused.stderr


def test_a_configuration_of_another_command_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("command: train v2v\nmodel:\n  name: cartoon-v2v\n")
    refused = typed("infer", "--config", str(tmp_path / "run.yaml"))
    assert refused.exit_code == 2 and "belongs to `avatarctl train v2v`" in refused.stderr


def test_a_host_below_what_waits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is large enough in a mode that leaves more on the host than was given."""
    needs = {"full": 400, "model": 300, "group": 200, "sequential": 100}

    def counted(row: object, cfg: RunConfig, **_: object) -> Account:
        need = needs[cfg.memory.mode]
        return account({"step": need << 20}, host=(400 - need) << 20)

    monkeypatch.setattr("avatarctl.profiling.inference.profile_inference", counted)
    words = ("infer", "--model", "cartoon-i2v", "--fit", "220MiB", "--host")
    refused = typed(*words, "100MiB")
    assert refused.exit_code == 5
    assert "--host: 200.0 MiB are needed on the host, and 100.0 MiB were given" in refused.stderr
    assert typed(*words, "200MiB").exit_code == 0


def test_ten_thousand_frames_are_counted_by_the_same_operations(shallow: None) -> None:
    """Shapes alone are larger: it answers at once, and inputs of a clip alone are larger than the network."""
    words = ("--size", "16x16", "--batch-size", "1", "--json", "--frames", "10001")
    counted = json.loads(typed("train", "v2v", "--model", "cartoon-v2v", *words).stdout)
    features = 4 * 10001 * 192
    assert counted["stages"]["condition"] - counted["stages"]["load"] > features


def test_a_recording_is_read_once_however_many_plans_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_audio(tmp_path / "voice.wav", np.zeros(32_000, np.float32), 16_000)
    read, counted = [], []

    def surveyed(audio: Audio) -> Any:
        read.append(audio.name)
        return survey(audio)

    def count(row: object, cfg: RunConfig, **more: Any) -> Account:
        counted.append(more["samples"])
        return account({"step": 1 << 30})

    monkeypatch.setattr("avatarctl.media.survey", surveyed)
    monkeypatch.setattr("avatarctl.profiling.inference.profile_inference", count)
    words = ("infer", "--model", "cartoon-i2v", "--audio", str(tmp_path / "voice.wav"), "--fit", "1MB")
    assert typed(*words).exit_code == 5
    assert len(read) == 1 and len(counted) > 2 and set(counted) == {32_000}
