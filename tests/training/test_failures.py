"""What goes wrong beside a run: full disks, checkpoints that are damaged or another run's, folders of others.

One line, the right exit code, and nothing of what was there is lost.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from avatarctl.loading.trained import damage
from avatarctl.media.files import file_sha256
from avatarctl.training import checkpoints
from tests.training.running import COMPARED, QUICK, SMALL, bits, forked, typed

Go = Callable[..., Result]


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, each saved; nobody changes it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    made = typed("train", "v2v", *LINE, "--data", prepared, "--out", run)
    assert made.exit_code == 0, made.output
    return run


SHORT = (*SMALL[:4], "--batch-size", "1", *QUICK, "-o", "checkpoint.every=1")
LINE = (*SHORT, "--max-steps", "2")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


@pytest.fixture
def go_on(prepared: Path) -> Go:
    """The same run, resumed; `run` is its folder or one of its checkpoints."""

    def run(run: Path, *words: object, steps: int = 2) -> Result:
        resume = ("--resume", "auto", "--out", run)
        if run.name.startswith("checkpoint-"):
            resume = ("--resume", run)  # type: ignore[assignment]
        line = ("train", "v2v", *SHORT, "--max-steps", steps, "--data", prepared)
        made = typed(*line, *resume, *words)
        assert "Traceback" not in made.output
        return made

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "timing.jsonl"
    }


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


# --- full disks ----------------------------------------------------------------------------------


def test_a_full_disk_leaves_older_checkpoints_as_they_were(
    finished: Path, copied: Path, go_on: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the second checkpoint is written, in the middle of it and then, when it goes on, at its end."""
    run = copied
    shutil.rmtree(run / "checkpoint-2")
    real = {"writer": checkpoints.write_safetensors, "state": checkpoints.dump_state}

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(path: Path, *rest: Any) -> None:
        if path.name == tried[-1]:
            full()
        real["writer"](path, *rest)

    def state(*rest: Any) -> str:
        if tried[-1] == "state.json":
            full()
        return str(real["state"](*rest))

    tried: list[str] = []
    for file in (COMPARED[1], "state.json"):
        tried.append(file)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "write_safetensors", write)
            patch.setattr(checkpoints, "dump_state", state)
            made = go_on(run)
        assert made.exit_code == 3 and "checkpoint-2: no space left on the device" in made.output, made.output
        assert "free some space: the same command with --resume auto goes on" in made.output
        assert {path.name for path in run.glob("*checkpoint-*")} == {"checkpoint-1"}
        assert damage(run / "checkpoint-1") == "" and not list(run.glob(".tmp-*"))
    resumed = go_on(run)
    assert resumed.exit_code == 0 and "resumed behind step 1" in resumed.output
    assert bits(run, 2) == bits(finished, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_disk_that_refuses_more_bytes_is_told_in_one_line(prepared: Path, tmp_path: Path) -> None:
    """The system's own refusal: no file may grow beyond a size that no weights fit into."""

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))

    line = ("train", "v2v", *LINE, "--data", prepared, "--out", tmp_path / "run")
    code = forked(little, *line, said=tmp_path / "said.txt")
    said = (tmp_path / "said.txt").read_text()
    assert code == 3 and f"checkpoint-1/{COMPARED[0]}: no space left" in said and "Traceback" not in said, (
        said
    )
    assert not list((tmp_path / "run").glob("*checkpoint-*")) and not list((tmp_path / "run").glob(".tmp-*"))


