"""One clip, learnt by heart: what only a network that knows this clip can do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avatarctl.data.training_set import TrainingSample
from avatarctl.flow_matching import velocity_target
from avatarctl.registry import ROWS
from avatarctl.training.objective import flow_step
from avatarctl.training.trainer import Trainer

STEPS = 65


def test_one_clip_is_learnt_by_heart(
    trainer_of: Callable[..., Trainer], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clip of 9 frames, four times in a step, from random weights in four blocks of the row's six. The
    errors are of noise and sigmas that training never drew.

    Sigmas are high, where x is nearly the noise and v = x is right but for the clip itself: a network that
    has learnt that much, and nothing of the clip, is as good on every other one.
    """
    row = ROWS["cartoon-v2v"]
    network = {**row.network, "dit": {**row.network["dit"], "num_layers": 4}}
    values = {**row.defaults, "train.init": "random"}
    monkeypatch.setitem(ROWS, row.name, replace(row, network=network, defaults=values))  # type: ignore[index]
    data = tmp_path / "data"
    for turn in range(4):
        shutil.copytree(prepared / "000001", data / f"00000{turn}")
    shutil.copytree(prepared / "_dataset", data / "_dataset")
    words = (
        "train.batch_size=4", f"train.max_steps={STEPS}", "train.learning_rate=5e-3",
        "train.prefix_dropout=0", "train.prefix_frames=1", "train.timestep_weight=none",
        "train.text_dropout=0", "train.audio_dropout=0", "data.mask_rule=all",
        "memory.activation_checkpointing=none",
    )  # fmt: skip
    trainer = trainer_of(*words, data=data)
    others = trainer_of(*words).data
    (clip,) = samples_of(trainer.data, 0)
    trainer.train(lambda: False)
    learnt, of_noise_alone = errors(trainer, clip)
    assert learnt < of_noise_alone / 3, (learnt, of_noise_alone)
    elsewhere = [errors(trainer, sample)[0] for sample in samples_of(others, 0, 2, 3)]
    assert learnt < min(elsewhere) / 4, (learnt, elsewhere)
    log = [json.loads(line) for line in (trainer.folder.path / "log.jsonl").read_text().splitlines()]
    assert len(log) == STEPS


def samples_of(data: object, *places: int) -> list[TrainingSample]:
    return [sample for sample in data.read(places) if isinstance(sample, TrainingSample)]  # type: ignore[attr-defined]


@torch.no_grad()
def errors(trainer: Trainer, sample: TrainingSample) -> tuple[float, float]:
    """Mean squared error of the velocity at eight sigmas: the network's, and that of v = x."""
    draws = [trainer._order.draws(step)[0] for step in range(1000, 1008)]
    condition, timesteps, noise = trainer._prepared([sample] * 8, draws)
    step = flow_step(trainer.family, trainer.network.dit, condition, timesteps, noise, trainer.cfg)
    target = velocity_target(condition.clean, noise)  # type: ignore[arg-type]
    plain, _ = trainer.family.loss(step.noisy, target, condition, timesteps, trainer.cfg)
    return float(step.parts["mse"].mean()), float(plain.mean())
