"""Networks in a memory mode: which of their weights stay on the device and which wait on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import nn

from avatarctl.placement.units import Moves, Unit, Visits, leaves

__all__ = ["HOST", "in_groups", "leaf_by_leaf", "moved"]

HOST: Final = torch.device("cpu")


def in_groups(
    network: nn.Module,
    device: torch.device,
    *,
    group: int,
    away: int | None = None,
    host: torch.device = HOST,
    moves: Moves | None = None,
    turns: bool = False,
) -> Visits:
    """A transformer on the host -> its blocks come `group` at a time, the next ones under way; everything
    else is moved to the device, what is trained included. away: only so many blocks leave, the last ones;
    None is all of them. turns: the network is walked back as well (`Visits`).

    Raises ValueError for a network without blocks, or with fewer than `away`.
    """
    blocks = list(getattr(network, "blocks", ()))
    if not blocks or (away is not None and away > len(blocks)):
        raise ValueError(f"{len(blocks)} blocks, and {away} were to leave")
    moves = moves or Moves()
    first = 0 if away is None else len(blocks) - away
    leaving = blocks[first:]
    groups = [leaving[start : start + group] for start in range(0, len(leaving), group)]
    units = [
        Unit(f"blocks {first + number * group}", _inside(members), device, host, moves)
        for number, members in enumerate(groups)
    ]
    moved(network, device, _inside(leaving))
    return Visits(units, [(members[0], members[-1]) for members in groups], ahead=1, turns=turns)


def leaf_by_leaf(
    network: nn.Module,
    device: torch.device,
    *,
    host: torch.device = HOST,
    moves: Moves | None = None,
) -> Visits:
    """A network on the host -> each module's own parameters come for its forward alone. Modules that share a
    parameter are one unit, which comes for each of them: else each would hold a copy of it."""
    moves = moves or Moves()
    named = [(name, module) for name, module in leaves(network) if _frozen(module)]
    names = {id(module): name for name, module in named}
    units: list[Unit] = []
    doors: list[nn.Module] = []
    for modules in _that_share([module for _, module in named]):
        unit = Unit(names[id(modules[0])], modules, device, host, moves)
        units += [unit] * len(modules)
        doors += modules
    moved(network, device, doors)
    return Visits(units, [(module, module) for module in doors], ahead=0)


def moved(network: nn.Module, device: torch.device, but: Sequence[nn.Module]) -> None:
    """Everything to the device, the frozen parameters of some modules excepted; the objects are replaced."""
    stay = set(map(id, but))
    for module in network.modules():
        for name, parameter in module._parameters.items():
            leaves_here = id(module) in stay and parameter is not None and not parameter.requires_grad
            if parameter is not None and not leaves_here and parameter.device != device:
                there = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
                module._parameters[name] = there
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def _inside(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    return [module for block in blocks for module in block.modules()]


def _that_share(modules: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Modules by what they share, in the order of the first of each; most share nothing."""
    found: list[list[nn.Module]] = []
    where: dict[int, list[nn.Module]] = {}
    for module in modules:
        held = [id(each) for each in module._parameters.values() if each is not None]
        mine = next((where[key] for key in held if key in where), None)
        if mine is None:
            found.append(mine := [])
        mine.append(module)
        for key in held:
            where.setdefault(key, mine)
    return found


def _frozen(module: nn.Module) -> bool:
    return any(each is not None and not each.requires_grad for each in module._parameters.values())
