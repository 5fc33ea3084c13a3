"""The memory of a training step: the trainer's own functions on fake tensors, over two optimizer steps.

Moments exist from the first step of the optimizer on, so the second step is the larger one.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import Tensor

from avatarctl.config import RunConfig
from avatarctl.errors import NotYetSupported
from avatarctl.families import family_named
from avatarctl.family import Draw, TrainableFamily
from avatarctl.host import HOST, is_of_host, to_host
from avatarctl.live_bytes import LiveBytes
from avatarctl.loading.built_in import build_on_meta
from avatarctl.loading.fill import on_meta
from avatarctl.models.device import dtype_of
from avatarctl.models.fp8 import store_in_float8
from avatarctl.models.precision import is_float32_island
from avatarctl.profiling.account import Account
from avatarctl.profiling.auxiliary import CountedAux, aux_step, without_caches
from avatarctl.profiling.extend import extend, shifted, sizes_of
from avatarctl.profiling.fakes import Mode, fill, outside, tensor_bytes, tensors
from avatarctl.profiling.phases import GRADIENTS, Phases, weights_of
from avatarctl.profiling.prepared import Prepared
from avatarctl.profiling.validating import CountedValidation
from avatarctl.registry import Row
from avatarctl.training.aux_losses import active_losses
from avatarctl.training.network import Network
from avatarctl.training.objective import flow_step
from avatarctl.training.optimizer import MOMENTS, Optimizer, moments_place
from avatarctl.training.swapping import swap_blocks
from avatarctl.training.trainables import Trainables, make_trainable
from avatarctl.weights.layouts import LAYOUTS

__all__ = ["profile_training"]

_STEPS: Final = 2


def profile_training(
    row: Row, cfg: RunConfig, mode: Mode = "fake", *, exact: bool = False, device: str = "cpu"
) -> Account:
    """Counts two optimizer steps on prepared samples, the checkpoint that is written behind them, and a
    validation where the run makes some: beside the transformer only what auxiliary losses and that need.

    exact: every block of the network is run; else blocks that are alike are extended, see `extend`, where
    none of them waits on the host and no clip is made. device: of real tensors. Raises NotYetSupported for
    weights of which each process holds a part.
    """
    if cfg.memory.shard != "none":
        raise NotYetSupported(
            "what a card holds of a network that several share is not counted",
            where="memory.shard",
            fix="memory.shard none counts a card that holds all of it",
        )
    whole = exact or mode == "real" or cfg.memory.swap_blocks or cfg.validation.every
    if whole or (sizes := sizes_of(row, cfg)) is None:
        return _counted(row, cfg, mode, device=device)
    small = [_counted(each, cfg, mode, judge=False) for each in sizes.rows]
    extended = extend(small, sizes)
    if extended is None:
        return _counted(row, cfg, mode)
    if not active_losses(cfg):
        return extended
    # What judges and decoder add depends on no block: it is counted behind the smallest network.
    return shifted(extended, small[0], _counted(sizes.rows[0], cfg, mode))


def _counted(row: Row, cfg: RunConfig, mode: Mode, *, judge: bool = True, device: str = "cpu") -> Account:
    """judge: run the auxiliary losses, where there are some; their networks are there in any case."""
    family: Any = family_named(row.family)
    layout = next(each for each in LAYOUTS if each.family == row.family)
    inside = tensors(mode)
    parts = build_on_meta(row, cfg.model.channels)
    dit, prepared = parts["dit"], Prepared(family, cfg, parts)
    # On meta, as adapters cannot be put into a network of fakes; then every weight becomes one.
    with on_meta():  # or PEFT would draw gigabytes of numbers that nobody reads
        trainables = make_trainable(dit, layout, cfg.train, cfg.runtime.seed)
    names = {id(parameter) for parameter in trainables.parameters.values()}
    dtype = torch.float32 if cfg.train.mode == "full" else dtype_of(cfg.runtime)

    def own(name: str, tensor: Tensor) -> torch.dtype:
        return torch.float32 if id(tensor) in names or is_float32_island(dit, name) else dtype

    places, swaps = trainables.places(dit), cfg.memory.swap_blocks
    host = HOST if mode == "real" else torch.device("meta")
    if swaps:  # what waits stays there
        fill(dit, nullcontext(), own, host.type)
    else:
        fill(dit, inside, own, device)
    if cfg.memory.base_precision == "fp8":
        store_in_float8(dit)
    trainables = trainables.found_again(dit, places)
    weights = {"dit": tensor_bytes(dit)}
    trained = trainables.count
    aux = aux_step(row, cfg, inside, device, host)
    weights |= {} if aux is None else aux.weights
    encoders: dict[str, Any] = dict(build_on_meta(row, cfg.model.channels)) if cfg.validation.every else {}
    with inside, LiveBytes() as live, without_caches():
        phases = Phases(live)
        validation = texts = None
        if cfg.validation.every:
            validation = CountedValidation(row, cfg, family, encoders, mode, device, host, live, phases)
            texts = validation.read_texts()
        if swaps:
            trainables = swap_blocks(dit, trainables, swaps, torch.device(device), host)
        live.track(dit, name=weights_of("dit"))
        for part, judge_network in aux.networks.items() if aux is not None else ():
            live.track(judge_network, name=weights_of(part))
        _watch_gradients(trainables, live)
        with phases("load"):
            if aux is not None:
                aux.make_tables()
        network = Network(dit, layout, trainables, cfg, {}, {}, torch.device(device), host)
        live.assign(network.averages(), "averaged weights")
        optimizer = Optimizer(trainables.parameters, cfg.train, moments_place(cfg.memory, host))
        first = 0
        if mode == "fake":
            _make_moments(optimizer, trainables, phases)
            first = 1
        for step in range(first, _STEPS):
            _step(family, network, optimizer, cfg, prepared, step, phases, mode, aux, judge)
        with phases("checkpoint"):
            _save(network, optimizer, host)
        if validation is not None and texts is not None:
            validation.run(network, texts, {} if aux is None else aux.networks)
        phases.end()
    return Account(phases.peaks, weights, phases.parts, trained, live.host_peak, host_parts=live.host_at_peak)


def _save(network: Network, optimizer: Optimizer, host: torch.device) -> None:
    """A checkpoint is held on the host as a whole while it is written."""
    states = [tensor for state in network.states() for tensor in state.values()]
    held = [
        to_host(tensor, host, "a checkpoint that is written")
        for tensor in (*states, *optimizer.tensors())
        if not is_of_host(tensor.untyped_storage())
    ]
    del held


def _watch_gradients(trainables: Trainables, live: LiveBytes) -> None:
    """A gradient is one as soon as it is whole; before, it is what the backward pass works with."""
    for parameter in trainables.parameters.values():
        parameter.register_post_accumulate_grad_hook(lambda held: live.assign(held.grad, GRADIENTS))


def _step(
    family: TrainableFamily,
    network: Network,
    optimizer: Optimizer,
    cfg: RunConfig,
    prepared: Prepared,
    step: int,
    phases: Phases,
    mode: Mode,
    aux: CountedAux | None,
    judge: bool,
) -> None:
    slots = cfg.train.batch_size * cfg.train.gradient_accumulation
    draws = [Draw(cfg.runtime.seed, step, slot, slots) for slot in range(slots)]
    place = network.device
    for first in range(0, slots, cfg.train.batch_size):
        part = draws[first : first + cfg.train.batch_size]
        with phases("condition"):
            samples, constants = prepared.samples(len(part), place), prepared.constants(place)
            condition = family.training_condition(samples, constants, part, cfg)
            del samples, constants
            assert condition.clean is not None
            with outside(mode):
                drawn = family.sample_timesteps(part, condition.clean.shape[2], cfg)
            # Moved as the trainer moves them: what is made outside is not counted.
            fields = (getattr(drawn, name) for name in ("id", "t", "sigma", "weight"))
            timesteps = type(drawn)(
                *(torch.zeros(each.shape, dtype=each.dtype, device=place) for each in fields)
            )
            del drawn
            noise = torch.zeros_like(condition.clean)
        with phases("forward"), network.autocast():
            made = flow_step(family, network.dit, condition, timesteps, noise, cfg)
        loss = made.loss * cfg.aux.recon_weight
        if aux is not None:
            with phases("aux"):
                if judge:
                    loss = loss + aux.loss(made, condition, timesteps)
            # Its gradient is whole when decoder and judges are behind.
            made.velocity.register_hook(lambda _: phases.turn("backward"))
        with phases("backward" if aux is None else "aux backward"):
            (loss.sum() / slots).backward()
        del made, condition, noise, loss
    with phases("optimizer"):
        optimizer.clip()
        optimizer.step(step)
        phases.live.assign(optimizer.tensors(), MOMENTS)


def _make_moments(optimizer: Optimizer, trainables: Trainables, phases: Phases) -> None:
    """What the first step leaves: its gradients are put there, not computed, as they are the second one's."""
    for parameter in trainables.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
        phases.live.assign(parameter.grad, GRADIENTS)
    with phases("optimizer"):
        optimizer.clip()
        optimizer.step(0)
        phases.live.assign(optimizer.tensors(), MOMENTS)
