"""The two transformers of the cartoon world, trained as `avatarctl train i2v` and `train v2v` train any
other: their trainer, its settings, its checkpoints. Here are the settings, what a run starts from, and what
becomes of its last weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from avatarctl.atomic import atomic_write_bytes
from avatarctl.config import dump_run, resolve
from avatarctl.config.reader import Setting
from avatarctl.demo.making.learning import seeded
from avatarctl.errors import Interrupted
from avatarctl.events import Emit
from avatarctl.families import family_named
from avatarctl.loading.assemble import built_in
from avatarctl.loading.parts import TRANSFORMERS
from avatarctl.loading.trained import AVERAGED, checkpoints
from avatarctl.models.precision import is_float32_island
from avatarctl.registry import COMPAT, ROWS, Row
from avatarctl.training.run import TrainingRun
from avatarctl.training.weights_file import read_trained

if TYPE_CHECKING:
    from avatarctl.config import Resolved, RunConfig
    from avatarctl.data.training_set import TrainingData

__all__ = ["Which", "encoding_settings", "settings_of", "shipped_weights", "train_transformer", "write_start"]

Which = Literal["i2v", "v2v"]

_SETTINGS: Final[Mapping[str, Any]] = {
    "train.mode": "full",
    "train.batch_size": 16,
    "train.learning_rate": 2e-3,
    "train.final_learning_rate": 2e-5,
    "train.schedule": "cosine",
    "train.hold": 0.4,
    "train.warmup_steps": 100,
    "train.betas": (0.9, 0.98),
    "train.ema": 0.997,
    "train.timestep_weight": "none",
    "train.text_dropout": 0.0,
    "train.audio_dropout": 0.0,
    "train.prefix_frames": (1, 5),
    "train.prefix_dropout": 0.0,
    "train.prefix_noise": 0.15,
    "memory.activation_checkpointing": "none",
    "data.artifact_dtype": "float32",
    "data.references": 2,
    "checkpoint.every": 100,
    "checkpoint.keep_last": 1,
}
"""Both; spec/cartoon-world.md 5 and 9. One thing is given in every chunk that `infer` makes of an image, so
nothing is dropped; what is given there was made by the model, so here it has noise."""

_OWN: Final[Mapping[Which, Mapping[str, Any]]] = {
    "i2v": {"train.mouth_weight": 2.5},
    "v2v": {"train.mouth_weight": 4.0},
}


def settings_of(which: Which, row: Row, seed: int, **more: Any) -> Resolved:
    """The settings of a run. more: values by key, its dot written as two underscores."""
    asked = {**_SETTINGS, **_OWN[which], "runtime.seed": seed, "train.init": "zero_channels"}
    asked |= {name.replace("__", "."): value for name, value in more.items()}
    settings = {name: Setting(value, "demo build") for name, value in asked.items()}
    settings["model.name"] = Setting(row.name, "demo build")
    return resolve(lambda name: row.for_config, COMPAT, None, settings)


def encoding_settings(seed: int, frames: int) -> RunConfig:
    """Those by which clips are encoded, for both transformers."""
    return settings_of("v2v", ROWS["cartoon-v2v"], seed, data__num_frames=frames).cfg


def write_start(path: Path, row: Row, seed: int, mean: Tensor, deviation: Tensor) -> None:
    """The weights before the first step: a velocity of zero, and an audio projection that reads features as
    if each were standardised by the mean and deviation that it has over many voices."""
    sizes = {
        name: list(value) if isinstance(value, tuple) else value for name, value in row.network["dit"].items()
    }
    with seeded("cartoon transformer", row.name, seed):
        dit: Any = TRANSFORMERS[row.family](**sizes)
    nn.init.zeros_(dit.proj_out.weight)
    nn.init.zeros_(dit.proj_out.bias)
    read_standardised(dit, mean, deviation)
    original = built_in(row).layout.key_map.rename_to_original(dit.state_dict())
    atomic_write_bytes(path, save({name: tensor.contiguous() for name, tensor in original.items()}))


def read_standardised(dit: Any, mean: Tensor, deviation: Tensor) -> None:
    """Lets the audio projection take raw features [.., A] where it took (features - mean) / deviation: exact.
    It stands before everything else that reads audio."""
    proj = dit.audio_proj.proj
    times = proj.in_features // len(mean)
    centre, spread = mean.double().repeat(times), deviation.double().repeat(times)
    with torch.no_grad():
        weight = proj.weight.double() / spread
        proj.bias.copy_(proj.bias.double() - weight @ centre)
        proj.weight.copy_(weight)


def train_transformer(
    which: Which,
    row: Row,
    resolved: Resolved,
    data: TrainingData,
    folder: Path,
    emit: Emit,
    should_stop: Callable[[], bool],
) -> Path:
    """Trains, or goes on; returns the file of the averaged weights. row: with `path`, the start."""
    command = f"train {which}"
    family: Any = family_named(row.family)
    run = TrainingRun(command, resolved.cfg, row, family, folder, emit, resume=True)
    try:
        result = run.run(dump_run(resolved, command), should_stop, data=data)
    except Interrupted as stopped:  # a build is gone on with by its own command
        raise Interrupted(f"{which}: {stopped.what}", fix="the same command goes on") from stopped
    last = result.checkpoint or checkpoints(folder)[-1][1]
    return last / AVERAGED


def shipped_weights(path: Path, row: Row) -> dict[str, Tensor]:
    """A trained file as it is shipped: bfloat16, but what the program computes in float32 and what takes
    audio, whose folded statistics would not survive it."""
    names = built_in(row).layout.key_map
    network: Any = TRANSFORMERS[row.family]
    shipped = {}
    for name, tensor in read_trained(path).items():
        wide = is_float32_island(network, names.to_internal(name) or name) or name.startswith("audio_")
        shipped[name] = tensor.float() if wide else tensor.to(torch.bfloat16)
    return shipped
