"""Other ways of the same run, from the fastest to the smallest: what `vram-profile --fit` looks through.

The order is that of what a plan costs beside the run itself: operations that are made again, then bytes that
are moved while the device waits for them. What changes the result comes last, and is said (docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from avatarctl.config import keys

if TYPE_CHECKING:
    from avatarctl.config import RunConfig

__all__ = ["MODES", "Plan", "Swaps", "faster_plans", "slower_plans"]

MODES: Final = ("full", "model", "group", "sequential")
"""Of `memory.mode`, from the fastest to the smallest."""
_CHECKPOINTS: Final = ("none", "block")
_GRADIENTS: Final = ("full", "checkpoint", "segment", "offload")

_READ: Final = "networks are read one after another, each when the one before has left"
_COPIED: Final = "weights are copied to the device again and again"
_ROUNDED: Final = (
    "the transformer is stored in eight bits: its matrices are rounded, and the result is another"
)
_AGAIN: Final = "activations are computed again in the backward pass"


@dataclass(frozen=True)
class Plan:
    """changes: settings by dotted key; costs: what is given up, in words, empty where nothing is."""

    cfg: RunConfig
    changes: Mapping[str, Any] = field(default_factory=dict)
    costs: str = ""

    def __str__(self) -> str:
        return ", ".join(f"{dotted} {value}" for dotted, value in self.changes.items()) or "as it is"


@dataclass(frozen=True)
class Swaps:
    """The same with 1 to `blocks` blocks away: the fewer the faster, and the larger. of: the plan of a
    number."""

    blocks: int
    of: Callable[[int], Plan]


Step = Plan | Swaps


def slower_plans(
    job: str, cfg: RunConfig, asked: Mapping[str, Any], blocks: int = 0, *, rounded: bool = False
) -> Iterator[Step]:
    """Behind `cfg` itself, each smaller than the one before as a rule. What was asked for stays.

    blocks: of the transformer, 0 where none is to be swapped; rounded: plans that change the result are among
    them, behind all that leave it as it is: the transformer in eight bits, and shorter chunks or windows.
    """
    another = rounded
    rounded &= "memory.base_precision" not in asked and cfg.memory.base_precision != "fp8"
    if job == "infer":
        yield from _modes(cfg, asked, blocks, {})
        if rounded:
            stored = {"memory.base_precision": "fp8"}
            yield _plan(cfg, stored, _ROUNDED)
            yield from _modes(cfg, asked, blocks, stored)
        if another:
            yield from _shorter(cfg, asked)
        return
    yield from _of_training(job, cfg, asked, blocks, rounded)


def _modes(
    cfg: RunConfig, asked: Mapping[str, Any], blocks: int, more: Mapping[str, Any], stop: str = ""
) -> Iterator[Step]:
    """Modes of `infer` behind that of `cfg`, up to `stop`: model with blocks away stands before group, which
    has all of them away. more: settings of each."""
    if asked.keys() & {"memory.mode", "memory.swap_blocks"}:
        return
    costs = _ROUNDED if more else _COPIED
    first = _ROUNDED if more else _READ
    for mode in MODES[_mode(cfg) + 1 :]:
        if mode == "group" and blocks:
            yield _swaps(cfg, blocks, {"memory.mode": "model", **more}, costs)
        if mode == stop:
            return
        yield _plan(cfg, {"memory.mode": mode, **more}, first if mode == "model" else costs)


def _shorter(cfg: RunConfig, asked: Mapping[str, Any]) -> Iterator[Plan]:
    """With fewer frames in a chunk or window, in the smallest mode that is open."""
    now, overlap = cfg.long_video.num_frames, cfg.long_video.overlap_frames
    if now is None or overlap is None or "long_video.num_frames" in asked:
        return
    fixed = asked.keys() & {"memory.mode", "memory.swap_blocks"}
    mode = {} if fixed else {"memory.mode": MODES[-1]}
    what = "windows" if cfg.long_video.strategy == "fused" else "chunks"
    for frames in _FRAMES:
        if overlap + _LATENT < frames < now:
            costs = f"{what} of {frames} frames in place of {now}: another video"
            yield _plan(cfg, {**mode, "long_video.num_frames": frames}, costs)


_FRAMES: Final = (65, 49, 33)
_LATENT: Final = 4
"""Pixel frames of a latent frame: less than one of them new in a chunk is no chunk."""


def _of_training(
    job: str, cfg: RunConfig, asked: Mapping[str, Any], blocks: int, rounded: bool
) -> Iterator[Step]:
    for changes in _ways(job, cfg, asked):
        if _place(changes) > _place(_now(cfg)):
            yield _plan(cfg, changes, _AGAIN)
    smallest = list(_ways(job, cfg, asked))[-1]
    away: Mapping[str, Any] = smallest
    for dotted, value, costs in _AWAY:
        if dotted not in asked and _may(cfg, away, dotted):
            away = {**away, dotted: value}
            yield _plan(cfg, away, costs)
    frozen = cfg.train.mode == "lora" and away["memory.activation_checkpointing"] != "none"
    blocks = blocks if frozen and "memory.swap_blocks" not in asked else 0
    if blocks:
        yield _swaps(cfg, blocks, away, "blocks are copied to the device twice in each pass")
        away = {**away, "memory.swap_blocks": blocks}
    # As many samples in a step, in more passes: sums in another order.
    size, passes = cfg.train.batch_size, cfg.train.gradient_accumulation
    cut: dict[str, Any] = {}
    if not asked.keys() & {"train.batch_size", "train.gradient_accumulation"}:
        while size > 1 and size % 2 == 0:
            size, passes = size // 2, passes * 2
            cut = {"train.batch_size": size, "train.gradient_accumulation": passes}
            yield _plan(cfg, {**away, **cut}, "the same samples in more passes; last digits differ")
    if rounded and cfg.train.mode == "lora":
        stored = {**away, **cut, "memory.base_precision": "fp8"}
        if blocks:
            yield _swaps(cfg, blocks, stored, _ROUNDED)
        else:
            yield _plan(cfg, stored, _ROUNDED)
    if cfg.aux.losses and not cfg.aux.frames and "aux.frames" not in asked:
        frames = max(_SHORTEST, cfg.aux.window)
        if cfg.data.num_frames is not None and frames < cfg.data.num_frames:
            costs = f"auxiliary losses look at {frames} frames of a clip in each step, not at all of them"
            yield _plan(cfg, {**away, **cut, "aux.frames": frames}, costs)


_AWAY: Final = (
    ("memory.optimizer_device", "cpu", "moments are copied to the device and back in each step"),
    ("memory.activation_checkpointing", "block_offload", "inputs of blocks are copied to the host and back"),
)
"""What may wait on the host, from the fewest bytes to the most."""


def _may(cfg: RunConfig, away: Mapping[str, Any], dotted: str) -> bool:
    """Whether it is still with the weights."""
    if dotted == "memory.optimizer_device":
        return cfg.memory.optimizer_device != "cpu"
    return bool(away[dotted] == "block")


def _swaps(cfg: RunConfig, blocks: int, wanted: Mapping[str, Any], costs: str) -> Swaps:
    return Swaps(blocks, lambda number: _plan(cfg, {**wanted, "memory.swap_blocks": number}, costs))


_SHORTEST: Final = 16
"""Frames that a judge of sync or TREPA looks at together (spec/losses-and-eval.md 1.3 and 3.2)."""


def faster_plans(job: str, cfg: RunConfig, asked: Mapping[str, Any], blocks: int = 0) -> Iterator[Step]:
    """In front of `cfg` itself, the fastest first: it has room to spare. What was asked for stays."""
    if job == "infer":
        if _mode(cfg) and not asked.keys() & {"memory.mode", "memory.swap_blocks"}:
            yield _plan(cfg, {"memory.mode": "full"}, "")
            full = _plan(cfg, {"memory.mode": "full"}, "").cfg
            for step in _modes(full, asked, blocks, {}, stop=MODES[_mode(cfg)]):
                yield _changed(cfg, step)
        return
    for changes in _ways(job, cfg, asked):
        if _place(changes) < _place(_now(cfg)):
            yield _plan(cfg, changes, "")


def _changed(cfg: RunConfig, step: Step) -> Step:
    """Of a plan that was made for another `cfg`, what it changes in this one."""
    if isinstance(step, Swaps):
        return Swaps(step.blocks, lambda number: _plan(cfg, {**step.of(number).changes}, ""))
    return _plan(cfg, {"memory.mode": step.cfg.memory.mode}, "")


def _mode(cfg: RunConfig) -> int:
    """The place in `MODES`; what nobody has settled yet is counted as the first."""
    return 0 if cfg.memory.mode == "auto" else MODES.index(cfg.memory.mode)


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
    checkpointing = changes["memory.activation_checkpointing"].partition("_")[0]  # offloaded or not
    return (
        _CHECKPOINTS.index(checkpointing),
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
