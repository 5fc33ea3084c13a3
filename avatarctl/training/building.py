"""The network of a run: its start, what of it is trained, and every weight where the settings want it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from avatarctl.events import Notice
from avatarctl.models.attention import choose_attention, use_attention
from avatarctl.models.device import dtype_of
from avatarctl.models.fp8 import store_in_float8
from avatarctl.parallel.sharded import mesh_of, shard
from avatarctl.placement.place import HOST, moved
from avatarctl.training.network import Network
from avatarctl.training.start import Start, StartPlan, start_network
from avatarctl.training.swapping import swap_blocks
from avatarctl.training.trainables import Trainables, make_trainable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from avatarctl.config import RunConfig
    from avatarctl.events import Emit
    from avatarctl.parallel.world import World

__all__ = ["build_network"]


def build_network(
    plan: StartPlan,
    cfg: RunConfig,
    device: torch.device,
    facts: Mapping[str, str],
    emit: Emit,
    world: World,
) -> tuple[Network, Mapping[str, str]]:
    """The network before its first step, and the SHA-256 of the files that it came from, by name.

    facts: what its files say of the mask; world: the processes that share it, where the settings want that.
    Raises UnusableWeights for damaged tensors, UsageError for targets or blocks that it has not,
    EnvironmentMissing for a PyTorch that cannot share.
    """
    alone = world.size == 1 or cfg.memory.shard == "none"
    if alone and cfg.memory.shard != "none":
        emit(Notice("memory.shard: there is one process, which holds the whole model"))
    if alone:
        start, trainables = _built(plan, cfg, device, emit, None)
    else:
        mesh = mesh_of(device, world.size)
        # Before it is shared each has the whole on the host, which has no room for all of them at once.
        start, trainables = world.in_turns(lambda: _built(plan, cfg, device, emit, mesh))
    emit(Notice(f"{cfg.train.mode}: {trainables.count:,} numbers are trained"))
    return Network(start.dit, start.layout, trainables, cfg, start.base, facts, device), start.sha256


def _built(
    plan: StartPlan, cfg: RunConfig, device: torch.device, emit: Emit, mesh: DeviceMesh | None
) -> tuple[Start, Trainables]:
    """mesh: of the processes that share the network, None for one that is whole."""
    dtype = torch.float32 if cfg.train.mode == "full" else dtype_of(cfg.runtime)
    swaps, in_float8 = cfg.memory.swap_blocks, cfg.memory.base_precision == "fp8"
    first = HOST if swaps or in_float8 or mesh is not None else device
    start = start_network(plan, cfg, dtype, first, emit)
    head_width: int = start.dit.config["attention_head_dim"]  # type: ignore[index, assignment]
    use_attention(start.dit, choose_attention(cfg.runtime.attention, device, dtype, head_width))
    trainables = make_trainable(start.dit, start.layout, cfg.train, cfg.runtime.seed)
    if start.pairs:
        trainables.load({**trainables.state(), **start.pairs})
    if in_float8:
        # Behind the adapters, which get the dtype of the weight below them; on the host, where there is room
        # for what is not stored yet.
        store_in_float8(start.dit)
    if swaps:
        return start, swap_blocks(start.dit, trainables, swaps, device)
    places = trainables.places(start.dit)
    if mesh is not None:
        shard(start.dit, mesh)
    elif in_float8:
        moved(start.dit, device, ())
    return start, trainables.found_again(start.dit, places)
