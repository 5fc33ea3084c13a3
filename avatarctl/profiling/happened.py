"""What a real run held and moved, phase by phase: the account of `infer -v` and `train -v`, and where a run
failed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from avatarctl.family import Modules
from avatarctl.live_bytes import LiveBytes
from avatarctl.loading.modules import PARTS, SomeModules
from avatarctl.loading.placed import PlacedModules
from avatarctl.placement.seats import shown
from avatarctl.placement.units import Moves
from avatarctl.profiling.phases import Counter, Phases
from avatarctl.profiling.watched import watch

if TYPE_CHECKING:
    from avatarctl.training.trainer import Trainer

__all__ = ["Happened", "TrainingHappened"]


class _CardBytes(Counter):
    """Of a CUDA device, as its allocator counts them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def current(self) -> int:
        return int(torch.cuda.memory_allocated(self._device))

    @property
    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated(self._device))

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


class _NotCounted(Counter):
    current = peak = 0

    def reset_peak(self) -> None:
        """Nothing to forget."""


class _Account:
    """Counts while it is entered, once `_begin` said what. On a CPU every operation is looked at, which takes
    time; packed weights that wait are not among the live bytes there either.

    counting: False knows phases alone, and costs nothing.
    """

    def __init__(self, *, counting: bool = True) -> None:
        self._counting = counting
        self._entered = contextlib.ExitStack()
        self._phases: Phases | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._phases is not None:
            self._phases.end()
        self._entered.close()

    def _begin(self, device: torch.device, held: Sequence[Any]) -> Phases:
        """held: networks and tensors that exist already."""
        counter: Counter
        if not self._counting:
            counter = _NotCounted()
        elif device.type == "cuda":
            counter = _CardBytes(device)
        else:
            counter = live = self._entered.enter_context(LiveBytes())
            live.track(*held)
        self._phases = Phases(counter)
        with self._phases("load"):
            pass
        return self._phases

    @property
    def failed(self) -> str:
        """The phase that an error came out of."""
        return "load" if self._phases is None else self._phases.failed or "loop"

    def lines(self) -> list[str]:
        """The table for people."""
        if self._phases is None or not self._counting:
            return []
        lives, peaks = self._phases.lives, self._phases.peaks
        rows = [f"{name:10} {shown(lives[name]):>12} {shown(peak):>12}" for name, peak in peaks.items()]
        return [f"{'phase':10} {'live':>12} {'peak':>12}", *rows]


class TrainingHappened(_Account):
    """Of a training run: `watch` is given its trainer."""

    def watch(self, trainer: Trainer) -> None:
        """Nothing is counted of weights that processes share on a CPU."""
        network = trainer.network
        self._counting &= not network.is_sharded or network.device.type == "cuda"
        trainer.phase = self._begin(network.device, trainer.tensors())


class Happened(_Account):
    """Of a run of `infer`: `watch` is given its networks."""

    def __init__(self, *, counting: bool = True) -> None:
        super().__init__(counting=counting)
        self._loads: list[str] = []
        self._moves = Moves()

    def watch(self, modules: Modules | SomeModules) -> None:
        """The networks of the run, read already or to be read when they are touched."""
        parts = [vars(modules).get(part) for part in PARTS]
        phases = self._begin(modules.device, [each for each in parts if isinstance(each, nn.Module)])

        def built(part: str, network: Any) -> None:
            if network is not None:
                self._loads.append(part)
                watch(part, network, phases)

        for part in PARTS:
            built(part, vars(modules).get(part))
        if isinstance(modules, SomeModules):
            modules.tell(built)
            modules.around(lambda build: phases.wrapped(build, "load"))
        if isinstance(modules, PlacedModules):
            self._moves = modules.moves

    def lines(self) -> list[str]:
        rows = super().lines()
        if not rows:
            return []
        moves = self._moves
        rows.append(f"loads: {', '.join(self._loads)}")
        rows.append(
            f"moves: {moves.copies} copies to the device, {shown(moves.copied_bytes)}; "
            f"{shown(moves.host_peak)} waited on the host"
            + (f", {shown(moves.pinned_peak)} of it pinned" if moves.pinned_peak else "")
        )
        return rows
