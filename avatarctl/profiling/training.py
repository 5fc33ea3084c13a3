"""The memory of a training step: the trainer's own functions on fake tensors, over two optimizer steps.

Moments exist from the first step of the optimizer on, so the second step is the larger one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from avatarctl.conditioning.masking import mask_tensor, mouth_mask
from avatarctl.config import RunConfig
from avatarctl.families import family_named
from avatarctl.family import Draw, TrainableFamily
from avatarctl.live_bytes import LiveBytes
from avatarctl.loading.built_in import build_on_meta
from avatarctl.models.device import dtype_of
from avatarctl.models.precision import is_float32_island
from avatarctl.profiling.account import Account
from avatarctl.profiling.fakes import Mode, fill, outside, tensor_bytes, tensors
from avatarctl.profiling.phases import Phases
from avatarctl.registry import Row
from avatarctl.timeline import latent_frames, pixel_frames
from avatarctl.training.network import Network
from avatarctl.training.objective import flow_step
from avatarctl.training.optimizer import Optimizer
from avatarctl.training.trainables import make_trainable
from avatarctl.weights.layouts import LAYOUTS

__all__ = ["profile_training"]

_STEPS: Final = 2
_PROMPT_ROWS: Final = 128
"""Of a prompt; the network reads 512 rows whatever it is."""


@dataclass(frozen=True)
class _Sizes:
    frames: int  # latent
    height: int  # latent
    width: int  # latent
    audio: int
    text: int


def profile_training(row: Row, cfg: RunConfig, mode: Mode = "fake") -> Account:
    """Counts two optimizer steps on prepared samples: only the transformer is loaded."""
    family: Any = family_named(row.family)
    layout = next(each for each in LAYOUTS if each.family == row.family)
    inside = tensors(mode)
    dit = build_on_meta(row, cfg.model.channels)["dit"]
    # On meta, as adapters cannot be put into a network of fakes; then every weight becomes one.
    trainables = make_trainable(dit, layout, cfg.train, cfg.runtime.seed)
    names = {id(parameter) for parameter in trainables.parameters.values()}
    dtype = torch.float32 if cfg.train.mode == "full" else dtype_of(cfg.runtime)

    def own(name: str, tensor: Tensor) -> torch.dtype:
        return torch.float32 if id(tensor) in names or is_float32_island(dit, name) else dtype

    places = {id(parameter): name for name, parameter in trainables.parameters.items()}
    by_slot = {
        name: places[id(parameter)] for name, parameter in dit.named_parameters() if id(parameter) in places
    }
    fill(dit, inside, own)
    now = dict(dit.named_parameters())
    parameters = {by_slot[name]: now[name] for name in by_slot}
    trainables = type(trainables)(dict(sorted(parameters.items())), trainables.modules)
    weights = {"dit": tensor_bytes(dit)}
    trained = trainables.count
    with inside, LiveBytes() as live:
        live.track(dit)
        phases = Phases(live)
        with phases("load"):
            pass
        network = Network(dit, layout, trainables, cfg, {}, {}, torch.device("cpu"))
        optimizer = Optimizer(trainables.parameters, cfg.train)
        for step in range(_STEPS):
            _step(family, network, optimizer, cfg, _sizes(row, cfg), step, phases, mode)
        phases.end()
    moments = 8 * trained
    return Account(phases.peaks, weights, {"moments": moments, "gradients": 4 * trained}, trained)


def _sizes(row: Row, cfg: RunConfig) -> _Sizes:
    data = cfg.data
    assert data.num_frames is not None and data.height is not None and data.width is not None
    dit: Mapping[str, Any] = row.network["dit"]
    return _Sizes(
        latent_frames(data.num_frames),
        data.height // 8,
        data.width // 8,
        dit["audio_input_dim"],
        dit["text_dim"],
    )


def _step(
    family: TrainableFamily,
    network: Network,
    optimizer: Optimizer,
    cfg: RunConfig,
    sizes: _Sizes,
    step: int,
    phases: Phases,
    mode: Mode,
) -> None:
    slots = cfg.train.batch_size * cfg.train.gradient_accumulation
    draws = [Draw(cfg.runtime.seed, step, slot, slots) for slot in range(slots)]
    for first in range(0, slots, cfg.train.batch_size):
        part = draws[first : first + cfg.train.batch_size]
        with phases("condition"):
            condition = family.training_condition(
                _samples(sizes, cfg, len(part)), _constants(sizes), part, cfg
            )
            with outside(mode):
                timesteps = family.sample_timesteps(part, sizes.frames, cfg)
            assert condition.clean is not None
            noise = torch.zeros_like(condition.clean)
        with phases("forward"), network.autocast():
            made = flow_step(family, network.dit, condition, timesteps, noise, cfg)
        with phases("backward"):
            (made.loss.sum() / slots).backward()
        del made, condition, noise
    with phases("optimizer"):
        optimizer.clip()
        optimizer.step(step)


def _samples(sizes: _Sizes, cfg: RunConfig, count: int) -> Sequence[Mapping[str, Tensor]]:
    """As they are read from files: bfloat16 numbers as float32."""
    video = (16, sizes.frames, sizes.height, sizes.width)
    return [
        {
            "latents": torch.zeros(video),
            "audio_features": torch.zeros(pixel_frames(sizes.frames), sizes.audio),
            "text": torch.zeros(_PROMPT_ROWS, sizes.text),
            **({"masked_latents": torch.zeros(video)} if cfg.model.channels in (49, 65) else {}),
            **({"reference_sequence": torch.zeros(video)} if cfg.model.channels == 65 else {}),
        }
        for _ in range(count)
    ]


def _constants(sizes: _Sizes) -> Mapping[str, Tensor]:
    return {
        "silence": torch.zeros(pixel_frames(sizes.frames), sizes.audio),
        "empty_prompt": torch.zeros(1, sizes.text),
        "mask": mask_tensor(mouth_mask()),
    }
