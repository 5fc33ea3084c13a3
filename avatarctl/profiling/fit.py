"""The fastest plan of a run that fits: what `vram-profile --fit` and `memory.mode auto` look for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from avatarctl.errors import DoesNotFit
from avatarctl.events import Emit, Notice
from avatarctl.placement.seats import shown
from avatarctl.profiling.plans import Plan, faster_plans, slower_plans

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
        return self.need(account) <= self.card and (self.host is None or account.host <= self.host)


@dataclass(frozen=True)
class Found:
    """A plan and what it takes."""

    plan: Plan
    account: Account


def fastest(
    job: str, model: str, cfg: RunConfig, asked: Mapping[str, Any], room: Room, count: Count, emit: Emit
) -> Found:
    """The fastest plan that fits; what was asked for stays. count: the account of a configuration.

    Raises DoesNotFit with the smallest need, where no plan fits.
    """
    now = Found(Plan(cfg), count(cfg))
    fits = room.holds(now.account)
    tried = [now]
    for plan in (faster_plans if fits else slower_plans)(job, cfg, asked):
        found = Found(plan, count(plan.cfg))
        account = found.account
        emit(Notice(f"{plan}: {shown(account.peak_bytes)}, {shown(account.host)} on the host"))
        tried.append(found)
        if room.holds(account):
            return found
    if fits:
        return now
    raise _too_large(job, model, tried, room)


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
    least = min(each.account.host for each in tried if room.need(each.account) <= room.card)
    given = "were given" if room.where == "--fit" else "are free there"
    return DoesNotFit(
        f"{shown(least)} have to wait on the host, and {shown(room.host)} {given}",
        where="--host" if room.where == "--fit" else room.where,
        fix="a larger card, or more memory of the host",
    )
