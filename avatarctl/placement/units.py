"""Weights that wait on the host, packed, and come to the device for one forward.

They are frozen, so they never travel back: a unit that leaves is forgotten on the device. Parameter objects
are replaced, never moved (`.to` and `.data` break under fake tensors), so what autograd has saved stays what
it was until it is used.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from avatarctl.host import mark

__all__ = ["WEIGHTS", "Moves", "Unit", "Visits", "leaves"]

WEIGHTS: Final = "weights that come and go"
"""What the packed buffers are, for whoever counts."""

_ALIGNED: Final = 64
"""Bytes between the places of two tensors in a buffer, as an allocator would give them: kernels may sum in
another order where a tensor begins elsewhere."""

_META: Final = torch.device("meta")


@dataclass
class Moves:
    """What was moved, for whoever asks. host_bytes: held there, packed; host_peak: at most so far; largest:
    of what was held, the largest unit, which is there twice while it is packed; pinned_peak: at most so far
    that was locked for a GPU; unpinned_bytes: what the system would not lock for one."""

    copies: int = 0
    copied_bytes: int = 0
    host_bytes: int = 0
    host_peak: int = 0
    largest: int = 0
    pinned_bytes: int = 0
    pinned_peak: int = 0
    unpinned_bytes: int = 0
    order: list[str] = field(default_factory=list)

    def hold(self, size: int, pinned: int) -> None:
        """Counts what is held on the host, and how much of it is pinned; negative where it is forgotten."""
        self.host_bytes += size
        self.host_peak = max(self.host_peak, self.host_bytes)
        self.pinned_bytes += pinned
        self.pinned_peak = max(self.pinned_peak, self.pinned_bytes)
        self.largest = max(self.largest, size)


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in the buffer of its dtype: in elements."""

    holder: dict[str, Any]
    name: str
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Unit:
    """The frozen parameters of some modules, packed by dtype.

    host: where they wait; "meta" counts, with fake tensors. device: where they compute. What is trained, and
    buffers, are not the unit's.
    """

    def __init__(
        self, name: str, modules: Sequence[nn.Module], device: torch.device, host: torch.device, moves: Moves
    ) -> None:
        self.name, self.device, self._moves = name, device, moves
        self._places: list[tuple[_Place, ...]] = []
        self._waiting: dict[torch.dtype, Tensor] = {}
        self._arrived: dict[torch.dtype, Tensor] | None = None
        self._event: Any = None
        self.left: Any = None
        """On a GPU an event behind the last computation with these weights."""
        pinned = self._pack(modules, host)
        weakref.finalize(self, moves.hold, -self.nbytes, -pinned)
        self.leave()

    @property
    def nbytes(self) -> int:
        """Of the packed buffers."""
        return sum(flat.numel() * flat.element_size() for flat in self._waiting.values())

    @property
    def is_here(self) -> bool:
        """Whether it is on the device, or on its way."""
        return self._arrived is not None

    def start(self, stream: Any = None) -> None:
        """Begins the copy; on a GPU beside what computes."""
        if self._arrived is not None:
            return
        if stream is None:
            self._arrived = {dtype: _copied(flat, self.device) for dtype, flat in self._waiting.items()}
        else:
            with torch.cuda.stream(stream):
                self._arrived = {dtype: _copied(flat, self.device) for dtype, flat in self._waiting.items()}
                self._event = stream.record_event()
        self._moves.copies += 1
        self._moves.copied_bytes += self.nbytes
        self._moves.order.append(self.name)

    def arrive(self) -> None:
        """Puts the weights in, whether or not the copy was begun before."""
        self.start()
        assert self._arrived is not None
        if self._event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self._event)
            for flat in self._arrived.values():
                flat.record_stream(current)
            self._event = None
        for places in self._places:
            views = {}
            for place in places:
                flat = self._arrived[place.dtype]
                views[place.offset] = flat.as_strided(place.shape, place.stride, place.offset)
            parameters = {offset: nn.Parameter(view, requires_grad=False) for offset, view in views.items()}
            for place in places:
                place.holder[place.name] = parameters[place.offset]

    def leave(self) -> None:
        """Takes the weights out; what autograd saved of them stays alive by itself."""
        for places in self._places:
            for place in places:
                empty = torch.empty(place.shape, dtype=place.dtype, device=_META)
                place.holder[place.name] = nn.Parameter(empty, requires_grad=False)
        if self._arrived is not None:
            self.left = _event(self.device)
        self._arrived = self._event = None

    def _pack(self, modules: Sequence[nn.Module], host: torch.device) -> int:
        """Fills the buffers. Returns how many of their bytes are pinned."""
        pinned = 0
        found: dict[int, list[tuple[dict[str, Any], str]]] = {}
        tensors: dict[int, nn.Parameter] = {}
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.requires_grad:
                    found.setdefault(id(parameter), []).append((module._parameters, name))
                    tensors[id(parameter)] = parameter
        ends: dict[torch.dtype, int] = {}
        where: dict[int, int] = {}
        for key, parameter in tensors.items():
            step = _ALIGNED // parameter.element_size()
            offset = -(-ends.get(parameter.dtype, 0) // step) * step
            where[key], ends[parameter.dtype] = offset, offset + parameter.numel()
        for dtype, length in ends.items():
            self._waiting[dtype] = flat = _room(length, dtype, host)
            mark(flat, WEIGHTS)
            flat.detach()  # an operation: whoever counts sees the mark
            size, locked = length * dtype.itemsize, 0
            if self.device.type == "cuda" and host.type == "cpu":
                locked = size if _locked(flat) else 0
                self._moves.unpinned_bytes += size - locked
            self._moves.hold(size, locked)
            pinned += locked
        for key, parameter in tensors.items():
            flat, offset = self._waiting[parameter.dtype], where[key]
            stride = parameter.stride()
            if parameter.device.type != "meta":
                with torch.no_grad():
                    flat.as_strided(parameter.shape, stride, offset).copy_(parameter)
            self._places.append(
                tuple(
                    _Place(holder, name, offset, parameter.shape, stride, parameter.dtype)
                    for holder, name in found[key]
                )
            )
        return pinned


def _room(length: int, dtype: torch.dtype, host: torch.device) -> Tensor:
    """A buffer on the host.

    On a real host it is made outside of what counts live bytes: `Moves` counts it, so that host and device
    are told apart on a CPU as well.
    """
    if host.type == "cpu":
        with _disable_current_modes():
            return torch.empty(length, dtype=dtype, device=host)
    return torch.empty(length, dtype=dtype, device=host)


def _locked(flat: Tensor) -> bool:
    """Whether the system locks a buffer for a card: a copy from it then goes on beside what computes.

    It is registered as it is. The allocator of pinned memory would round each up to a power of two: 40 GiB
    for the 26 of 14B (c10 `AllocatorConfig`, spec/building-blocks.md 5).
    """
    if not flat.numel():
        return True
    runtime, place = _cuda_runtime(), flat.data_ptr()
    if int(runtime.cudaHostRegister(place, flat.numel() * flat.element_size(), 0)):
        _forget_error()
        return False
    weakref.finalize(flat.untyped_storage(), _unlock, runtime, place)
    return True


def _unlock(runtime: Any, place: int) -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a copy may be under way
    runtime.cudaHostUnregister(place)


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()


def _forget_error() -> None:
    """What failed is known; torch would tell it of the next kernel, as if that had run out of memory."""
    try:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        pass


def _event(device: torch.device) -> Any:
    """Behind what the device was told to compute so far; None where it has done that already."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _copied(flat: Tensor, device: torch.device) -> Tensor:
    """A real copy, where host and device are the same as well."""
    return flat.to(device, non_blocking=True, copy=True)


class Visits:
    """Units of one network that come for the forward of their modules and leave behind it, in the order in
    which the network calls them. ahead: how many of the next ones are under way meanwhile. turns: passes end
    at the last unit and come back, as a backward pass does that computes activations again; else the first
    unit follows the last.

    doors: of each unit the first and the last module that is called.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        doors: Sequence[tuple[nn.Module, nn.Module]],
        ahead: int,
        turns: bool = False,
    ) -> None:
        self._units, self._ahead, self._turns = units, min(ahead, len(units) - 1), turns
        device = units[0].device if units else torch.device("cpu")
        self._last: Any = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and ahead else None
        for index, (first, last) in enumerate(doors):
            first.register_forward_pre_hook(self._opening(index))
            last.register_forward_hook(self._closing(index), always_call=True)

    def _opening(self, index: int) -> Any:
        def come(module: nn.Module, inputs: Any) -> None:
            self._units[index].arrive()
            for step in range(1, self._ahead + 1):
                place = index - step if self._turns and _is_backward() else index + step
                if not self._turns or 0 <= place < len(self._units):
                    self._wait()
                    self._units[place % len(self._units)].start(self._stream)

        return come

    def _closing(self, index: int) -> Any:
        def go(module: nn.Module, inputs: Any, output: Any) -> None:
            self._units[index].leave()
            self._last = self._units[index].left

        return go

    def _wait(self) -> None:
        """Until the card is done with the unit that left last. The program is far ahead of a card: without
        this each copy would get memory of its own, as none is free yet."""
        if self._last is not None:
            self._last.synchronize()
            self._last = None


def _is_backward() -> bool:
    """Whether autograd is walking back in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def leaves(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters of their own."""
    for name, module in network.named_modules():
        if any(each is not None for each in module._parameters.values()):
            yield name, module
