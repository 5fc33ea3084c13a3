"""Calls that are like one before, on tensors without numbers: not made again, but counted as if they were.

A step of a loop, a latent frame of the codec, a block of a network: each does the same with tensors of the
same shapes. The first call is run, and what it did is noted: the bytes that it took at most beside those that
were alive, and what it gave back. A later one with the same shapes gets results of these shapes, and the same
bytes are added to what is alive then. Where a call left anything else behind (weights on their way, a cache
that is in no list it was given), or was given what cannot be compared, it is run each time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from avatarctl.live_bytes import LiveBytes

__all__ = ["Done", "Repeats"]

_PLAIN: Final = (type(None), bool, int, float, str, torch.device, torch.dtype)
_TENSORS: Final = (Tensor, FakeTensor, torch.nn.Parameter)


class _Unknown(Exception):
    """What no signature can be made of."""


@dataclass(frozen=True)
class _View:
    """Stands for a tensor in a storage that the call made, by its place among these."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Done:
    """What a call did. result, lists: with `_View` for tensors; lists: what each list among the inputs holds
    behind it, None where that is like before; made: bytes and device of each storage; most: bytes at most
    beside those that were alive; parts: by component, less than nothing where it let go of some."""

    result: Any
    lists: tuple[Any, ...]
    made: tuple[tuple[int, torch.device], ...]
    most: int
    parts: dict[str, int]


class Repeats:
    """Of one count. live: what counts it; run, skipped: calls so far."""

    def __init__(self, live: LiveBytes) -> None:
        self._live = live
        self.run = self.skipped = 0

    def wrapped(
        self, function: Callable[..., Any], known: dict[Hashable, Done] | None = None
    ) -> Callable[..., Any]:
        """The function, run once for inputs that are alike. Nothing in it may forget the peak of `live`.

        known: what several functions that do the same share.
        """
        known = {} if known is None else known

        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return function(*args, **kwargs)
            try:
                inputs = _Inputs((args, kwargs), self._live)
            except _Unknown:
                return function(*args, **kwargs)
            if inputs.signature in known:
                self.skipped += 1
                return self._again(known[inputs.signature], (args, kwargs))
            live, outer, outer_parts = self._live, self._live.peak, self._live.at_peak
            live.reset_peak()
            before, before_parts = live.current, live.at_peak
            result = function(*args, **kwargs)
            self.run += 1
            most, parts = live.peak - before, _added(live.at_peak, before_parts, -1)
            live.raise_peak(outer, outer_parts, first=True)
            done = inputs.done(result, (args, kwargs), most, parts, live.current - before)
            if done is not None:
                known[inputs.signature] = done
            return result

        return call

    def _again(self, done: Done, inputs: Any) -> Any:
        live = self._live
        live.raise_peak(live.current + done.most, _added(live.parts, done.parts))
        changed = [
            (held, new) for held, new in zip(_lists(inputs), done.lists, strict=True) if new is not None
        ]
        for held, _ in changed:
            held.clear()  # before anything is made: the call let go of it, too
        made = [torch.empty(size, dtype=torch.uint8, device=place) for size, place in done.made]

        def tensor(view: _View) -> Tensor:
            return made[view.storage].view(view.dtype).as_strided(view.shape, view.stride, view.offset)

        for held, new in changed:
            held.extend(_mapped(new, tensor, _View))
        return _mapped(done.result, tensor, _View)


