"""One clip, learnt by heart: the error falls far below that of a network that knows nothing of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avatarctl.registry import ROWS
from avatarctl.training.objective import flow_step
from avatarctl.training.trainer import Trainer

STEPS, FACTOR = 75, 2.5
"""The error falls by this factor at least."""


def test_one_clip_is_learnt_by_heart(
    trainer_of: Callable[..., Trainer], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clip of 9 frames, from random weights in four blocks of the row's six; the error before and after is
    of noise and sigmas that training never drew."""
    row = ROWS["cartoon-v2v"]
    network = {**row.network, "dit": {**row.network["dit"], "num_layers": 4}}
    monkeypatch.setitem(ROWS, row.name, replace(row, network=network))  # type: ignore[index]
    data = Path(shutil.copytree(prepared / "000001", tmp_path / "data/000001")).parent
    shutil.copytree(prepared / "_dataset", data / "_dataset")
    trainer = trainer_of(
        "train.batch_size=1", f"train.max_steps={STEPS}", "train.learning_rate=5e-3",
        "train.prefix_dropout=0", "train.prefix_frames=1", "train.timestep_weight=none",
        "train.text_dropout=0", "train.audio_dropout=0", "data.mask_rule=all",
        data=data,
    )  # fmt: skip
    before = error(trainer)
    trainer.train(lambda: False)
    after = error(trainer)
    assert before / after > FACTOR, (before, after)
    log = [json.loads(line) for line in (trainer.folder.path / "log.jsonl").read_text().splitlines()]
    assert len(log) == STEPS


@torch.no_grad()
def error(trainer: Trainer) -> float:
    """Mean squared error of the velocity at eight sigmas."""
    (sample,) = trainer.data.read([0])
    draws = [trainer._order.draws(step)[0] for step in range(1000, 1008)]
    condition, timesteps, noise = trainer._prepared([sample] * 8, draws)  # type: ignore[list-item]
    step = flow_step(trainer.family, trainer.network.dit, condition, timesteps, noise, trainer.cfg)
    return float(step.parts["mse"].mean())