def test_older_ones_stay_until_the_newest_was_read_back(
    copied: Path, go_on: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that gives back something else than was written."""
    real = checkpoints.write_checkpoint

    def write(*rest: Any) -> Path:
        path = real(*rest)
        spoil(path / COMPARED[0])
        return path

    monkeypatch.setattr("avatarctl.training.trainer.write_checkpoint", write)
    made = go_on(copied, "--keep-last", "1", steps=3)
    assert made.exit_code == 3 and "was not written as it should be" in made.output, made.output
    assert {path.name for path in copied.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (1, 2, 3)}


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_damaged_only_checkpoint_is_no_reason_to_begin_again(copied: Path, go_on: Go) -> None:
    shutil.rmtree(copied / "checkpoint-1")
    spoil(copied / "checkpoint-2" / COMPARED[1])
    before = contents(copied)
    made = go_on(copied, steps=3)
    assert made.exit_code == 3, made.output
    assert f"checkpoint-2: {COMPARED[1]} is damaged" in made.output and "start anew" in made.output
    assert contents(copied) == before


def test_the_checkpoint_that_was_named_and_no_other(copied: Path, go_on: Go) -> None:
    """One that is damaged, and one that was never there: nothing is set aside for it."""
    spoil(copied / "checkpoint-1" / COMPARED[0])
    before = contents(copied)
    made = go_on(copied / "checkpoint-1")
    assert made.exit_code == 3 and "name another checkpoint" in made.output, made.output
    made = go_on(copied / "checkpoint-7", steps=9)
    assert made.exit_code == 2, made.output
    assert "no checkpoint of step 7 (there are those of 1, 2)" in made.output
    assert contents(copied) == before


@pytest.mark.parametrize(
    ("was", "other", "said"),
    [
        ("channels: 49", "channels: 65", "model.channels was 65 and is 49"),
        ("audio_offset: 0", "audio_offset: 1", "model.audio_offset was 1 and is 0"),
        ("name: cartoon-v2v", "name: cartoon-i2v", "model.name was cartoon-i2v and is cartoon-v2v"),
        ("mask_rule: all", "mask_rule: first_keep", "data.mask_rule was first_keep and is all"),
    ],
)
def test_a_checkpoint_of_another_run_is_not_gone_on_with(
    was: str, other: str, said: str, copied: Path, go_on: Go
) -> None:
    """Of other channels, convention or model, put into this folder: its shapes may well fit."""
    own = copied / "checkpoint-2/run.yaml"
    text = own.read_text()
    assert text.count(was) >= 1
    own.write_text(text.replace(was, other))
    state = json.loads((copied / "checkpoint-2/state.json").read_text())
    state["files"]["run.yaml"] = file_sha256(own)
    (copied / "checkpoint-2/state.json").write_text(json.dumps(state))
    made = go_on(copied, steps=3)
    assert made.exit_code == 2 and said in made.output, made.output
    assert not (copied / "checkpoint-3").exists()


def test_the_weights_of_another_network_are_not_gone_on_with(copied: Path, go_on: Go) -> None:
    file = copied / "checkpoint-2" / COMPARED[0]
    held = load_file(file)
    held["head.head.weight"] = torch.zeros(3, 3)
    save_file(held, file)
    state = json.loads((copied / "checkpoint-2/state.json").read_text())
    state["files"][COMPARED[0]] = file_sha256(file)
    (copied / "checkpoint-2/state.json").write_text(json.dumps(state))
    made = go_on(copied, steps=3)
    assert made.exit_code == 3 and "head.head.weight is [3, 3], and this run trains" in made.output


def test_a_start_of_fewer_channels_than_the_weights_have(
    finished: Path, prepared: Path, tmp_path: Path
) -> None:
    line = ("train", "i2v", *LINE, "--data", prepared, "--out", tmp_path / "run", "--model", finished)
    made = typed(*line, "--channels", "33", "-o", "train.init=zero_channels")
    assert made.exit_code == 2, made.output
    assert "have 49 input channels, and 33 were asked for" in made.output
    assert not (tmp_path / "run/run.yaml").exists()


# --- what other commands make of a run -----------------------------------------------------------


def test_a_run_is_converted_by_its_newest_good_checkpoint(copied: Path, tmp_path: Path) -> None:
    spoil(copied / "checkpoint-2" / COMPARED[0])
    made = typed("convert-ckpt", copied, "--out", tmp_path / "one.safetensors")
    assert made.exit_code == 0, made.output
    assert "checkpoint-2 is passed over" in made.output and "of this run: checkpoint-1/" in made.output
    ours, theirs = (
        load_file(path) for path in (tmp_path / "one.safetensors", copied / "checkpoint-1" / COMPARED[0])
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    shown = typed("convert-ckpt", copied, "--inspect", "--json")
    assert shown.exit_code == 0 and json.loads(shown.stdout)["audio_offset"] is not None, shown.output


def test_a_foreign_folder_of_several_checkpoints_stays_refused(copied: Path, tmp_path: Path) -> None:
    """Without a run file nobody knows which one is meant."""
    (copied / "run.yaml").unlink()
    for words in (("convert-ckpt", copied, "--inspect"), ("infer", "--model", copied, "--dry-run")):
        made = typed(*words)
        assert made.exit_code in (2, 3) and "Traceback" not in made.output, made.output
        assert "checkpoint-1" in made.output or "no weight" in made.output, made.output