class _Inputs:
    """signature: of everything, which tensors are one or share a storage included. It holds none of them."""

    def __init__(self, inputs: Any, live: LiveBytes) -> None:
        self._live = live
        self._storages: dict[int, int] = {}  # by address: the place
        self._tensors: dict[int, int] = {}  # by id
        self._watched: list[tuple[Callable[[], Any], int]] = []  # a weak reference, and the bytes of it
        self.signature = _signature(inputs, self._of_tensor)
        self._lists = [_signature(held, _layout) for held in _lists(inputs)]

    def _of_tensor(self, tensor: Tensor) -> Hashable:
        storage = tensor.untyped_storage()
        place = self._storages.setdefault(storage._cdata, len(self._storages))
        if place == len(self._watched):
            self._watched.append(self._live.watched(storage))
        of = self._live.name_of(storage)  # which is less when the call lets go of it
        return place, self._tensors.setdefault(id(tensor), len(self._tensors)), of, _layout(tensor)

    def done(self, result: Any, inputs: Any, most: int, parts: dict[str, int], more: int) -> Done | None:
        """None for a call that changed more than its result and its lists, or gave back what it was given.
        most, parts: as of `Done`; more: bytes alive since it began."""
        made: dict[int, tuple[torch.UntypedStorage, torch.device]] = {}  # of a fake, the storage is on meta

        def view(tensor: Tensor) -> _View:
            storage = tensor.untyped_storage()
            if self._is_there(storage):
                raise _Unknown
            made.setdefault(storage._cdata, (storage, tensor.device))
            place = list(made).index(storage._cdata)
            return _View(
                place, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype
            )

        lists = list(_lists(inputs))
        try:
            changed = [
                before != _signature(held, _layout) for before, held in zip(self._lists, lists, strict=True)
            ]
            shown = _mapped(result, view)
            written = tuple(
                _mapped(list(held), view) if other else None
                for held, other in zip(lists, changed, strict=True)
            )
        except (_Unknown, ValueError):  # of another kind; or other lists than before
            return None
        storages = tuple((each.nbytes(), place) for each, place in made.values())
        like_before = [held for held, other in zip(lists, changed, strict=True) if not other]
        replaced = {each._cdata: each for each in map(Tensor.untyped_storage, _tensors(like_before))}
        fresh = [each for each, _ in made.values()]
        fresh += [each for key, each in replaced.items() if key not in made and not self._is_there(each)]
        freed = sum(size for held, size in self._watched if held() is None)
        if more != sum(self._live.watched(each)[1] for each in fresh) - freed:
            return None
        return Done(shown, written, storages, most, parts)

    def _is_there(self, storage: torch.UntypedStorage) -> bool:
        """Whether it is one of the inputs': an address may be another's, once these have gone."""
        place = self._storages.get(storage._cdata)
        return place is not None and self._watched[place][0]() is not None


def _added(some: dict[str, int], more: dict[str, int], sign: int = 1) -> dict[str, int]:
    sums = {name: some.get(name, 0) + sign * more.get(name, 0) for name in {**some, **more}}
    return {name: size for name, size in sums.items() if size}


def _layout(tensor: Tensor) -> Hashable:
    """Where in its storage it lies matters to nobody: slices of a video are alike."""
    size = tensor.untyped_storage().nbytes()
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, size


def _signature(value: Any, of_tensor: Callable[[Tensor], Hashable]) -> Hashable:
    if isinstance(value, Tensor):
        if type(value) not in _TENSORS:
            raise _Unknown
        return of_tensor(value)
    if isinstance(value, _PLAIN):
        return type(value), value
    return type(value), tuple((name, _signature(each, of_tensor)) for name, each in _members(value))


def _members(value: Any) -> Iterator[tuple[Any, Any]]:
    """Of what holds others, by name or place. Raises _Unknown for what is of another kind."""
    if type(value) in (list, tuple, torch.Size):
        yield from enumerate(value)
    elif type(value) is dict:
        yield from value.items()
    elif is_dataclass(value) and not isinstance(value, (type, dict)):
        yield from ((each.name, getattr(value, each.name)) for each in fields(value))
    else:
        raise _Unknown


def _mapped(value: Any, of_tensor: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """The same structure with something else in place of each object of a kind."""
    if isinstance(value, kind):
        return of_tensor(value)
    if isinstance(value, _PLAIN):
        return value
    members = {name: _mapped(each, of_tensor, kind) for name, each in _members(value)}
    if type(value) is list:
        return list(members.values())
    if isinstance(value, tuple):
        return tuple(members.values())
    return members if type(value) is dict else replace(value, **members)


def _tensors(value: Any) -> Iterator[Tensor]:
    """In the order of a signature."""
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, _PLAIN):
        for _, each in _members(value):
            yield from _tensors(each)


def _lists(value: Any) -> Iterator[list[Any]]:
    """Of the inputs, those inside others not included."""
    if type(value) is list:
        yield value
    elif not isinstance(value, (Tensor, *_PLAIN)):
        for _, each in _members(value):
            yield from _lists(each)
