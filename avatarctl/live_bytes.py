"""How many bytes of tensors are alive, now and at most, exactly and on any machine.

`LiveBytes` counts storages, not tensors: it sees every result of every operation through a
`TorchDispatchMode`, adds a storage when it first appears and subtracts it when the storage itself is
freed, whoever held it last (a variable, autograd's saved tensors, a cache). That makes it exact on real
CPU tensors and on `FakeTensor`s alike, where no allocator exists that could be asked.

    with LiveBytes() as live:
        live.track(model)                    # what existed before
        loss = model(x).mean(); loss.backward()
    print(live.peak)

`LiveBytes(limit=bytes)` is a card of that size: the operation that passes it raises `OverLimit`, as torch
does where a card is full. So a plan is tried before anybody has the card.

On fake tensors enter it inside the fake mode: `with FakeTensorMode(), LiveBytes() as live`.

What waits on the host (`host.to_host`) is counted apart, as `host` and `host_peak`, even where the host and
the device are one memory.

Each storage belongs to a `Component`: that of `charge` when it was made, or another by `assign` and `track`;
what waits on the host, and copies of it, to what it was marked as. `at_peak` says of what the peak was made.

What it does not see: kernels' workspaces, allocator rounding and fragmentation, and
`Tensor.untyped_storage().resize_()` until the next operation that touches that storage. Memory shared
with numpy (`torch.from_numpy`) counts for as long as the tensor lives, once per such tensor. Sparse
tensors are refused by torch itself (`NotImplementedError`): they have no storage.

Process memory is another quantity (`process_peak_bytes`): it counts code, file buffers and what the
allocator keeps after tensors have died. glibc keeps so much of it that a resident-set curve says little
about our own lifetimes. A benchmark that claims flat process memory therefore starts its child with
`MALLOC_TRIM_THRESHOLD_=0 MALLOC_MMAP_THRESHOLD_=65536` in the environment, so that freed blocks go back
to the system at once; the product never sets these, as they cost time.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from avatarctl.errors import NotYetSupported
from avatarctl.host import is_of_host, waits_as

__all__ = ["Component", "LiveBytes", "OverLimit", "process_peak_bytes"]

# Builds its result outside the dispatcher and shows it only here, so its input is new as well.
_FRESH_FROM_PYTHON = torch.ops.aten.lift_fresh.default


class OverLimit(torch.OutOfMemoryError):
    """A limit of `LiveBytes` was passed. operation: which did it; place: "device" or "host"; needed, limit:
    bytes that are alive with its result, and that were allowed there."""

    def __init__(self, operation: str, place: str, needed: int, limit: int) -> None:
        super().__init__(f"{operation} needs {needed:,} bytes of the {place}, and the limit is {limit:,}")
        self.operation, self.place, self.needed, self.limit = operation, place, needed, limit


class Component:
    """What storages are for, and the bytes of those that are alive. Its name may change while they live."""

    __slots__ = ("device", "host", "name")

    def __init__(self, name: str) -> None:
        self.name, self.device, self.host = name, 0, 0


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that operations create while the mode is entered.

    Views, in-place results, `detach()` and aliases share a storage, which counts once. Tensors that
    existed before are not counted, and neither are their views, unless given to `track`. Storages that
    were counted are still subtracted when they die after the mode has been left.

    A dispatch mode belongs to the thread that entered it (the backward pass takes it along into
    autograd's own threads): work of other threads is not counted, and one object serves one thread.
    A storage may be freed in any thread.

    limit, host_limit: bytes that may be alive on the device and wait on the host, None for any number. An
    operation runs, and what passes a limit with its result raises OverLimit in its place.
    """

    def __init__(self, limit: int | None = None, host_limit: int | None = None) -> None:
        super().__init__()
        self._limits = {"device": limit, "host": host_limit}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sizes: dict[int, tuple[int, bool, Component]] = {}
        # A finalizer may run between any two bytecodes and in any thread: it only appends here.
        self._dead: deque[int] = deque()
        self._current = self._host = 0
        self._peak = self._host_peak = 0
        self._components: list[Component] = []
        self._named: dict[str, Component] = {}
        self._charged = self._component("made")
        self._at_peak: dict[str, int] = {}
        self._host_at_peak: dict[str, int] = {}

    @property
    def current(self) -> int:
        """Bytes of all counted storages that are alive, of those on the device."""
        self._settle()
        return self._current

    @property
    def host(self) -> int:
        """Bytes of those that wait on the host."""
        self._settle()
        return self._host

    @property
    def host_peak(self) -> int:
        """The largest `host` after any operation since the start."""
        return self._host_peak

    @property
    def peak(self) -> int:
        """The largest `current` after any operation since the start or the last `reset_peak`."""
        return self._peak

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of the device by component, now."""
        self._settle()
        return self._of_device()

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes by component when `peak` was reached first; their sum."""
        return self._at_peak

    @property
    def host_at_peak(self) -> dict[str, int]:
        """Of the host, when `host_peak` was."""
        return self._host_at_peak

    def charge(self, component: Component) -> Component:
        """What is made from now on belongs to a component; returns the one that it did before."""
        before, self._charged = self._charged, component
        self._components = [each for each in self._components if each.device or each.host]
        if component not in self._components:
            self._components.append(component)
        return before

    def assign(self, things: Any, name: str) -> None:
        """Tensors and modules, as `track` takes them, belong to the component of this name; what is not
        counted, and what waits on the host, stays as it is."""
        self._settle()
        component = self._component(name)
        for storage in _all_storages(things):
            size, on_host, before = self._sizes.get(storage._cdata, (0, True, component))
            if not on_host and before is not component:
                self._add(size, False, before, sign=-1)
                self._add(size, False, component)
                self._sizes[storage._cdata] = size, False, component

    def reset_peak(self) -> None:
        """Let `peak` start again from what is alive now."""
        self._peak = self.current
        self._at_peak = self._of_device()

    def raise_peak(self, size: int, parts: dict[str, int], *, first: bool = False) -> None:
        """`peak` is at least `size` from now on: of work that is known and not done again. parts: `at_peak`
        of it. first: it was reached before the peak that is known."""
        if size > self._peak or (first and size == self._peak):
            self._peak, self._at_peak = size, parts

    def name_of(self, storage: torch.UntypedStorage) -> str | None:
        """Of the component that it belongs to; None for one that is not counted."""
        self._settle()
        found = self._sizes.get(storage._cdata)
        return None if found is None else found[2].name

    def watched(self, storage: torch.UntypedStorage) -> tuple[weakref.ref[torch.UntypedStorage], int]:
        """What tells whether a storage is alive, and the bytes of the device that are counted of it: 0 of one
        that is not counted."""
        self._settle()
        size, on_host, _ = self._sizes.get(storage._cdata, (0, True, None))
        return weakref.ref(storage), 0 if on_host else size

    def track(self, *things: Any, name: str = "before") -> int:
        """Count what existed before, and return the bytes that were added.

        things: modules (parameters, buffers and gradients), tensors, or nested lists, tuples and dicts
                of them. What is counted already is not counted again.
        name:   of the component that all of them belong to from now on.

        Raises OverLimit.
        """
        self._settle()
        before = self._current
        for storage in _all_storages(things):
            self._count(storage)
        self.assign(things, name)
        self._note_peak()
        self._refuse("track")
        return self._current - before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata: storage for storage in _held((args, kwargs))}
        result = func(*args, **kwargs)
        self._settle()
        for key, storage in given.items():
            if key in self._alive or func is _FRESH_FROM_PYTHON or is_of_host(storage):
                self._count(storage)  # measured again: `resize_` or a mark may have changed it
        came = next((what for each in given.values() if (what := waits_as(each)) is not None), None)
        for storage in _held((result,)):
            if storage._cdata not in given:
                self._count(storage, came)
        self._note_peak()
        self._refuse(func)
        return result

    def _note_peak(self) -> None:
        if self._current > self._peak:
            self._peak, self._at_peak = self._current, self._of_device()
        if self._host > self._host_peak:
            self._host_peak = self._host
            self._host_at_peak = _summed((each.name, each.host) for each in self._components)

    def _of_device(self) -> dict[str, int]:
        return _summed((each.name, each.device) for each in self._components)

    def _component(self, name: str) -> Component:
        """The one of this name that belongs to no phase."""
        found = self._named.setdefault(name, Component(name))
        if found not in self._components:
            self._components.append(found)
        return found

    def _refuse(self, operation: Any) -> None:
        for place, alive in (("device", self._current), ("host", self._host)):
            limit = self._limits[place]
            if limit is not None and alive > limit:
                raise OverLimit(str(operation), place, alive, limit)

    def _count(self, storage: torch.UntypedStorage, came: str | None = None) -> None:
        """came: what it is a copy of, where that waits on the host."""
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, partial(_bury, self._dead, key))
        before = self._sizes.get(key)
        waits = waits_as(storage)
        name = came if waits is None else waits
        if name is not None:
            component = self._component(name)
        else:
            component = self._charged if before is None else before[2]
        now = storage.nbytes(), waits is not None, component
        if before != now:
            self._sizes[key] = now
            if before is not None:
                self._add(*before, sign=-1)
            self._add(*now)

    def _add(self, size: int, on_host: bool, component: Component, sign: int = 1) -> None:
        if not (component.device or component.host) and component not in self._components:
            self._components.append(component)
        if on_host:
            self._host += sign * size
            component.host += sign * size
        else:
            self._current += sign * size
            component.device += sign * size

    def _settle(self) -> None:
        """Subtract what has died. Must run before any key is looked up: addresses are used again."""
        while self._dead:
            key = self._dead.popleft()
            del self._alive[key]
            self._add(*self._sizes.pop(key), sign=-1)


