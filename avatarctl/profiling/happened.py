"""What a real run held and moved, phase by phase: the account of `infer -v`."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

import torch
from torch import nn

from avatarctl.family import Modules
from avatarctl.live_bytes import LiveBytes
from avatarctl.loading.modules import PARTS, SomeModules
from avatarctl.loading.placed import PlacedModules
from avatarctl.placement.units import Moves
from avatarctl.profiling.phases import Counter, Phases
from avatarctl.profiling.sizes import shown
from avatarctl.profiling.watched import watch

__all__ = ["Happened"]


class _CardBytes:
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


class Happened:
    """Counts while it is entered, once `watch` was given the networks of the run. On a CPU every operation is
    looked at, which takes time; packed weights that wait are not among the live bytes there either."""

    def __init__(self) -> None:
        self._entered = contextlib.ExitStack()
        self._phases: Phases | None = None
        self._loads: list[str] = []
        self._moves = Moves()

    def __enter__(self) -> Happened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._phases is not None:
            self._phases.end()
        self._entered.close()

    def watch(self, modules: Modules | SomeModules) -> None:
        """The networks of the run, read already or to be read when they are touched."""
        counter: Counter
        if modules.device.type == "cuda":
            counter = _CardBytes(modules.device)
        else:
            counter = live = self._entered.enter_context(LiveBytes())
            for part in PARTS:
                network = vars(modules).get(part)
                if isinstance(network, nn.Module):
                    live.track(network)
        self._phases = phases = Phases(counter)
        with phases("load"):
            pass

        def built(part: str, network: Any) -> None:
            if network is not None:
                self._loads.append(part)
                watch(part, network, phases)

        for part in PARTS:
            built(part, vars(modules).get(part))
        if isinstance(modules, SomeModules):
            modules.tell(built)
        if isinstance(modules, PlacedModules):
            self._moves = modules.moves

    def lines(self) -> list[str]:
        """The table for people."""
        if self._phases is None:
            return []
        rows = [f"{'phase':10} {'live':>12} {'peak':>12}"]
        lives = self._phases.lives
        rows += [
            f"{name:10} {shown(lives[name]):>12} {shown(peak):>12}"
            for name, peak in self._phases.peaks.items()
        ]
        moves = self._moves
        rows.append(f"loads: {', '.join(self._loads)}")
        rows.append(
            f"moves: {moves.copies} copies to the device, {shown(moves.copied_bytes)}; "
            f"{shown(moves.host_peak)} waited on the host"
        )
        return rows
