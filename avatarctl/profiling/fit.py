"""The fastest plan of a run that fits: what `vram-profile --fit` and `memory.mode auto` look for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from avatarctl.errors import DoesNotFit
from avatarctl.events import Emit, Notice
from avatarctl.placement.seats import shown
from avatarctl.profiling.plans import Plan, Swaps, faster_plans, slower_plans

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.profiling.account import Account

__all__ = ["Found", "Room", "fastest"]

Count = Callable[["RunConfig"], "Account"]


@dataclass(frozen=True)
class Room:
    """card: bytes that a run may take there, allowance included; host: bytes that may wait on the host, None
    for any number. is_one: card and host are one memory, as on a CPU. where: who set it, for messages."""

    card: int
    host: int | None = None
    is_one: bool = False
    where: str = "--fit"

    def need(self, account: Account) -> int:
        """What the account takes of the card."""
        return account.peak_bytes + (account.host if self.is_one else 0)

    def holds(self, account: Account) -> bool:
        """Whether both have room."""
        waits = account.host + account.packing
        return self.need(account) <= self.card and (self.host is None or waits <= self.host)


@dataclass(frozen=True)
class Found:
    """A plan and what it takes."""

    plan: Plan
    account: Account


def fastest(
    job: str,
    model: str,
    cfg: RunConfig,
    asked: Mapping[str, Any],
    room: Room,
    count: Count,
    emit: Emit,
    *,
    blocks: int = 0,
    rounded: bool = False,
) -> Found:
    """The fastest plan that fits; what was asked for stays. count: the account of a configuration.

    blocks: of the transformer, some of which may wait on the host; 0 swaps none. rounded: where nothing else
    fits, plans that change the result.

    Raises DoesNotFit with the smallest need, where no plan fits.
    """
    search = _Search(room, count, emit)
    now = search.try_(Plan(cfg), said=False)
    if room.holds(now.account):
        for step in faster_plans(job, cfg, asked, blocks):
            if (found := search.of(step, now)) is not None:
                return found
        return now
    for step in slower_plans(job, cfg, asked, blocks, rounded=rounded):
        if (found := search.of(step, now)) is not None:
            return found
    raise _too_large(job, model, search.tried, room)


@dataclass
class _Search:
    """tried: every plan that was counted."""

    room: Room
    count: Count
    emit: Emit
    tried: list[Found] = field(default_factory=list)

    def try_(self, plan: Plan, *, said: bool = True) -> Found:
        found = Found(plan, self.count(plan.cfg))
        if said:
            account = found.account
            self.emit(Notice(f"{plan}: {shown(account.peak_bytes)}, {shown(account.host)} on the host"))
        self.tried.append(found)
        return found

    def of(self, step: Plan | Swaps, now: Found) -> Found | None:
        """What fits, None where it does not."""
        if isinstance(step, Swaps):
            return self._fewest(step)
        if self._is_hopeless(step, now):
            self.emit(Notice(f"{step}: its weights alone are too large"))
            return None
        found = self.try_(step)
        return found if self.room.holds(found.account) else None

    def _is_hopeless(self, plan: Plan, now: Found) -> bool:
        """Whether the weights are as many as those of the run itself, all on the device, and too many."""
        one, other = plan.cfg.memory, now.plan.cfg.memory
        same = (one.mode, one.swap_blocks, one.base_precision) == (
            other.mode, other.swap_blocks, other.base_precision,
        )  # fmt: skip
        all_there = same and not one.swap_blocks and one.mode in ("full", "auto")
        return all_there and sum(now.account.weights.values()) > self.room.card

    def _fewest(self, swaps: Swaps) -> Found | None:
        """The smallest number of blocks that fits. What is needed falls along a line, once two are away that
        make room for those that come, until another phase is the largest. So two numbers that do not fit tell
        where the line passes; where there is none, halves are tried. One less than the found one was counted.
        """
        few, many = 0, swaps.blocks
        best = self.try_(swaps.of(many))
        if not self.room.holds(best.account):
            return None
        lows: list[tuple[int, int]] = []  # blocks that are too few, and bytes that are too many
        guesses = 0
        while many - few > 1:
            number = (few + many) // 2 if len(lows) > 1 else 2 * (len(lows) + 1)
            if len(lows) > 1 and guesses < _GUESSES:
                guesses += 1
                (one, larger), (two, need) = lows[-2:]
                a_block = max(larger - need, 1) / (two - one)
                number = few + math.ceil((need - self.room.card) / a_block)
            found = self.try_(swaps.of(min(max(number, few + 1), many - 1)))
            away = found.plan.cfg.memory.swap_blocks
            if self.room.holds(found.account):
                many, best = away, found
            else:
                few = away
                lows.append((away, self.room.need(found.account)))
        return best


_GUESSES: Final = 4


def _too_large(job: str, model: str, tried: list[Found], room: Room) -> DoesNotFit:
    smallest = min(tried, key=lambda each: room.need(each.account))
    need = room.need(smallest.account)
    what = f"{job} of {model} needs {shown(need)} at least ({smallest.plan})"
    if need > room.card:
        there = "were asked for" if room.where == "--fit" else "are free"
        return DoesNotFit(
            f"{what}, and {shown(room.card)} {there}",
            where=room.where,
            fix="a smaller --size or fewer frames",
        )
    assert room.host is not None
    fitting = [each.account for each in tried if room.need(each.account) <= room.card]
    least = min(account.host + account.packing for account in fitting)
    given = "were given" if room.where == "--fit" else "are free there"
    return DoesNotFit(
        f"{shown(least)} are needed on the host, and {shown(room.host)} {given}",
        where="--host" if room.where == "--fit" else room.where,
        fix="a larger card, or more memory of the host",
    )
