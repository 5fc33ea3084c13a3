"""`memory.mode auto`: what decides, what is said and recorded, what is refused before anything is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from avatarctl.cli import app, memory_mode
from avatarctl.config import read_config
from avatarctl.errors import AvatarctlError, DoesNotFit
from avatarctl.events import silent
from avatarctl.pipelines.at_most import weights_of
from avatarctl.placement.host import HostMemory
from avatarctl.profiling.account import Account
from avatarctl.profiling.fit import Room
from avatarctl.profiling.kept import kept
from avatarctl.registry import configure, find_model
from tests.accounts import account
from tests.placement.test_modes import CHUNKS, plan_of

MIB = 1 << 20
NEEDS = {"full": 400, "model": 300, "group": 200, "sequential": 100}


def typed(*words: str) -> Result:
    return CliRunner().invoke(app, ["infer", *words], prog_name="avatarctl")


class Lines(list[str]):
    """What a screen is told."""

    def __call__(self, event: Any) -> None:
        self.append(getattr(event, "text", ""))


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Every mode that is counted, each with a known need and as much on the host as it saves."""
    seen: list[str] = []

    def profile_inference(row: Any, cfg: Any, samples: int) -> Account:
        seen.append(cfg.memory.mode)
        need = NEEDS[cfg.memory.mode]
        return account({"step": need * MIB}, host=(400 - need) * MIB)

    monkeypatch.setattr("avatarctl.profiling.inference.profile_inference", profile_inference)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return seen


def on_a_card(monkeypatch: pytest.MonkeyPatch, free: int, host: int | None = None) -> None:
    monkeypatch.setattr(memory_mode, "_on_cpu", lambda device: False)
    monkeypatch.setattr(memory_mode, "_device", lambda plan: torch.device("cuda"))
    monkeypatch.setattr(memory_mode, "free_room", lambda device: Room(free, host, where="cuda"))


def with_free(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    memory = HostMemory(1 << 40, free, "the container (/sys/fs/cgroup/job/memory.max)")
    monkeypatch.setattr(memory_mode, "host_memory", lambda: memory)


def settled(*words: str, lines: Lines | None = None) -> str:
    plan = memory_mode.settled(plan_of(*CHUNKS, *words), {}, lines if lines is not None else Lines())
    return plan.cfg.memory.mode


def test_a_cpu_with_room_for_the_weights_is_full_by_arithmetic(
    monkeypatch: pytest.MonkeyPatch, counts: list[str]
) -> None:
    with_free(monkeypatch, 1 << 30)
    lines = Lines()
    assert settled("runtime.device=cpu", lines=lines) == "full" and not counts
    (line,) = lines
    assert (
        line.startswith("memory: full (auto; ")
        and "of weights; 1.0 GiB are free, the limit of the con" in line
    )
    with_free(monkeypatch, None)
    assert settled("runtime.device=cpu", lines=lines) == "full" and not counts
    assert "does not tell what is free" in lines[-1]


def test_a_cpu_without_room_is_counted_and_what_waits_counts_as_well(
    monkeypatch: pytest.MonkeyPatch, counts: list[str]
) -> None:
    with_free(monkeypatch, weights_of(plan_of(*CHUNKS, "runtime.device=cpu")) - 1)
    with pytest.raises(DoesNotFit, match=r"needs 4\d\d\.\d MiB at least .*, and 14\.\d MiB are free"):
        settled("runtime.device=cpu")
    assert counts == ["full", "model", "group", "sequential"]


def test_a_card_gets_the_fastest_mode_that_fits(monkeypatch: pytest.MonkeyPatch, counts: list[str]) -> None:
    on_a_card(monkeypatch, 1 << 40)
    lines = Lines()
    assert settled(lines=lines) == "full" and not counts, "arithmetic is enough"
    assert lines[-1].startswith("memory: full (auto; at most ")
    on_a_card(monkeypatch, 213 * MIB)  # 200 and the allowance
    monkeypatch.setattr("avatarctl.pipelines.at_most.at_most", lambda plan: None)
    assert settled(lines=lines) == "group"
    assert lines[-1] == "memory: group (auto; counted: 212.0 MiB of 213.0 MiB free on cuda)"
    assert counts == ["full", "model", "group"]
    assert settled() == "group" and len(counts) == 3, "kept in the cache folder"
    on_a_card(monkeypatch, 213 * MIB, host=199 * MIB)
    with pytest.raises(DoesNotFit, match=r"cuda: 200\.0 MiB are needed on the host, and 199"):
        settled()


def test_a_mode_that_was_asked_for_stays_and_one_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, counts: list[str]
) -> None:
    on_a_card(monkeypatch, MIB)
    with pytest.raises(DoesNotFit, match="memory mode full on cuda: the weights alone take"):
        settled("memory.mode=full")
    assert not counts
    on_a_card(monkeypatch, 100 * MIB)  # as much as is alive; the allowance refuses nobody
    assert settled("memory.mode=sequential") == "sequential" and counts == ["sequential"]
    with pytest.raises(
        DoesNotFit, match=r"memory mode group on cuda: 200\.0 MiB are needed at once, in step, and 100"
    ):
        settled("memory.mode=group")
    on_a_card(monkeypatch, 1 << 40)
    assert settled("memory.mode=full") == "full" and counts == ["sequential", "group"], "arithmetic is enough"
    monkeypatch.undo()
    assert settled("memory.swap_blocks=2", "runtime.device=cpu") == "model"


