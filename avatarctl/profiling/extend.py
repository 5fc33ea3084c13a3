"""The account of a deep network from those of shallow ones, where its blocks are alike.

Weights, activations that are kept and moments grow by the same bytes with each pair of blocks, once there are
enough of them. So three depths are counted. Where every number of them lies on a line it is followed to the
depth that was asked for, else the whole network is run. `vram-profile --exact` runs it in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from avatarctl.loading.built_in import build_on_meta
from avatarctl.profiling.account import Account

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.registry import Row

__all__ = ["Depths", "extend", "lists_of", "shifted", "signature", "sizes_of"]

_DEPTHS: Final = (6, 8, 10)
"""Blocks; even numbers, as audio enters half of them. With 4 the largest moment of a backward pass is still
another one: a step of 14B came out 1 GiB too low from 4 and 6, and to the byte from 6 and 8."""

_WORTH: Final = sum(_DEPTHS)
"""Blocks from which counting three networks is less work than counting the whole one."""

_DEPTH: Final = "num_layers"
_PARTS_OF: Final = "parts of "


@dataclass(frozen=True)
class Depths:
    """rows: the same model with that many blocks; depth: of the model itself."""

    rows: tuple[Row, ...]
    depths: tuple[int, ...]
    depth: int


def sizes_of(row: Row, cfg: RunConfig) -> Depths | None:
    """None for a network that is not deep enough, has no depth to be chosen, or blocks that differ."""
    depth = row.network["dit"].get(_DEPTH)
    if not isinstance(depth, int) or depth % 2 or depth < _WORTH or not _alike(row, cfg):
        return None
    return Depths(tuple(_with_depth(row, each) for each in _DEPTHS), _DEPTHS, depth)


def _with_depth(row: Row, depth: int) -> Row:
    dit = {**row.network["dit"], _DEPTH: depth}
    return replace(row, network=MappingProxyType({**row.network, "dit": dit}))


def _alike(row: Row, cfg: RunConfig) -> bool:
    """Whether the modules of every list in the network have the same classes, shapes and settings. A list
    inside another one is a part of its modules."""
    network = build_on_meta(row, cfg.model.channels)["dit"]
    return all(len({signature(each) for each in modules}) <= 1 for modules in lists_of(network))


def lists_of(network: nn.Module) -> list[nn.ModuleList]:
    """Those that are in no other."""
    return [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and not any(part.isdigit() for part in name.split("."))
    ]


def signature(module: nn.Module) -> tuple[Any, ...]:
    """Classes, shapes and settings: modules that have the same do the same."""
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in module.named_parameters())
    settings = tuple(
        (name, type(each).__qualname__, *((key, value) for key, value in vars(each).items() if _plain(value)))
        for name, each in module.named_modules()
    )
    return shapes, settings


def _plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str))


def extend(small: Sequence[Account], sizes: Depths) -> Account | None:
    """The account at `sizes.depth`; None where a number of the small ones does not lie on a line."""
    lines = [_numbers(each) for each in small]
    if any(line.keys() != lines[0].keys() for line in lines):
        return None
    first, second = sizes.depths[:2]
    found: dict[tuple[str, str], int] = {}
    for name, start in lines[0].items():
        values = [line[name] for line in lines]
        if values[2] - values[1] != values[1] - values[0]:
            return None
        step, rest = divmod((values[1] - start) * (sizes.depth - first), second - first)
        if rest:
            return None
        found[name] = start + step
    return _account(found)


def shifted(account: Account, before: Account, after: Account) -> Account:
    """`account` and what `after` has more than `before`, number by number."""
    one, less, more = (_numbers(each) for each in (account, before, after))
    names = {**one, **more}
    return _account({name: one.get(name, 0) + more.get(name, 0) - less.get(name, 0) for name in names})


def _numbers(account: Account) -> dict[tuple[str, str], int]:
    kinds: dict[str, Mapping[str, int]] = {
        "stages": account.stages,
        "weights": account.weights,
        "host_parts": account.host_parts,
        "": {"trained": account.trained, "host": account.host, "packing": account.packing},
    }
    kinds |= {f"{_PARTS_OF}{stage}": parts for stage, parts in account.parts.items()}
    return {(kind, name): size for kind, sizes in kinds.items() for name, size in sizes.items()}


def _account(numbers: Mapping[tuple[str, str], int]) -> Account:
    def of(wanted: str) -> dict[str, int]:
        return {name: size for (kind, name), size in numbers.items() if kind == wanted}

    stages = of("stages")
    parts = {stage: of(f"{_PARTS_OF}{stage}") for stage in stages}
    return Account(stages, of("weights"), parts, host_parts=of("host_parts"), **of(""))
