"""Weights that two modules share wait on the host once, and come for either."""

from __future__ import annotations

import torch
from torch import nn

from avatarctl.loading.built_in import build_random_modules
from avatarctl.placement.place import leaf_by_leaf
from avatarctl.placement.units import Moves
from avatarctl.profiling.fakes import tensor_bytes
from avatarctl.registry import find_model


class _TwoDoors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.second = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.second.weight = self.first.weight
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


def test_a_shared_matrix_waits_once_and_comes_for_either() -> None:
    network, moves = _TwoDoors(), Moves()
    x = torch.arange(8.0)
    expected, size = network(x), tensor_bytes(network)
    leaf_by_leaf(network, torch.device("cpu"), moves=moves)
    assert moves.host_bytes == size == 2 * 8 * 8 * 4
    assert torch.equal(network(x), expected)
    assert moves.order == ["first", "between", "first"]
    assert all(each.device.type == "meta" for each in network.parameters()), "what came is gone again"


def test_the_table_of_the_text_encoder_waits_once() -> None:
    """It is the largest matrix of all, 2 GiB of the published one, and two modules hold it."""
    network, moves = build_random_modules(find_model("stableavatar-tiny")).text, Moves()
    size = tensor_bytes(network)
    largest = max(each.numel() * each.element_size() for each in network.parameters())
    leaf_by_leaf(network, torch.device("cpu"), moves=moves)
    assert moves.host_bytes < size + largest / 2, "more than packing rounds up"
