"""Muon: momentum whose matrix is made orthogonal before it is applied (K. Jordan and others, 2024).

At an equal number of steps it takes the VAE of the cartoon world from 15.0 to 17.2 dB
(spec/cartoon-world.md 3).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon", "orthogonal"]

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the odd polynomial of a Newton-Schulz step that draws singular values to about 1;
Jordan's."""


class Muon(torch.optim.Optimizer):
    """For weights of two axes or more; a kernel is a matrix [out, everything else]."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """closure: never called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)  # Nesterov's
                # A tall matrix moves as far per output as a wide one.
                size = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
                parameter.add_(orthogonal(ahead).view(parameter.shape), alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix [m, n] with orthonormal rows or columns, roughly: singular values of 0.7 to 1.2."""
    a, b, c = _QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
