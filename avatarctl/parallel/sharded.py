"""Weights that the processes of a run share: each holds a part of every one, and has a whole block only while
it computes (FSDP2: `torch.distributed.fsdp.fully_shard`).

Parts are DTensors. They come together in the order in which the network is walked, so all processes have to
call it equally often. Gradients are added, as without sharding, not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from avatarctl.errors import EnvironmentMissing

__all__ = ["gathered", "is_sharded", "mesh_of", "part_like", "shard", "whole"]


def mesh_of(device: torch.device, processes: int) -> DeviceMesh:
    """All processes, which call it together. Raises EnvironmentMissing where PyTorch cannot add gradients."""
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise EnvironmentMissing(
            f"PyTorch {torch.__version__} is too old for it",
            where="memory.shard",
            fix="torch 2.13, or memory.shard none",
        )
    return init_device_mesh(device.type, (processes,))


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Spreads a network with `blocks`, the same in all processes, over them, in place; what stays here is on
    the device of this one. Its parameter objects are replaced. No process waits for another.

    Blocks are moved one by one, so the device never holds the whole.
    """
    from torch.distributed.fsdp import fully_shard

    parts: list[Any] = [*getattr(network, "blocks"), network]  # noqa: B009
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=part is not network)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # a product with one is no operation of gloo


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` was here."""
    return bool(_parts(network))


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """The whole network in every process while the block lasts, for what they do alone: within, none waits
    for another. Nothing for a network that is not sharded. All processes enter it."""
    parts = _parts(network)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not network, recurse=False)
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process has a part: all of it on the host of the main one, nothing elsewhere;
    all have to call it. Others are returned as they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else torch.empty(0)


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, which every process has, what this one holds of `like`, and where."""
    there = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return there
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def _parts(network: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in network.modules() if isinstance(module, FSDPModule)]