def _bury(dead: deque[int], key: int, _: object) -> None:
    dead.append(key)


def _tensors_of_module(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    for parameter in module.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from module.buffers()


def _all_storages(things: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(things):
        tensors = _tensors_of_module(leaf) if isinstance(leaf, torch.nn.Module) else [leaf]
        for tensor in tensors:
            yield from _storages(tensor)


def _summed(parts: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, size in parts:
        if size:
            found[name] = found.get(name, 0) + size
    return found


def _held(things: Iterable[object]) -> Iterator[torch.UntypedStorage]:
    """The storages in the inputs or results of an operation: tensors, and lists, tuples and dictionaries of
    them. `tree_leaves` finds the same and takes as long as a small operation."""
    for thing in things:
        if isinstance(thing, (torch.Tensor, torch.UntypedStorage)):
            yield from _storages(thing)
        elif isinstance(thing, (list, tuple)):
            yield from _held(thing)
        elif isinstance(thing, dict):
            yield from _held(thing.values())


def _storages(leaf: object) -> Iterator[torch.UntypedStorage]:
    """The storages behind a leaf: several for a wrapper such as DTensor; of meta tensors those that stand for
    what waits on the host."""
    if isinstance(leaf, torch.UntypedStorage):
        yield leaf
    elif is_traceable_wrapper_subclass(leaf):
        names, _ = leaf.__tensor_flatten__()
        for name in names:
            yield from _storages(getattr(leaf, name))
    elif isinstance(leaf, torch.Tensor):
        storage = leaf.untyped_storage()
        if leaf.device.type != "meta" or is_of_host(storage):
            yield storage


def process_peak_bytes() -> int:
    """The largest resident set that this process has had since it started, in bytes.

    Linux: `VmHWM` of /proc/self/status, which lags by a few hundred KiB. `getrusage` is not used there:
    its `ru_maxrss` survives `exec`, so a small child of a large process reports the size of its parent.
    macOS and other Unix systems: `ru_maxrss` of `getrusage` (bytes on macOS, KiB elsewhere).
    Windows: raises `NotYetSupported`.
    """
    if sys.platform == "win32":
        raise NotYetSupported("peak process memory is not measured on Windows")
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
        if found is None:
            raise NotYetSupported("this kernel does not report VmHWM", where="/proc/self/status")
        return int(found[1]) * 1024
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
