"""A run that has run out of memory all the same: in which phase, and the plan that fits (exit 5)."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from avatarctl.cli.app import is_out_of_memory
from avatarctl.cli.memory_mode import countable, free_room, infer_counter, with_mode
from avatarctl.cli.screen import Screen
from avatarctl.errors import AvatarctlError, DoesNotFit
from avatarctl.events import Notice, Stage
from avatarctl.placement.seats import ALLOWANCE, shown

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.pipelines.job import JobPlan
    from avatarctl.profiling.account import Account
    from avatarctl.profiling.fit import Room
    from avatarctl.registry import Row

__all__ = ["answered", "of_infer", "of_training"]

LESS: Final = "use a smaller --size or fewer --num-frames"
"""What helps where nobody counts."""

Answer = Callable[["Room"], str]
"""What fits in so much room, in words. Raises DoesNotFit with the smallest need."""


@contextlib.contextmanager
def answered(
    what: str, phase: Callable[[], str], device: str, answer: Answer, screen: Screen
) -> Iterator[None]:
    """Around a run. what: for the message; phase: where it is; device: as `runtime.device` names it.

    Raises DoesNotFit in place of every error that says that memory is used up.
    """
    try:
        yield
        return
    except BaseException as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0][:200] or type(error).__name__
        # What the run held is held by the frames of the error alone; counting needs room.
        traceback.clear_frames(error.__traceback__)
        room = _room(error, device)
    where, what_failed = f"{what}, phase {phase()}", f"out of memory: {said}"
    screen(Notice(f"{where}: {what_failed}", "warning"))
    screen(Stage("counting what fits"))
    try:
        fix = answer(room)
    except DoesNotFit as smallest:
        raise DoesNotFit(f"{what_failed}; {smallest.what}", where=where, fix=smallest.fix) from None
    except AvatarctlError:  # of what has no code to be counted
        fix = LESS
    raise DoesNotFit(what_failed, where=where, fix=fix) from None


def _room(error: BaseException, device: str) -> Room:
    """What was there for the run: the limit that it passed, else what is free now that it has ended."""
    from avatarctl.live_bytes import OverLimit
    from avatarctl.models.device import resolve_device
    from avatarctl.profiling.fit import Room

    if not isinstance(error, OverLimit):
        return free_room(resolve_device(device))
    if error.place == "host":
        return Room(1 << 60, error.limit, where="the limit")
    return Room(round(error.limit * (1 + ALLOWANCE)), where="the limit")


def of_infer(plan: JobPlan, asked: Mapping[str, Any], screen: Screen) -> Answer:
    """The fastest mode behind the one that failed."""

    def answer(room: Room) -> str:
        row, cfg = countable(plan.row, plan), plan.cfg
        if cfg.memory.mode == "auto":  # of a command that settles nothing
            cfg = with_mode(cfg, "full")
        open_to_choice = {dotted: each for dotted, each in asked.items() if dotted != "memory.mode"}
        count = infer_counter(row, screen, plan.samples)
        return _fitting("infer", row, cfg, open_to_choice, room, count, screen)

    return answer


def of_training(command: str, row: Row, cfg: RunConfig, asked: Mapping[str, Any], screen: Screen) -> Answer:
    """The fastest plan behind the one that failed."""

    def answer(room: Room) -> str:
        from avatarctl.profiling.training import profile_training

        counted: list[tuple[RunConfig, Account]] = []

        def count(each: RunConfig) -> Account:
            if not any(made == each for made, _ in counted):
                counted.append((each, profile_training(row, each)))
            return next(account for made, account in counted if made == each)

        return _fitting(command, row, cfg, asked, room, count, screen)

    return answer


def _fitting(
    job: str,
    row: Row,
    cfg: RunConfig,
    asked: Mapping[str, Any],
    room: Room,
    count: Callable[[RunConfig], Account],
    screen: Screen,
) -> str:
    """What to add to the command. The run itself does not fit, whatever was counted of it."""
    from avatarctl.profiling.fit import fastest

    own = room.need(count(cfg))
    screen(Notice(f"as it is: {shown(own)} counted"))
    tighter = replace(room, card=min(room.card, own - 1))
    blocks = row.network["dit"]["num_layers"] if job != "infer" else 0
    found = fastest(job, row.name, cfg, asked, tighter, count, screen, blocks=blocks)
    words = " ".join(f"-o {dotted}={value}" for dotted, value in found.plan.changes.items())
    costs = f"; {found.plan.costs}" if found.plan.costs else ""
    return f"with {words} it takes {shown(room.need(found.account))}, as counted{costs}"
