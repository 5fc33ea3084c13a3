"""`memory.mode auto` of `infer`: what of the networks waits on the host, decided before anything is loaded.

In two stages. Arithmetic from shapes says in a moment that all of it surely fits; on a CPU it always decides,
unless the weights alone are more than is free. Only otherwise the run is counted, as `vram-profile --fit`
does, in modes that leave every bit of the video as it is. What was counted is kept in the cache folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from avatarctl.cli.screen import Screen
from avatarctl.errors import AvatarctlError, DoesNotFit
from avatarctl.events import Notice, Stage
from avatarctl.placement.host import host_memory
from avatarctl.placement.seats import ALLOWANCE, shown
from avatarctl.registry import ROWS, Row

if TYPE_CHECKING:
    import torch

    from avatarctl.config import RunConfig
    from avatarctl.pipelines.job import JobPlan
    from avatarctl.profiling.account import Account
    from avatarctl.profiling.fit import Found, Room

__all__ = [
    "UNDECIDED",
    "best_that_fits",
    "countable",
    "counts_folder",
    "decided_without_torch",
    "free_room",
    "infer_counter",
    "settled",
    "tell_seats",
    "with_mode",
]

UNDECIDED: Final = "decided at start"

_SIGNS_OF_A_CARD: Final = ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/dxg", "dev/kfd")
"""Files of drivers, from the root of the file system: NVIDIA's, of Windows below Linux, AMD's."""


def with_mode(cfg: RunConfig, mode: Any) -> RunConfig:
    """`cfg` in another memory mode."""
    return replace(cfg, memory=replace(cfg.memory, mode=mode))


def decided_without_torch(plan: JobPlan) -> tuple[str | None, str]:
    """The mode that arithmetic decides on, None where the card has to be asked, or the run to be counted; and
    why."""
    memory = plan.cfg.memory
    if memory.mode != "auto":
        return memory.mode, ""
    if memory.swap_blocks:
        return "model", f"{memory.swap_blocks} blocks wait on the host"
    if not _on_cpu(plan.cfg.runtime.device):
        return None, "free memory of the card is asked then"
    return _on_this_host(plan)


def settled(plan: JobPlan, asked: Mapping[str, Any], screen: Screen) -> JobPlan:
    """The plan in the memory mode that it will run in, which a line says where `auto` chose it.

    Raises DoesNotFit (exit 5) for a run that fits in no mode, or in the one that was asked for.
    """
    mode, why = decided_without_torch(plan)
    if mode is not None and (plan.cfg.memory.mode == "auto" or _on_cpu(plan.cfg.runtime.device)):
        return _in_mode(plan, mode, why, screen)
    device = _device(plan)
    room = free_room(device)
    if plan.cfg.memory.mode != "auto":
        _require_weights_fit(plan, room)
        if _surely_on_the_card(plan, room)[0] != plan.seating.mode:
            _require_fit(plan, room, screen)
        return plan
    if device.type == "cpu":
        mode, why = _on_this_host(plan)
    else:
        mode, why = _surely_on_the_card(plan, room)
    if mode is None:
        found = best_that_fits(plan.row, plan, room, asked, screen)
        mode = found.plan.cfg.memory.mode
        why = f"counted: {shown(room.need(found.account))} of {shown(room.card)} free on {room.where}"
    return _in_mode(plan, mode, why, screen)


def _in_mode(plan: JobPlan, mode: str, why: str, screen: Screen) -> JobPlan:
    if plan.cfg.memory.mode != "auto":
        return plan
    screen(Notice(f"memory: {mode} (auto; {why})"))
    return replace(plan, cfg=with_mode(plan.cfg, mode))


def tell_seats(plan: JobPlan, screen: Screen) -> None:
    """What sits where and when, before a run in which anything leaves."""
    if plan.seating.mode != "full":
        screen(Notice(f"memory: {plan.seating.mode}"))
        for line in plan.seating.lines():
            screen(Notice(f"  {line}"))


def _on_cpu(device: str, root: Path = Path("/")) -> bool:
    """Whether a run surely computes on the CPU, as far as files tell."""
    if device == "cpu" or sys.platform == "darwin":
        return True
    if device != "auto" or sys.platform != "linux":
        return False
    return not any((root / name).exists() for name in _SIGNS_OF_A_CARD)


def _on_this_host(plan: JobPlan) -> tuple[str | None, str]:
    """What waits on the host and what is on the device are one memory: only what leaves for good helps."""
    from avatarctl.pipelines.at_most import weights_of

    weights, memory = weights_of(plan), host_memory()
    if memory.free is None:
        return "full", f"{shown(weights)} of weights; the system does not tell what is free"
    told = f"{shown(weights)} of weights; {shown(memory.free)} are free, the limit of {memory.limit}"
    return ("full" if weights <= memory.free else None), told


def _surely_on_the_card(plan: JobPlan, room: Room) -> tuple[str | None, str]:
    from avatarctl.pipelines.at_most import at_most

    need = at_most(plan)
    if need is None or need * (1 + ALLOWANCE) > room.card:
        return None, ""
    return "full", f"at most {shown(need)}, {shown(room.card)} free on {room.where}"


def _device(plan: JobPlan) -> torch.device:
    from avatarctl.cli.start import importing_networks

    with importing_networks():  # the run needs them in any case
        from avatarctl.models.device import resolve_device
    return resolve_device(plan.cfg.runtime.device)


def free_room(device: torch.device) -> Room:
    """What is free for this run now."""
    import torch

    from avatarctl.profiling.fit import Room

    memory = host_memory()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return Room(free, memory.free, where=str(device))
    if memory.free is None:  # nobody asks then: arithmetic has decided
        return Room(1 << 60, is_one=True, where=memory.limit)
    return Room(memory.free, is_one=True, where=memory.limit)


def _require_weights_fit(plan: JobPlan, room: Room) -> None:
    """Of a mode that a person chose: what surely cannot be is not begun. Raises DoesNotFit."""
    need = max(plan.seating.before, plan.seating.after)
    if not room.is_one and need > room.card:
        raise DoesNotFit(
            f"the weights alone take {shown(need)} at once, and {shown(room.card)} are free",
            where=f"memory mode {plan.seating.mode} on {room.where}",
            fix="--memory auto finds the mode that fits",
        )


def _require_fit(plan: JobPlan, room: Room, screen: Screen) -> None:
    """A mode that a person chose, counted. Raises DoesNotFit where what is alive at once is more than is free
    already; the allowance is a guess, and refuses nobody."""
    screen(Stage("counting what it needs"))
    try:
        account = infer_counter(countable(plan.row, plan), screen, plan.samples)(plan.cfg)
    except AvatarctlError as error:
        screen(Notice(f"the run begins without having been counted: {error}", "warning"))
        return
    if account.live_bytes > room.card:
        phase = max(account.stages, key=lambda name: account.stages[name])
        raise DoesNotFit(
            f"{shown(account.live_bytes)} are needed at once, in {phase}, and {shown(room.card)} are free",
            where=f"memory mode {plan.seating.mode} on {room.where}",
            fix="--memory auto finds the mode that fits",
        )


def best_that_fits(row: Row, plan: JobPlan, room: Room, asked: Mapping[str, Any], screen: Screen) -> Found:
    """The fastest mode that fits, counted.

    Raises DoesNotFit with the smallest need: before anything is counted, where weights alone are too large in
    every mode.
    """
    _require_some_mode(plan, room)
    screen(Stage("counting what fits"))
    from avatarctl.profiling.fit import fastest

    row, cfg = countable(row, plan), plan.cfg
    if room.is_one:  # where the VAE computes in float32
        cfg = replace(cfg, runtime=replace(cfg.runtime, device="cpu"))
    open_to_choice = {dotted: each for dotted, each in asked.items() if dotted != "memory.mode"}
    return fastest(
        "infer",
        row.name,
        with_mode(cfg, "full"),
        open_to_choice,
        room,
        infer_counter(row, screen, plan.samples),
        screen,
    )


def _require_some_mode(plan: JobPlan, room: Room) -> None:
    """By arithmetic from shapes: what weights take of the card at once, and where that is the host's memory
    as well what waits there. Raises DoesNotFit."""
    from avatarctl.profiling.plans import MODES

    least = {}
    for mode in MODES:
        seating = replace(plan, cfg=with_mode(plan.cfg, mode)).seating
        least[mode] = max(seating.before, seating.after, seating.host if room.is_one else 0)
    mode = min(least, key=lambda each: least[each])
    if least[mode] > room.card:
        raise DoesNotFit(
            f"the weights alone take {shown(least[mode])} in memory.mode {mode}, which needs the least, and "
            f"{shown(room.card)} are free",
            where=room.where,
            fix="more memory, or a smaller model",
        )


def infer_counter(row: Row, screen: Screen, samples: int) -> Callable[[RunConfig], Account]:
    """What counts a configuration, unless that was done before. samples: of the recording, at 16 kHz."""
    from avatarctl.profiling.inference import profile_inference
    from avatarctl.profiling.kept import kept

    def count(cfg: RunConfig) -> Account:
        return profile_inference(row, cfg, samples=samples)

    return lambda cfg: kept(counts_folder(), row, cfg, count, screen, samples)


def countable(row: Row, plan: JobPlan) -> Row:
    """With the sizes of every network: of a transformer from files those that they have, beside the encoders
    that published models of its family are used with."""
    if "num_layers" in row.network.get("dit", {}):
        return row
    held = plan.transformer
    assert held is not None, "a model from files has one"
    like = next(each for each in ROWS.values() if each.family == row.family and each.source == "hub")
    dit = {
        **like.network["dit"],
        "num_attention_heads": held.heads,
        "attention_head_dim": held.sizes.width // held.heads,
        **held.layout.constructor(held.sizes),
    }
    return replace(row, network={**like.network, "dit": dit})


def counts_folder() -> Path:
    """Where accounts are kept that were counted before."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(home) if home else Path.home() / ".cache") / "avatarctl" / "memory"
