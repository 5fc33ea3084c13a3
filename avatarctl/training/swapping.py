"""Frozen blocks of the transformer that wait on the host while a training step does not need them.

What is trained, and its gradients and moments, stays on the device. Frozen weights never travel back. A block
comes for its forward pass and once more when its activations are made again in the backward pass, so without
`memory.activation_checkpointing` it would stay from the one to the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from avatarctl.errors import UsageError
from avatarctl.host import HOST
from avatarctl.placement.place import in_groups
from avatarctl.placement.units import Moves

if TYPE_CHECKING:
    from avatarctl.training.trainables import Trainables

__all__ = ["swap_blocks"]

_KEY = "memory.swap_blocks"


def swap_blocks(
    dit: nn.Module,
    trainables: Trainables,
    count: int,
    device: torch.device,
    host: torch.device = HOST,
    moves: Moves | None = None,
) -> Trainables:
    """A network on the host -> the frozen weights of its last `count` blocks wait there, everything else is
    on the device; what is trained, as it is found now. moves: is told what is moved.

    Raises UsageError for more blocks than there are.
    """
    blocks = len(list(getattr(dit, "blocks", ())))
    if count > blocks:
        raise UsageError(f"{count} blocks were to leave, and the transformer has {blocks}", where=_KEY)
    places = trainables.places(dit)
    in_groups(dit, device, group=1, away=count, host=host, moves=moves, turns=True)
    return trainables.found_again(dit, places)
