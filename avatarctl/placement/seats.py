"""What sits where and when in a memory mode, from the sizes of a run's networks alone: without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from avatarctl.config import Memory

__all__ = ["ALLOWANCE", "Part", "Seat", "Seating", "seated", "shown"]

ALLOWANCE: Final = 0.06
"""Share of the live bytes that kernels' workspaces and the rounding of an allocator take beside them. A guess
until it was measured on a card; it is stated apart from what is counted."""


_NAMES: Final = {
    "text": "text encoder",
    "image": "image encoder",
    "vae": "VAE",
    "audio": "audio encoder",
    "dit": "transformer",
}
_UNTIL: Final = {"image": "until the text encoder is read", "text": "until the transformer is read"}
"""Parts that do their work and leave (loading/placed.py)."""


@dataclass(frozen=True)
class Part:
    """One network: bytes of its weights, of its largest module, and of each block, if it has blocks."""

    name: str
    weights: int
    largest: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Seat:
    """One line of the table. device: the most bytes of weights that are there at once; host: that wait;
    when: for people."""

    name: str
    weights: int
    device: int
    host: int
    when: str


@dataclass(frozen=True)
class Seating:
    """seats: in the order in which they are read; before, after: bytes of weights on the device until the
    text encoder has left, and from then on; host: that wait there, at most; packing: bytes that the largest
    unit needs there twice while it is packed; unknown: parts whose sizes nothing states."""

    mode: str
    seats: tuple[Seat, ...]
    before: int
    after: int
    host: int
    packing: int
    unknown: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """As `--json` shows it."""
        return {
            "mode": self.mode,
            "parts": [
                {"part": each.name, "weights": each.weights, "device": each.device, "host": each.host}
                | {"when": each.when}
                for each in self.seats
            ],
            "device_before_the_transformer": self.before,
            "device_with_the_transformer": self.after,
            "host": self.host,
            "unknown": list(self.unknown),
        }

    def lines(self) -> list[str]:
        """The table for people."""
        rows: list[tuple[str, ...]] = [("weights of", "in all", "on device", "on host", "when")]
        rows += [
            (each.name, *map(_cell, (each.weights, each.device, each.host)), each.when) for each in self.seats
        ]
        made = [f"{a:15} {b:>10} {c:>10} {d:>10}  {e}".rstrip() for a, b, c, d, e in rows]
        made += [f"{name:15} {'unknown':>10}" for name in self.unknown]
        moments = f"{shown(self.after)} of weights on the device"
        if self.before:
            moments = f"{shown(self.before)} of weights on the device before the transformer is read, "
            moments += f"{shown(self.after)} from then on"
        waiting = f"; {shown(self.host)} wait on the host" if self.host else ""
        return [*made, moments + waiting, "activations come on top: avatarctl vram-profile infer counts them"]


def seated(parts: Sequence[Part], memory: Memory, unknown: Sequence[str] = ()) -> Seating:
    """parts: in the order in which a run reads them, the transformer ("dit") last.

    Raises ValueError where more blocks were to leave than there are.
    """
    # What nobody has settled yet is on the device from the start.
    plain = "full" if memory.mode == "auto" else memory.mode
    mode = f"swap {memory.swap_blocks} blocks" if memory.swap_blocks else plain
    seats, units = [], [0]
    for part in parts:
        device, waiting, when = part.weights, 0, "from the start"
        if mode != "full":
            when = _UNTIL.get(part.name, "when first needed, then always")
        if mode == "sequential":
            until = f", {_UNTIL[part.name]}" if part.name in _UNTIL else ""
            device, waiting, when = part.largest, part.weights, f"each module for its own call{until}"
            units.append(part.largest)
        elif part.name == "dit" and mode != "full":
            groups = _groups(part, memory)
            if groups:
                here = max(groups) if len(groups) == 1 else _neighbours(groups)
                waiting = sum(groups)
                device = part.weights - waiting + here
                when = f"{len(groups)} groups, one and the next" if len(groups) > 1 else "one group"
                units += groups
        seats.append(Seat(_NAMES[part.name], part.weights, device, waiting, when))
    together = max if mode == "sequential" else sum
    *early, late = _moments(parts, seats, mode)
    return Seating(
        mode,
        tuple(seats),
        before=max((together([0, *(seat.device for seat in moment)]) for moment in early), default=0),
        after=together([0, *(seat.device for seat in late)]),
        host=max(sum(seat.host for seat in moment) for moment in (*early, late)),
        packing=max(units),
        unknown=tuple(_NAMES[name] for name in unknown),
    )


def _moments(parts: Sequence[Part], seats: Sequence[Seat], mode: str) -> list[list[Seat]]:
    """Seats that are taken at once: each encoder that leaves with those that stay, and last the transformer
    with them."""
    if mode == "full":
        return [list(seats)]
    named = list(zip(parts, seats, strict=True))
    leaving = [seat for part, seat in named if part.name in _UNTIL]
    small = [seat for part, seat in named if part.name not in (*_UNTIL, "dit")]
    last = [seat for part, seat in named if part.name not in _UNTIL]
    return [*([*small, seat] for seat in leaving), last]


def _groups(part: Part, memory: Memory) -> list[int]:
    """Bytes of each group that leaves (placement/place.py `in_groups`)."""
    count = len(part.blocks)
    if memory.swap_blocks > count:
        raise ValueError(f"{memory.swap_blocks} blocks were to leave, and the transformer has {count}")
    if memory.swap_blocks:
        return list(part.blocks[count - memory.swap_blocks :])
    if memory.mode != "group":
        return []
    size = memory.group_blocks
    return [sum(part.blocks[start : start + size]) for start in range(0, count, size)]


def _neighbours(groups: Sequence[int]) -> int:
    """The most that one group and the next take; behind the last comes the first."""
    return max(one + groups[(index + 1) % len(groups)] for index, one in enumerate(groups))


def _cell(size: int) -> str:
    return shown(size) if size else "-"


def shown(size: int) -> str:
    """In GiB, as drivers show it."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
