"""The memory of a training step: the trainer's own functions on fake tensors, over two optimizer steps.

Moments exist from the first step of the optimizer on, so the second step is the larger one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from avatarctl.conditioning.masking import mask_tensor, mouth_mask
from avatarctl.conditioning.mel import mel_filters
from avatarctl.config import RunConfig
from avatarctl.families import family_named
from avatarctl.family import Condition, Draw, Timesteps, TrainableFamily
from avatarctl.host import HOST
from avatarctl.live_bytes import LiveBytes
from avatarctl.loading.built_in import build_on_meta
from avatarctl.loading.fill import on_meta
from avatarctl.loading.judges import PART_OF, Judges, LossName
from avatarctl.models.device import dtype_of
from avatarctl.models.lpips_vgg import PUBLISHED_WIDTHS, LpipsVgg
from avatarctl.models.precision import is_float32_island
from avatarctl.models.stable_syncnet import PUBLISHED_SYNCNET, StableSyncNet
from avatarctl.models.videomae import PUBLISHED_VIDEOMAE, VideoMae, sinusoids
from avatarctl.profiling.account import Account
from avatarctl.profiling.fakes import Mode, fill, outside, tensor_bytes, tensors
from avatarctl.profiling.phases import Phases
from avatarctl.registry import Row
from avatarctl.timeline import SAMPLES_PER_FRAME, latent_frames, pixel_frames
from avatarctl.training.aux_losses import AuxLosses, active_losses, aux_settings
from avatarctl.training.aux_step import AuxBatch, AuxStep
from avatarctl.training.network import Network
from avatarctl.training.objective import FlowStep, flow_step
from avatarctl.training.optimizer import Optimizer, moments_place
from avatarctl.training.swapping import swap_blocks
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


def profile_training(row: Row, cfg: RunConfig, mode: Mode = "fake", device: torch.device = HOST) -> Account:
    """Counts two optimizer steps on prepared samples: the transformer is loaded, and with auxiliary losses
    the VAE and the judges; encoders are not. device: of real tensors."""
    family: Any = family_named(row.family)
    layout = next(each for each in LAYOUTS if each.family == row.family)
    inside = tensors(mode)
    host = HOST if mode == "real" else torch.device("meta")
    parts = build_on_meta(row, cfg.model.channels)
    dit = parts["dit"]
    # On meta, as adapters cannot be put into a network of fakes; then every weight becomes one.
    trainables = make_trainable(dit, layout, cfg.train, cfg.runtime.seed)
    names = {id(parameter) for parameter in trainables.parameters.values()}
    dtype = torch.float32 if cfg.train.mode == "full" else dtype_of(cfg.runtime)

    def own(name: str, tensor: Tensor) -> torch.dtype:
        return torch.float32 if id(tensor) in names or is_float32_island(dit, name) else dtype

    places, swaps = trainables.places(dit), cfg.memory.swap_blocks
    if swaps:  # what waits stays there
        fill(dit, nullcontext(), own, host.type)
    else:
        fill(dit, inside, own, device.type)
    trainables = trainables.found_again(dit, places)
    weights = {"dit": tensor_bytes(dit)}
    judged = active_losses(cfg)
    judges = _judges(row, judged, inside, device) if judged else Judges()
    if judged:
        fill(parts["vae"], inside, lambda name, tensor: torch.float32, device.type)
        weights["vae"] = tensor_bytes(parts["vae"])
        made = {name: getattr(judges, name) for name in judged}
        weights |= {f"judge of {name}": tensor_bytes(judge) for name, judge in made.items()}
    trained = trainables.count
    with inside, LiveBytes() as live:
        if not swaps:
            live.track(dit)
        if judged:
            live.track(parts["vae"], *made.values())
        phases = Phases(live)
        if swaps:
            trainables = swap_blocks(dit, trainables, swaps, device, host)
            live.track(dit)
            live.reset_peak()
        with phases("load"):
            pass
        network = Network(dit, layout, trainables, cfg, {}, {}, device, host)
        optimizer = Optimizer(trainables.parameters, cfg.train, moments_place(cfg.memory, host))
        aux = _aux(cfg, judged, judges, parts["vae"], host) if judged else None
        for step in range(_STEPS):
            _step(family, network, optimizer, aux, cfg, _sizes(row, cfg), step, phases, mode)
        phases.end()
        waits = live.host_peak
    components = {"moments": 8 * trained, "gradients": 4 * trained}
    return Account(phases.peaks, weights, components, trained, waits)


def _judges(row: Row, names: Collection[LossName], inside: Any, device: torch.device = HOST) -> Judges:
    """Of a row's own sizes, or the published ones; float32."""
    made = {}
    for name in names:
        kind, published = _JUDGES[name]
        with on_meta():
            judge = kind(**row.network.get(PART_OF[name], published)).eval().requires_grad_(False)
        fill(judge, inside, lambda _, tensor: torch.float32, device.type)
        made[name] = judge
    # Tables that are made once and kept: not among tensors that have no numbers.
    mel_filters()
    if "trepa" in names:
        judge = made["trepa"]
        rows = judge.image_size // judge.patch_embed["proj"].kernel_size[1]
        sinusoids(judge.frames // judge.tubelet * rows * rows, judge.blocks[0].norm1.normalized_shape[0])
    return Judges(**made)


_JUDGES: Final[Mapping[LossName, tuple[Any, Mapping[str, Any]]]] = {
    "sync": (StableSyncNet, PUBLISHED_SYNCNET),
    "lpips": (LpipsVgg, {"widths": PUBLISHED_WIDTHS}),
    "trepa": (VideoMae, PUBLISHED_VIDEOMAE),
}


def _aux(cfg: RunConfig, names: Sequence[LossName], judges: Judges, vae: Any, host: torch.device) -> AuxStep:
    assert cfg.data.num_frames is not None
    return AuxStep(AuxLosses(names, judges, aux_settings(cfg, cfg.data.num_frames)), vae, host)


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
    aux: AuxStep | None,
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
            samples = [_there(sample, network.device) for sample in _samples(sizes, cfg, len(part))]
            condition = family.training_condition(
                samples, _there(_constants(sizes), network.device), part, cfg
            )
            with outside(mode):
                timesteps = family.sample_timesteps(part, sizes.frames, cfg)
            assert condition.clean is not None
            noise = torch.zeros_like(condition.clean)
        with phases("forward"), network.autocast():
            there = type(timesteps)(**_there(vars(timesteps), network.device))
            made = flow_step(family, network.dit, condition, there, noise, cfg)
        total = made.loss * cfg.aux.recon_weight
        if aux is not None:
            with phases("losses"):
                total = total + aux(_aux_batch(made, condition, timesteps, part)).total
        with phases("backward"):
            (total.sum() / slots).backward()
        del made, condition, noise, total
    with phases("optimizer"):
        optimizer.clip()
        optimizer.step(step)


def _aux_batch(made: FlowStep, condition: Condition, timesteps: Timesteps, part: Sequence[Draw]) -> AuxBatch:
    """Frames are aligned faces, as `data.faces none` says."""
    assert condition.clean is not None
    count, frames = len(part), pixel_frames(condition.clean.shape[2])
    return AuxBatch(
        noisy=made.noisy,
        velocity=made.velocity,
        sigma=timesteps.sigma,
        clean=condition.clean,
        waveform=made.noisy.new_zeros(count, frames * SAMPLES_PER_FRAME),
        keys=[(draw.seed, (draw.step, draw.slot)) for draw in part],
        given=condition.fixed_mask,
    )


def _there(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


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
