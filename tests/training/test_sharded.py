"""Processes of which each holds a part of every weight: the numbers of one, and checkpoints that all read."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from avatarctl.cli.launch import Place, start_processes
from avatarctl.models.fp8 import STORED
from avatarctl.parallel import world as world_module
from avatarctl.parallel.sharded import whole
from avatarctl.parallel.world import World
from avatarctl.training import building, trainer
from tests.training.running import bits, forked, made_trainer, typed
from tests.training.test_many_processes import LINE, ONE, TWO, VALIDATED, _forking, _second_dies

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

SHARD = "memory.shard=fsdp2"
FULL = ("train.mode=full",)
LORA = ("train.mode=lora", "train.lora_rank=2", "memory.base_precision=fp8")
RUNS = {"cartoon-v2v": FULL, "cartoon-i2v": LORA}


def _in_float64() -> None:
    """What is trained, so that sums of another order are told from other sums."""
    real = building.make_trainable

    def made(*inputs: Any) -> Any:
        found = real(*inputs)
        for parameter in found.parameters.values():
            parameter.data = parameter.data.double()
        return found

    building.make_trainable = made


def _trained(made: trainer.Trainer) -> dict[str, Tensor]:
    """Two steps of SGD, of what the processes of a run have of each."""
    parameters = made.network.trainables.parameters
    descent = torch.optim.SGD(parameters.values(), lr=0.1)
    norms = []
    for step in range(2):
        made.step = step
        samples = made.data.read(made._order.places(step))
        made.accumulate(made._next(samples))
        norms.append(made._optimizer.clip().clone())
        descent.step()
        descent.zero_grad()
    return {**{name: whole(each.detach()) for name, each in parameters.items()}, "norms": torch.stack(norms)}


def _inside(folder: Path, prepared: Path, place: Place) -> None:
    """What each of two processes makes; written down, as nobody would see an assertion fail here."""
    world_module._PATIENCE = timedelta(seconds=60)  # type: ignore[misc]
    world = World(place.rank, place.size, place.local)
    world.join(place.meeting, "cpu")
    _in_float64()
    if place.rank == 1:  # one pass more than the other process: samples of two lengths
        trainer._of_one_length = lambda group: iter([[each] for each in group])
    for model, words in RUNS.items():
        settings = (*words, SHARD, "train.batch_size=2", "runtime.gpus=2")
        made = made_trainer(folder / f"{model}-{place.rank}", prepared, *settings, model=model, world=world)
        found = _trained(made)
        held = sum(each.to_local().numel() for each in made.network.dit.parameters())  # type: ignore[attr-defined]
        stored = any(each.dtype == STORED for each in made.network.dit.parameters())
        share = held / sum(each.numel() for each in made.network.dit.parameters())
        torch.save((found, share, stored), folder / f"{model}-{place.rank}.pt")
    world.leave()


def test_two_processes_with_half_of_everything_train_as_one(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SGD in float64, all weights and a LoRA on a base in eight bits; one makes a pass more."""
    assert start_processes(2, _inside, (tmp_path, prepared), method="fork") == 0
    monkeypatch.setattr(building, "make_trainable", building.make_trainable)
    _in_float64()
    for model, words in RUNS.items():
        settings = (*words, "train.batch_size=2", "train.gradient_accumulation=2")
        one = _trained(made_trainer(tmp_path / model, prepared, *settings, model=model))
        for rank in range(2):
            found, share, stored = torch.load(tmp_path / f"{model}-{rank}.pt")
            assert 0.45 < share < 0.55 and stored == ("fp8" in words[-1])
            assert found.keys() == one.keys()
            apart = {name: float((found[name] - one[name]).abs().max()) for name in one if rank == 0}
            assert max(apart.values(), default=0.0) < 1e-6, (model, max(apart, key=apart.__getitem__))
            assert torch.allclose(found["norms"], one["norms"], rtol=1e-6), "the norm of all parts"


def test_killed_and_gone_on_by_two_and_by_one(prepared: Path, samples: Path, tmp_path: Path) -> None:
    """With an average and a validation, where each has the whole network for its clips."""
    said, run, whole_run, other = (tmp_path / name for name in ("said.txt", "run", "whole", "other"))
    line = (
        *LINE,
        "--data",
        prepared,
        "--resume",
        "auto",
        "-o",
        SHARD,
        "--ema",
        "0.5",
        *VALIDATED,
        "--sets",
        samples,
    )
    assert forked(_forking, *line, *TWO, "--out", whole_run, said=said) == 0, said.read_text()
    assert forked(_second_dies, *line, *TWO, "--out", run, said=said) == 6, said.read_text()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    shutil.copytree(run, other)
    assert forked(_forking, *line, *TWO, "--out", run, said=said) == 0, said.read_text()
    assert "resumed behind step 1" in said.read_text()
    assert bits(run, 3) == bits(whole_run, 3)
    name = "checkpoint-3/ema_weights.safetensors"
    assert (run / name).read_bytes() == (whole_run / name).read_bytes()
    assert (run / "validation.jsonl").read_bytes() == (whole_run / "validation.jsonl").read_bytes()
    alone = typed(*line, *ONE, "--out", other)
    assert alone.exit_code == 0 and "one process, which holds the whole model" in alone.output, alone.output
