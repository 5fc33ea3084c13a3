"""Processes of which each holds a part of every weight: the numbers of one, and checkpoints that all read."""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # before processes fork, which would each read it
from torch import Tensor
from torch.distributed.tensor import DTensor

from avatarctl.cli.launch import Place, start_processes
from avatarctl.errors import NotYetSupported, UsageError
from avatarctl.events import Notice
from avatarctl.models.fp8 import STORED
from avatarctl.parallel import world as world_module
from avatarctl.parallel.sharded import gathered, whole
from avatarctl.parallel.world import ProcessLost, World, waiting_within
from avatarctl.profiling.training import profile_training
from avatarctl.registry import configure, find_model
from avatarctl.training import building, trainer
from avatarctl.training.checkpoints import Checkpoint
from avatarctl.training.objective import flow_step
from tests.training.running import made_trainer

forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

SHARD = "memory.shard=fsdp2"
LORA = ("train.mode=lora", "train.lora_rank=2", "train.lora_targets=q")
RUNS = {
    "cartoon-v2v": (("train.mode=full",), "memory.activation_checkpointing=block"),
    "cartoon-i2v": ((*LORA, "memory.base_precision=fp8"), "memory.activation_checkpointing=block_offload"),
}
"""By model: settings of the run, and one that changes no number."""


def _doubled(*inputs: Any) -> Any:
    """What is trained in float64, so that sums of another order are told from other sums."""
    found = MADE(*inputs)
    for parameter in found.parameters.values():
        parameter.data = parameter.data.double()
    return found


MADE = building.make_trainable


def _flow(made: trainer.Trainer, part: trainer._Pass) -> Tensor:
    """The loss of samples, by a forward pass alone."""
    condition, timesteps, noise = made._prepared([each for each, _ in part], [draw for _, draw in part])
    with torch.no_grad():
        return flow_step(made.family, made.network.dit, condition, timesteps, noise, made.cfg).loss


def _trained(made: trainer.Trainer) -> dict[str, Tensor]:
    """A step of SGD on all samples: weights behind it, and the norm of the gradient."""
    parameters = made.network.trainables.parameters
    made.accumulate(made._next(made.data.read(made._order.places(0))))
    norm = made._optimizer.clip()
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    return {**{name: whole(each.detach()) for name, each in parameters.items()}, "norm": norm}


def _stepped(made: trainer.Trainer) -> dict[str, Tensor]:
    """A step of the optimizer: weights, average and moments, of each what this process has."""
    made._one_step(made._next(made.data.read(made._order.places(made.step))), 0.0, 0.0)
    held = {f"mean.{name}": each for name, each in made.network._mean.items()}
    held |= made.network.trainables.state() | {
        f"{name}.{key}": value
        for name, each in made.network.trainables.parameters.items()
        for key, value in made._optimizer._parts[0].state[each].items()
    }
    return {name: each.to_local() if isinstance(each, DTensor) else each for name, each in held.items()}


def _inside(folder: Path, prepared: Path, place: Place) -> None:
    """What each of two processes makes; written down, as nobody would see an assertion fail here."""
    world_module._PATIENCE = timedelta(seconds=60)  # type: ignore[misc]
    world = World(place.rank, place.size, place.local)
    world.join(place.meeting, "cpu")
    building.make_trainable = _doubled  # type: ignore[attr-defined]
    of_one_length = trainer._of_one_length
    if place.rank == 1:  # one pass more than the other process: samples of two lengths
        trainer._of_one_length = lambda group: iter([[each] for each in group])
    found: dict[str, Any] = {}
    for model, (words, freely) in RUNS.items():
        settings = (*words, freely, SHARD, "train.batch_size=2", "runtime.gpus=2")
        made = made_trainer(folder / f"{model}-{place.rank}", prepared, *settings, model=model, world=world)
        held: list[Any] = list(made.network.dit.parameters())
        share = sum(each.to_local().numel() for each in held) / sum(each.numel() for each in held)
        stored = any(each.dtype == STORED for each in held)
        flow = None
        with gathered(made.network.dit):
            if place.rank == 1:  # what the other one does not make
                read = made.data.read(made._order.places(0))
                flow = _flow(made, list(zip(made._next(read), made._order.draws(0), strict=True)))
        found[model] = (_trained(made), share, stored, flow)
    building.make_trainable, trainer._of_one_length = MADE, of_one_length  # type: ignore[attr-defined]
    settings = (*LORA, SHARD, "train.ema=0.5", "train.batch_size=2", "runtime.gpus=2")
    made = made_trainer(folder / f"run-{place.rank}", prepared, *settings, model="cartoon-i2v", world=world)
    _stepped(made)
    made.save()
    first = {name: each.clone() for name, each in _stepped(made).items()}
    found["behind"] = {name: whole(each) for name, each in made.network.trainables.state().items()}
    made.resume(Checkpoint(folder / "run-0" / "checkpoint-1", 1, {}))
    second = _stepped(made)
    found["same"] = first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
    world.leave()
    torch.save(found, folder / f"found-{place.rank}.pt")


