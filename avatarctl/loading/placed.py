"""The networks of a run in a memory mode: read when they are first needed, one large one at a time.

full        everything on the device from the start
model       the image encoder leaves before the text encoder is read, and that before the transformer
group       as model, and the transformer's blocks come in groups
sequential  every module comes for its own forward alone
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection
from typing import Any, Final

import torch
from torch import nn

from avatarctl.config.sections import Memory
from avatarctl.errors import UsageError
from avatarctl.events import Emit, Notice
from avatarctl.loading.modules import Part, SomeModules
from avatarctl.placement.place import HOST, in_groups, leaf_by_leaf
from avatarctl.placement.units import Moves

__all__ = ["PlacedModules", "is_full"]

_LARGE: Final[tuple[Part, ...]] = ("text", "image", "dit")


def is_full(memory: Memory) -> bool:
    """Whether everything stays on the device; so it does where nobody has settled `auto`, as the command line
    does before it loads."""
    return memory.mode in ("full", "auto") and not memory.swap_blocks


class PlacedModules(SomeModules):
    """`Modules` whose parts are read when they are touched; what the transformer does not need is forgotten
    when that is touched.

    build: (part, device) -> network, None where the model has none; host: where weights wait, "meta" where
    they are only counted. moves: what went to the device so far; loads: parts that were read, in order.
    """

    def __init__(
        self,
        wanted: Collection[Part],
        build: Callable[[Part, torch.device], Any],
        memory: Memory,
        device: torch.device,
        emit: Emit,
        host: torch.device = HOST,
    ) -> None:
        super().__init__(wanted, self._placed, device)
        self._read, self._memory, self._emit, self._host = build, memory, emit, host
        self.moves, self._unpinned_said = Moves(), False
        self.loads: list[Part] = []

    def _placed(self, part: Part) -> Any:
        mode, swap = self._memory.mode, self._memory.swap_blocks
        if part in _LARGE:
            self._leave_room(part)
        by_leaves = mode == "sequential"
        in_blocks = part == "dit" and (mode == "group" or swap > 0)
        network = self._read(part, self._host if by_leaves or in_blocks else self.device)
        self.loads.append(part)
        if network is None or not isinstance(network, nn.Module):
            return network
        if by_leaves:
            leaf_by_leaf(network, self.device, host=self._host, moves=self.moves)
        elif in_blocks:
            self._in_blocks(network)
        if (unpinned := self.moves.unpinned_bytes) and not self._unpinned_said:
            self._unpinned_said = True
            line = f"memory: {unpinned / 2**30:.1f} GiB on the host could not be pinned; copies take longer"
            self._emit(Notice(line, "warning"))
        return network

    def _leave_room(self, part: Part) -> None:
        """Never are two of them here; with a second job the transformer leaves as well."""
        for name in _LARGE:
            if name != part and self.__dict__.get(name) is not None:
                self.drop(name)
                gc.collect()  # a network and the hooks that bring its weights know each other
                what = "transformer" if name == "dit" else f"{name} encoder"
                self._emit(Notice(f"memory: the {what} is done and leaves"))

    def later(self, part: Part) -> Any:
        """Stands for a part that must not be read yet: calls and attributes are the part's."""
        return _Later(self, part)

    def _in_blocks(self, network: nn.Module) -> None:
        memory, count = self._memory, len(list(getattr(network, "blocks", ())))
        if memory.swap_blocks:
            if memory.swap_blocks > count:
                raise UsageError(
                    f"{memory.swap_blocks} blocks were to leave, and the transformer has {count}",
                    where="memory.swap_blocks",
                )
            away = memory.swap_blocks
            in_groups(network, self.device, group=1, away=away, host=self._host, moves=self.moves)
            return
        group = memory.group_blocks
        if group >= count > 1:
            line = f"memory: a group of {group} holds all {count} blocks, so that a step saves nothing"
            self._emit(Notice(f"{line}; memory.group_blocks {-(-count // 4)} would", "warning"))
        in_groups(network, self.device, group=group, host=self._host, moves=self.moves)


class _Later:
    def __init__(self, modules: SomeModules, part: Part) -> None:
        self._modules, self._part = modules, part

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        return getattr(self._modules, self._part)(*inputs, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(self._modules, self._part), name)
