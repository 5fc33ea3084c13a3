"""The network of a run: its start, what of it is trained, and every weight where the settings want it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from avatarctl.events import Notice
from avatarctl.models.attention import choose_attention, use_attention
from avatarctl.models.device import dtype_of
from avatarctl.models.fp8 import store_in_float8
from avatarctl.parallel.sharded import shard
from avatarctl.placement.place import HOST, moved
from avatarctl.training.network import Network
from avatarctl.training.start import StartPlan, start_network
from avatarctl.training.swapping import swap_blocks
from avatarctl.training.trainables import make_trainable

if TYPE_CHECKING:
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
    dtype = torch.float32 if cfg.train.mode == "full" else dtype_of(cfg.runtime)
    swaps, in_float8 = cfg.memory.swap_blocks, cfg.memory.base_precision == "fp8"
    sharded = cfg.memory.shard == "fsdp2" and world.size > 1
    if cfg.memory.shard == "fsdp2" and not sharded:
        emit(Notice("memory.shard: there is one process, which holds the whole model"))
    start = start_network(plan, cfg, dtype, HOST if swaps or in_float8 or sharded else device, emit)
    head_width: int = start.dit.config["attention_head_dim"]  # type: ignore[index, assignment]
    use_attention(start.dit, choose_attention(cfg.runtime.attention, device, dtype, head_width))
    trainables = make_trainable(start.dit, start.layout, cfg.train, cfg.runtime.seed)
    if start.pairs:
        trainables.load({**trainables.state(), **start.pairs})
    places = trainables.places(start.dit)
    if in_float8:
        # Behind the adapters, which get the dtype of the weight below them; on the host, where there is room
        # for what is not stored yet.
        store_in_float8(start.dit)
    if swaps:
        trainables = swap_blocks(start.dit, trainables, swaps, device)
    elif sharded:
        shard(start.dit, device, world.size)
        trainables = trainables.found_again(start.dit, places)
    elif in_float8:
        moved(start.dit, device, ())
        trainables = trainables.found_again(start.dit, places)
    emit(Notice(f"{cfg.train.mode}: {trainables.count:,} numbers are trained"))
    return Network(start.dit, start.layout, trainables, cfg, start.base, facts, device), start.sha256
