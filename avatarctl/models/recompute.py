"""Activations that are made again in the backward pass instead of kept, with their inputs on the device or on
the host meanwhile.

PyTorch's own checkpoint keeps the inputs of a call where they are. Here they may leave, which is why this is
written out. Nothing that is called so may draw random numbers or change its inputs in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from avatarctl.host import to_device, to_host

__all__ = ["again"]


def again(function: Callable[..., Any], *inputs: Any, host: torch.device | None = None) -> Any:
    """`function(*inputs)`, a tensor or a tuple of tensors and other things; its activations are forgotten and
    made again for the backward pass, with the same numbers.

    Parameters inside get their gradients as in a plain call, whether or not an input has one. host: where the
    first input waits until then, None for the device; the others stay, as they are small or shared by calls.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    device = next(each.device.type for each in inputs if isinstance(each, Tensor))
    # A function of autograd gets a gradient only if an input of it wants one.
    stub = torch.empty(0, requires_grad=True, device=inputs[0].device)
    return _Again.apply(function, host, (torch.is_autocast_enabled(device), device), stub, *inputs)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Any],
        host: torch.device | None,
        autocast: tuple[bool, str],
        stub: Tensor,
        *inputs: Any,
    ) -> Any:
        ctx.function = function
        enabled, device = autocast
        ctx.autocast = (device, torch.get_autocast_dtype(device), enabled)
        ctx.set_materialize_grads(False)
        first, *others = inputs
        ctx.away = None if host is None else to_host(first, host)
        ctx.device = first.device
        ctx.wanted = ctx.needs_input_grad[4:]
        kept = others if host is not None else inputs
        ctx.places = [index for index, each in enumerate(kept) if isinstance(each, Tensor)]
        ctx.plain = [None if isinstance(each, Tensor) else each for each in kept]
        ctx.save_for_backward(*(each for each in kept if isinstance(each, Tensor)))
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        inputs = list(ctx.plain)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[place] = tensor
        if ctx.away is not None:
            inputs.insert(0, to_device(ctx.away, ctx.device))
            ctx.away = None
        inputs = [
            each.detach().requires_grad_(wants) if isinstance(each, Tensor) else each
            for each, wants in zip(inputs, ctx.wanted, strict=True)
        ]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            made = ctx.function(*inputs)
        outputs = made if isinstance(made, tuple) else (made,)
        _backward(outputs, gradients)
        del made, outputs
        return (None, None, None, None, *(each.grad if isinstance(each, Tensor) else None for each in inputs))


def _backward(outputs: Sequence[Any], gradients: Sequence[Tensor | None]) -> None:
    pairs = [
        (output, gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if isinstance(output, Tensor) and output.requires_grad and gradient is not None
    ]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