def test_a_run_that_cannot_be_counted_begins(monkeypatch: pytest.MonkeyPatch, counts: list[str]) -> None:
    def profile_inference(*_: Any, **__: Any) -> Account:
        raise AvatarctlError("cannot be counted: aten.nonzero works on real numbers alone")

    on_a_card(monkeypatch, 100 * MIB)
    monkeypatch.setattr("avatarctl.profiling.inference.profile_inference", profile_inference)
    lines = Lines()
    assert settled("memory.mode=sequential", lines=lines) == "sequential"
    assert lines[-1].startswith("the run begins without having been counted: cannot be counted: aten.nonzero")


def test_a_dry_run_says_what_arithmetic_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_free(monkeypatch, 1 << 30)
    told = typed("--dry-run", "--device", "cpu").stdout.splitlines()
    assert any(line.startswith("memory: full (auto; ") for line in told), told
    monkeypatch.setattr(memory_mode, "_on_cpu", lambda device: False)
    told = typed("--dry-run").stdout.splitlines()
    assert any(line.startswith("memory: decided at start (auto; free memory of the card") for line in told)
    document = json.loads(typed("--dry-run", "--json").stdout)["memory"]
    assert document["decided"] is None and document["mode"] == "full"


def test_files_of_drivers_are_the_sign_of_a_card(tmp_path: Path) -> None:
    assert memory_mode._on_cpu("auto", tmp_path) and memory_mode._on_cpu("cpu", tmp_path)
    assert not memory_mode._on_cpu("cuda:1", tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    assert not memory_mode._on_cpu("auto", tmp_path) and memory_mode._on_cpu("cpu", tmp_path)


def test_a_run_file_records_asked_and_decided_and_asks_again(tmp_path: Path) -> None:
    out = tmp_path / "v.mp4"
    words = ("--chunked", "--steps", "1", "-o", "long_video.num_frames=9", "--audio", str(voice(tmp_path)))
    done = typed(*words, "--device", "cpu", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "memory: full (auto; " in done.stderr
    text = out.with_suffix(".run.yaml").read_text()
    assert "decided:\n  memory:\n    mode: full\n" in text
    again = read_config(out.with_suffix(".run.yaml"), command="infer")
    assert again.settings["memory.mode"].value == "auto" and "memory.mode" not in again.asked


def voice(folder: Path) -> Path:
    import numpy as np
    import soundfile

    noise = np.random.default_rng(0).standard_normal(6_400) * 0.1
    soundfile.write(folder / "voice.wav", noise, 16_000)
    return folder / "voice.wav"


def test_what_was_counted_is_kept_by_configuration(tmp_path: Path) -> None:
    counted = []

    def count(cfg: Any) -> Account:
        counted.append(cfg)
        return Account({"step": 5}, {"dit": 3}, {"step": {"moments": 5}}, 2, 4, 6, {"moments": 4})

    row = find_model("cartoon-i2v")
    cfg = configure(*CHUNKS)
    first = kept(tmp_path / "a", row, cfg, count, silent)
    assert kept(tmp_path / "a", row, cfg, count, silent) == first and len(counted) == 1
    other_seed = replace(cfg, runtime=replace(cfg.runtime, seed=7))
    assert kept(tmp_path / "a", row, other_seed, count, silent) == first and len(counted) == 1
    kept(tmp_path / "a", row, memory_mode.with_mode(cfg, "group"), count, silent)
    kept(tmp_path / "a", replace(row, network={**row.network, "dit": {}}), cfg, count, silent)
    assert len(counted) == 3
    for path in (tmp_path / "a").iterdir():
        path.write_text("{")
    assert kept(tmp_path / "a", row, cfg, count, silent) == first and len(counted) == 4
    (tmp_path / "b").write_text("no folder")
    lines = Lines()
    assert kept(tmp_path / "b", row, cfg, count, lines) == first
    assert "is not kept" in lines[0]
