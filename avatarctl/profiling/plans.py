"""Other ways of the same run, from the fastest to the smallest: what `vram-profile --fit` looks through.

The order is that of what a plan costs beside the run itself: operations that are made again, then bytes that
are moved while the device waits for them. What changes the result comes last, and is said (docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from avatarctl.config import keys

if TYPE_CHECKING:
    from avatarctl.config import RunConfig

__all__ = ["Plan", "faster_plans", "slower_plans"]

_MODES: Final = ("full", "model", "group", "sequential")
_CHECKPOINTS: Final = ("none", "block")
_GRADIENTS: Final = ("full", "checkpoint", "segment", "offload")


@dataclass(frozen=True)
class Plan:
    """changes: settings by dotted key; costs: what is given up, in words, empty where nothing is."""

    cfg: RunConfig
    changes: Mapping[str, Any] = field(default_factory=dict)
    costs: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{dotted} {value}" for dotted, value in self.changes.items()) or "as it is"


def slower_plans(job: str, cfg: RunConfig, asked: Mapping[str, Any]) -> Iterator[Plan]:
    """Behind `cfg` itself, each smaller than the one before as a rule. What was asked for stays."""
    if job == "infer":
        if not asked.keys() & {"memory.mode", "memory.swap_blocks"}:
            for mode in _MODES[_mode(cfg) + 1 :]:
                yield _plan(cfg, {"memory.mode": mode}, "weights are copied to the device again and again")
        return
    for changes in _ways(job, cfg, asked):
        if _place(changes) > _place(_now(cfg)):
            yield _plan(cfg, changes, "activations are computed again in the backward pass")
    # As many samples in a step, in more passes: sums in another order.
    smallest = list(_ways(job, cfg, asked))[-1]
    size, passes = cfg.train.batch_size, cfg.train.gradient_accumulation
    if not asked.keys() & {"train.batch_size", "train.gradient_accumulation"}:
        while size > 1 and size % 2 == 0:
            size, passes = size // 2, passes * 2
            cut = {"train.batch_size": size, "train.gradient_accumulation": passes}
            yield _plan(cfg, {**smallest, **cut}, "the same samples in more passes; last digits differ")
    if cfg.aux.losses and not cfg.aux.frames and "aux.frames" not in asked:
        frames = max(_SHORTEST, cfg.aux.window)
        if cfg.data.num_frames is not None and frames < cfg.data.num_frames:
            few = {**smallest, "train.batch_size": size, "train.gradient_accumulation": passes}
            costs = f"auxiliary losses look at {frames} frames of a clip in each step, not at all of them"
            yield _plan(cfg, {**few, "aux.frames": frames}, costs)


_SHORTEST: Final = 16
"""Frames that a judge of sync or TREPA looks at together (spec/losses-and-eval.md 1.3 and 3.2)."""


def faster_plans(job: str, cfg: RunConfig, asked: Mapping[str, Any]) -> Iterator[Plan]:
    """In front of `cfg` itself, the fastest first: it has room to spare. What was asked for stays."""
    if job == "infer":
        if not asked.keys() & {"memory.mode", "memory.swap_blocks"}:
            for mode in _MODES[: _mode(cfg)]:
                yield _plan(cfg, {"memory.mode": mode}, "")
        return
    for changes in _ways(job, cfg, asked):
        if _place(changes) < _place(_now(cfg)):
            yield _plan(cfg, changes, "")


def _mode(cfg: RunConfig) -> int:
    """The place in `_MODES`; what nobody has settled yet is counted as the first."""
    return 0 if cfg.memory.mode == "auto" else _MODES.index(cfg.memory.mode)


def _ways(job: str, cfg: RunConfig, asked: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Blocks that are computed again cost a forward pass of the transformer, more than one of the decoder."""
    for checkpointing in _open("memory.activation_checkpointing", _CHECKPOINTS, job, cfg, asked):
        for gradient in _open("memory.vae_gradient", _GRADIENTS, job, cfg, asked):
            yield {"memory.activation_checkpointing": checkpointing, "memory.vae_gradient": gradient}


def _open(
    dotted: str, values: tuple[str, ...], job: str, cfg: RunConfig, asked: Mapping[str, Any]
) -> list[str]:
    """The values that may be chosen: that have code, that nobody has asked for otherwise, and that matter."""
    now = getattr(cfg.memory, dotted.partition(".")[2])
    if dotted in asked or (dotted == "memory.vae_gradient" and not cfg.aux.losses):
        return [now]
    return [value for value in values if value not in keys()[dotted].not_yet(job)]


def _now(cfg: RunConfig) -> Mapping[str, Any]:
    memory = cfg.memory
    return {
        "memory.activation_checkpointing": memory.activation_checkpointing,
        "memory.vae_gradient": memory.vae_gradient,
    }


def _place(changes: Mapping[str, Any]) -> tuple[int, int]:
    return (
        _CHECKPOINTS.index(changes["memory.activation_checkpointing"]),
        _GRADIENTS.index(changes["memory.vae_gradient"]),
    )


def _plan(cfg: RunConfig, wanted: Mapping[str, Any], costs: str) -> Plan:
    """Only what differs from `cfg` is a change."""
    changes = {}
    for dotted, value in wanted.items():
        section, _, name = dotted.partition(".")
        if getattr(getattr(cfg, section), name) != value:
            changes[dotted] = value
            cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
    return Plan(cfg, changes, costs)
