"""Optimizer steps by the product's own trainer: what accumulates, what is skipped, what is replaced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from avatarctl.data.training_set import TrainingSample, TrainingSet
from avatarctl.errors import UnusableFile
from avatarctl.events import Notice, TrainingStepFinished
from avatarctl.training.network import Network
from avatarctl.training.objective import training_noise
from avatarctl.training.trainer import Trainer


def batch_of(trainer: Trainer) -> list[TrainingSample]:
    return [sample for sample in trainer.data.read(range(4)) if isinstance(sample, TrainingSample)]


def gradients(trainer: Trainer) -> torch.Tensor:
    for parameter in trainer.network.trainables.parameters.values():
        parameter.data = parameter.data.double()
    trainer.accumulate(batch_of(trainer))
    made = [p.grad.flatten() for p in trainer.network.trainables.parameters.values() if p.grad is not None]
    return torch.cat(made)


def test_micro_batches_are_one_batch(trainer_of: Any) -> None:
    """The public trainer keeps the last of them, at a quarter (spec/omniavatar.md j 1)."""
    trainer = trainer_of("train.batch_size=4")
    whole = gradients(trainer)
    for size, passes in ((2, 2), (1, 4)):
        trainer._optimizer.drop_gradients()
        train = replace(trainer.cfg.train, batch_size=size, gradient_accumulation=passes)
        trainer.cfg = replace(trainer.cfg, train=train)
        parts = gradients(trainer)
        assert float((parts - whole).norm() / whole.norm()) < 1e-6


def test_samples_of_two_lengths_share_a_batch(trainer_of: Any) -> None:
    trainer = trainer_of("train.batch_size=4")
    batch = batch_of(trainer)
    tensors = dict(batch[1].tensors)
    for name in ("latents", "masked_latents"):
        tensors[name] = tensors[name][:, :2]
    batch[1] = replace(batch[1], tensors=tensors, frames=5)
    totals = trainer.accumulate(batch)
    assert totals["loss"] > 0 and all(value == value for value in totals.values())


def test_a_step_without_finite_numbers_moves_nothing_and_names_its_samples(trainer_of: Any) -> None:
    trainer = trainer_of("train.batch_size=2")
    good = trainer.data.read

    def broken(places: Any) -> Iterator[TrainingSample]:
        for sample in good(places):
            yield replace(
                sample, tensors={**sample.tensors, "latents": sample.tensors["latents"] * torch.nan}
            )

    before = {name: tensor.clone() for name, tensor in trainer.network.trainables.state().items()}
    trainer.data.read = broken
    with pytest.raises(UnusableFile, match="5 steps in a row were not finite"):
        trainer.train(lambda: False)
    for name, tensor in trainer.network.trainables.state().items():
        assert torch.equal(tensor, before[name])
    log = [json.loads(line) for line in (trainer.folder.path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert all(entry["loss"] is None and entry["skipped"] for entry in log)
    assert not list(trainer.folder.path.glob("checkpoint-*"))


def test_a_sample_that_goes_bad_is_replaced_by_the_next(trainer_of: Any) -> None:
    trainer = trainer_of("train.batch_size=4", "train.max_steps=2")
    good = trainer.data.read

    def with_a_bad_one(places: Any) -> Iterator[Any]:
        for place in places:
            (sample,) = good([place])
            yield UnusableFile("is gone") if place == 2 else sample

    trainer.data.read = with_a_bad_one
    trainer.train(lambda: False)
    assert list(trainer.failed) == [trainer.data.names[2]]
    told = [event.text for event in trainer.events if isinstance(event, Notice)]
    assert sum("is gone; another sample takes its turns" in text for text in told) == 1


def test_noise_belongs_to_the_sample_of_a_step() -> None:
    from avatarctl.family import Draw

    shape = torch.Size((2, 16, 3, 4, 4))
    together = training_noise([Draw(1, 0, 0, 2), Draw(1, 0, 1, 2)], shape)
    alone = training_noise([Draw(1, 0, 1, 2)], torch.Size((1, *shape[1:])))
    assert torch.equal(together[1], alone[0]) and not torch.equal(together[0], together[1])


def test_averaged_weights_follow_by_their_decay(trainer_of: Any) -> None:
    trainer = trainer_of("train.ema=0.75", "train.max_steps=1", "train.batch_size=2")
    name = "head.head.weight"
    before = trainer.network.trainables.state()[name].clone()
    trainer.train(lambda: False)
    (told,) = [event for event in trainer.events if isinstance(event, TrainingStepFinished)]
    assert told.seconds > 0 and told.memory is not None and told.memory > 10**8  # torch alone takes that
    after = trainer.network.trainables.state()[name]
    _, averaged = trainer.network.files(1)
    mean = torch.from_numpy(averaged[0][name].read(0, after.numel()).reshape(after.shape).copy())
    assert torch.allclose(mean, 0.75 * before + 0.25 * after, atol=1e-7)
    assert isinstance(trainer.network, Network)


def test_training_set_reads_what_preparation_wrote(trainer_of: Any, prepared: Path) -> None:
    data: TrainingSet = trainer_of().data
    assert data.lacking == {}
    assert len(data.names) == 4
    assert {"silence", "empty_prompt", "negative_prompt", "mask"} == set(data.constants)
