"""The processes of one run: which one this is, and what they tell each other.

Numbers of a step, errors and the wish to stop are small and travel as Python objects between CPUs (gloo).
Gradients are added by the backend of their device. A process that reads, computes or fails alone does so
between these exchanges, inside `together`, so that all end alike where one cannot go on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

from avatarctl.errors import AvatarctlError, EnvironmentMissing, Interrupted, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ProcessLost", "World", "waiting_within"]

Value = TypeVar("Value")

_PATIENCE: Final = timedelta(hours=2)
"""The longest that one process may be behind another, as while a large checkpoint is written. A process that
died is noticed at once: its connections are closed."""
_BUCKET: Final = 1 << 24
"""Numbers that are added at once: hundreds of small adapters would each wait for the network."""


_OF_A_CONNECTION: Final = re.compile(r"gloo|nccl", re.IGNORECASE)
"""In the words of the two that carry tensors: not every version gives their errors a class."""


class ProcessLost(Interrupted):
    """Another process of the run is gone."""


@dataclass
class World:
    """rank: of this process among `size`; local: its number on this machine, and that of its card; agreed:
    the error that ends all of them. As it is made here it is a process alone."""

    rank: int = 0
    size: int = 1
    local: int = 0
    agreed: AvatarctlError | None = field(default=None, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, and talks to people."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """`runtime.device` for this process: its own card. Raises UsageError for one card for all."""
        if self.size == 1 or name == "cpu":
            return name
        if ":" in name:
            raise UsageError(
                f"{name} is one card, and {self.size} processes take one each",
                where="runtime.device",
                fix="--device cuda, or CUDA_VISIBLE_DEVICES",
            )
        import torch

        return f"cuda:{self.local}" if name == "cuda" or torch.cuda.is_available() else "cpu"

    def join(self, meeting: str, device: str) -> None:
        """Meets the others. meeting: an address as torch.distributed takes it; device: `runtime.device`.

        Raises EnvironmentMissing where they do not find each other.
        """
        import torch
        import torch.distributed as dist

        backend = "gloo"
        if device != "cpu" and self.local < torch.cuda.device_count():
            torch.cuda.set_device(self.local)
            backend = "cpu:gloo,cuda:nccl"
        try:
            dist.init_process_group(
                backend, init_method=meeting, rank=self.rank, world_size=self.size, timeout=_PATIENCE
            )
        except (RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise EnvironmentMissing(f"the processes of this run do not find each other: {said}") from error

    def leave(self) -> None:
        """Ends the connection when all are here."""
        import torch.distributed as dist

        self.gather(None)
        dist.destroy_process_group()

    def gather(self, value: Value) -> list[Value]:
        """What each process says, by rank; a small object. Raises ProcessLost."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        said: list[Any] = [None] * self.size
        with _connected():
            dist.all_gather_object(said, value)
        return said

    def any(self, flag: bool) -> bool:
        """Whether one process says yes."""
        return any(self.gather(flag))

    def stops(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """Whether this process or another was asked to stop, without waiting for any: for long work that each
        does alone. What one was told stays said."""
        if self.size == 1:
            return should_stop
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()

        def told() -> bool:
            with _connected():
                if should_stop():
                    store.set("stop", "")
                    return True
                return bool(store.check(["stop"]))

        return told

    def from_main(self, value: Value) -> Value:
        """What the main process has; what others have is ignored."""
        # Objects of the others may be large or different; they need not travel.
        return self.gather(value if self.is_main else None)[0]  # type: ignore[return-value]

    def in_turns(self, make: Callable[[], Value]) -> Value:
        """What each process makes, on a machine one after the other. An error of one is raised by all."""
        made: list[Value] = []
        for turn in range(max(self.gather(self.local)) + 1):
            with self.together():
                if turn == self.local:
                    made.append(make())
        return made[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what each process does alone. An error of one is raised by all, when all are through: the
        first by rank. Inside no process may wait for another unless all do."""
        error = None
        try:
            yield
        except ProcessLost:
            raise
        except AvatarctlError as raised:
            if self.size == 1:
                raise
            error = raised
        found = next((each for each in self.gather(error) if each is not None), None)
        if found is not None:
            self.agreed = error if error is not None and _alike(error, found) else found
            raise self.agreed

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replaces the gradients of each process by their sum, the same bits everywhere. A parameter that no
        process has a gradient of keeps none. Raises ProcessLost."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        with _connected():
            dist.all_reduce(has, op=dist.ReduceOp.MAX)
        gradients = []
        for parameter, somebody in zip(parameters, has.tolist(), strict=True):
            if somebody:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            _add(bucket)


def _add(bucket: list[Tensor]) -> None:
    import torch
    import torch.distributed as dist

    flat = torch.cat([gradient.flatten() for gradient in bucket])
    with _connected():
        dist.all_reduce(flat)
    for gradient, total in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """In their order; each of one precision, and not larger than need be."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        numbers = sum(each.numel() for each in bucket) + gradient.numel()
        if bucket and (numbers > _BUCKET or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _alike(one: AvatarctlError, other: AvatarctlError) -> bool:
    return type(one) is type(other) and str(one) == str(other)


@contextmanager
def _connected() -> Iterator[None]:
    """A connection that broke is a process that is gone; torch says so in several ways, all RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from error


@contextmanager
def waiting_within() -> Iterator[None]:
    """Around computation in which processes wait for each other, as those that share weights do: errors of
    other kinds are what they are. Raises ProcessLost."""
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or _OF_A_CONNECTION.search(str(error)):
            raise _lost(error) from error
        raise


def _lost(error: RuntimeError) -> ProcessLost:
    said = " ".join(str(error).split())[:200]
    fix = "the same command with --resume auto goes on"
    return ProcessLost(f"another process of this run is gone: {said}", fix=fix)
