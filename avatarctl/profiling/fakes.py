"""Networks of any size whose parameters are fake tensors: they cost no memory, and the code of a run works on
them unchanged (spec/building-blocks.md 10)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)

from avatarctl.errors import AvatarctlError

__all__ = ["Mode", "fill", "outside", "slots", "tensor_bytes", "tensors"]

Mode = Literal["fake", "real"]
"""Fake tensors count; real ones, of small networks, are what the count is compared with."""

_SMALL: Final = 1e-3
"""What real networks are filled with: of zeros a weight norm makes numbers that are not finite."""

DtypeOf = Callable[[str, Tensor], torch.dtype]
"""The dtype that a parameter, by its dotted name, gets."""


def slots(network: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every parameter and buffer: its dotted name, and the dictionary and key that hold it."""
    for prefix, module in network.named_modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    yield f"{prefix}.{name}" if prefix else name, held, name


def tensors(mode: Mode) -> AbstractContextManager[Any]:
    """Where tensors of this kind are made; audio, token ids and sigmas are real numbers in either. Raises
    AvatarctlError for an operator that works on real ones alone."""
    return nullcontext() if mode == "real" else _Fakes(allow_non_fake_inputs=True)


class _Fakes(FakeTensorMode):
    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, _NO_FAKE) or (isinstance(error, RuntimeError) and _UNKNOWN in str(error)):
            raise AvatarctlError(
                f"cannot be counted: {' '.join(str(error).split())[:120]} works on real numbers alone",
                where="an operator",
                fix="please report it, with the command that was typed",
            ) from error


_NO_FAKE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
_UNKNOWN = "no fake impl"
"""In the words of torch, for an operator that another library registered."""


def outside(mode: Mode) -> AbstractContextManager[Any]:
    """Where numbers are real, within `tensors`."""
    return nullcontext() if mode == "real" else unset_fake_temporarily()


def fill(
    network: nn.Module, inside: AbstractContextManager[Any], dtype_of: DtypeOf, device: str = "cpu"
) -> None:
    """Replaces every parameter and buffer on meta by small numbers, fake or real as `inside` makes them;
    device: "meta" gives them their dtype and leaves them without numbers.

    The objects are replaced, as a parameter on meta cannot be moved under a fake mode. One that is held in
    two places stays one.
    """
    made: dict[int, Tensor] = {}
    for name, held, key in slots(network):
        old = held[key]
        if id(old) not in made:
            dtype = dtype_of(name, old) if old.is_floating_point() else old.dtype
            with inside:
                value = _SMALL if old.is_floating_point() else 0
                empty = torch.full(old.shape, value, dtype=dtype, device=device)
            is_parameter = isinstance(old, nn.Parameter)
            made[id(old)] = nn.Parameter(empty, requires_grad=old.requires_grad) if is_parameter else empty
        held[key] = made[id(old)]


def tensor_bytes(network: nn.Module) -> int:
    """Of all parameters and buffers, each counted once."""
    held = {id(holder[key]): holder[key] for _, holder, key in slots(network)}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())
