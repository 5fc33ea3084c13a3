"""Frozen linear weights stored in eight bits; everything is computed as before.

    W  ~  scale * Q        Q float8_e4m3fn [outputs, inputs], scale [outputs, 1]

A layer widens its own weight for the time of its call, in the dtype that the weight had, so that a network
needs half of bfloat16's bytes and one layer more. What is added to or multiplied with activations (norms,
tables, biases) keeps its precision, and so do the layers that `_skip_layerwise_casting_patterns` names.

One scale for each output channel, as rows of a matrix differ in size and one large row must not cost the
others their small numbers. It is a power of two: float8 has the same relative precision at every size
(3 bits behind the point, 2^-6 to 448; Micikevicius et al. 2022, "FP8 formats for deep learning", table 1), so
a finer scale would win nothing, and a power of two makes widening exact in bfloat16: no second rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Float8Linear", "is_float8_layer", "store_in_float8", "store_layer"]

STORED: Final = torch.float8_e4m3fn
_LARGEST: Final = torch.finfo(STORED).max
_SMALLEST_EXPONENT: Final = -100
"""Of a scale: smaller ones would leave the range of bfloat16 and float32 when they are divided by."""


class Float8Linear(nn.Linear):
    """A linear layer whose frozen weight is float8; `weight_scale` [outputs, 1] has the dtype that it
    computes in. Made of an `nn.Linear` by `store_layer`."""

    weight_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        out: Tensor = _Widened.apply(input, self.weight, self.weight_scale, self.bias)
        return out


class _Widened(torch.autograd.Function):
    """F.linear with a gradient for its input (and bias) alone. What is kept for the backward pass is the
    stored weight: the widened one of every layer together would be the network in full."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _widened(weight, scale), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        weight, scale = ctx.saved_tensors
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = gradient.matmul(_widened(weight, scale).to(gradient.dtype))
        if ctx.needs_input_grad[3]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_x, None, None, of_bias


def _widened(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.to(scale.dtype).mul_(scale)


def is_float8_layer(network: nn.Module, name: str) -> bool:
    """Whether the weight of a module, by its dotted name, may be stored in float8: linear layers of the
    blocks, those excepted that the network's class names. What is trained is never stored."""
    if not name.startswith("blocks."):
        return False  # embeddings and the head: two in a hundred numbers of 14B, and all tokens pass them
    patterns = getattr(network, "_skip_layerwise_casting_patterns", None) or ()
    module = network.get_submodule(name)
    is_frozen = isinstance(module, nn.Linear) and not module.weight.requires_grad
    return is_frozen and not any(re.search(pattern, name) for pattern in patterns)


def store_in_float8(network: nn.Module) -> nn.Module:
    """Stores every layer that `is_float8_layer` allows, in place; returns the network.

    Tensors may be real, fake or on meta. Adapters are added before: peft gives them the dtype of the weight
    below them (spec/building-blocks.md 5).
    """
    for module in list(_layers(network)):
        store_layer(module)
    return network


def store_layer(layer: nn.Linear) -> None:
    """One layer, in place; its weight must be finite. Nothing for a layer that is stored already."""
    if isinstance(layer, Float8Linear):
        return
    weight = layer.weight.detach()
    scale = _scale(weight)
    layer.__class__ = Float8Linear
    layer.weight = nn.Parameter((weight / scale).to(STORED), requires_grad=False)
    layer.register_parameter("weight_scale", nn.Parameter(scale, requires_grad=False))


def _layers(network: nn.Module) -> Iterator[nn.Linear]:
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and is_float8_layer(network, name):
            yield module


def _scale(weight: Tensor) -> Tensor:
    """The smallest power of two for each row by which its largest number comes down to float8's range."""
    largest = weight.abs().amax(1, keepdim=True).float() / _LARGEST
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa 2^exponent, 0.5 <= mantissa < 1, or zero
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=_SMALLEST_EXPONENT)
    return torch.ldexp(torch.ones_like(largest), exponent).to(weight.dtype)