@forking
def test_two_processes_with_half_of_everything_train_as_one(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SGD in float64, all weights and a LoRA on a base in eight bits; one makes a pass more. What two of
    them saved two take up to the bit, and one does."""
    gc.collect()  # a decoder that is freed in a fork waits for threads that it has not
    assert start_processes(2, _inside, (tmp_path, prepared), method="fork") == 0
    both = [torch.load(tmp_path / f"found-{rank}.pt") for rank in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(building, "make_trainable", _doubled)
        for model, (words, _) in RUNS.items():
            settings = (*words, "train.batch_size=2", "train.gradient_accumulation=2")
            made = made_trainer(tmp_path / model, prepared, *settings, model=model)
            samples = made._next(made.data.read(made._order.places(0)))
            flow = _flow(made, list(zip(samples, made._order.draws(0), strict=True))[2:])
            one = _trained(made)
            assert torch.allclose(both[1][model][3], flow, rtol=1e-6), (
                "of the whole network, made by one alone"
            )
            for rank, (found, share, stored, _) in enumerate(each[model] for each in both):
                assert 0.45 < share < 0.55 and stored == (model == "cartoon-i2v")
                assert found.keys() == one.keys() and torch.allclose(found["norm"], one["norm"], rtol=1e-6)
                held = one.keys() - {"norm"}
                assert rank or all(torch.allclose(found[n], one[n], rtol=0, atol=1e-6) for n in held), model
    settings = (*LORA, "train.ema=0.5", "train.batch_size=2", "train.gradient_accumulation=2", SHARD)
    alone = made_trainer(tmp_path / "alone", prepared, *settings, model="cartoon-i2v")
    told = [event.text for event in alone.events if isinstance(event, Notice)]  # type: ignore[attr-defined]
    assert "memory.shard: there is one process, which holds the whole model" in told
    path = tmp_path / "run-0" / "checkpoint-1"
    alone.resume(Checkpoint(path, 1, {}))
    behind, moved = _stepped(alone), Checkpoint(path, 1, {}).trained()
    assert both[0]["same"] and both[1]["same"]
    for name, weight in both[0]["behind"].items():
        assert torch.allclose(behind[name], weight, rtol=0, atol=1e-6), name
    assert any(not torch.equal(behind[name], moved[name]) for name in moved)


@pytest.mark.parametrize(
    ("where", "word"),
    [
        ("memory.swap_blocks", "memory.swap_blocks=2"),
        ("memory.optimizer_device", "memory.optimizer_device=cpu"),
        ("train.optimizer", "train.optimizer=adamw8bit"),
    ],
)
def test_what_parts_of_weights_cannot_do_is_refused(
    where: str, word: str, prepared: Path, tmp_path: Path
) -> None:
    words = (*LORA, SHARD, "memory.activation_checkpointing=block", word)
    with pytest.raises(UsageError, match=r"does not go together with memory\.shard fsdp2") as caught:
        made_trainer(tmp_path / "run", prepared, *words, model="cartoon-i2v")
    assert caught.value.where == where and caught.value.exit_code == 2


def test_a_share_is_not_counted() -> None:
    cfg = configure("model.name=cartoon-v2v", SHARD)
    with pytest.raises(NotYetSupported, match=r"memory\.shard"):
        profile_training(find_model("cartoon-v2v"), cfg)


def test_a_broken_connection_within_a_pass_is_a_process_that_is_gone() -> None:
    with pytest.raises(ProcessLost, match=r"another process .* Connection closed"), waiting_within():
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(torch.OutOfMemoryError), waiting_within():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shapes") as other, waiting_within():
        raise RuntimeError("shapes do not fit")
    assert type(other.value) is RuntimeError
