"""Settings of `memory` that a training run cannot have together, told before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avatarctl.errors import UsageError

if TYPE_CHECKING:
    from avatarctl.config import RunConfig

__all__ = ["check_memory"]


def check_memory(cfg: RunConfig) -> None:
    """Raises UsageError for what would save nothing, ExtraMissing for an optimizer that is not here."""
    if cfg.memory.shard != "none":
        _check_sharding(cfg)
    if cfg.memory.swap_blocks:
        _check_swapping(cfg)
    if cfg.memory.base_precision == "fp8" and cfg.train.mode == "full":
        raise UsageError(
            "every weight is trained, and only a frozen one can be stored in eight bits",
            where="memory.base_precision",
            fix="--mode lora",
        )
    if cfg.train.optimizer != "adamw":
        from avatarctl.training.optimizer import require_optimizer

        require_optimizer(cfg.train.optimizer)


def _check_swapping(cfg: RunConfig) -> None:
    """Raises UsageError where blocks that leave would gain nothing."""
    key = "memory.swap_blocks"
    if cfg.train.mode == "full":
        raise UsageError(
            "every weight is trained, and none can wait on the host", where=key, fix="--mode lora"
        )
    if cfg.memory.activation_checkpointing == "none":
        raise UsageError(
            "blocks that are kept for the backward pass cannot leave before it",
            where=key,
            fix="memory.activation_checkpointing block",
        )


def _check_sharding(cfg: RunConfig) -> None:
    """Raises UsageError for what parts of weights cannot do."""
    others = {
        "memory.swap_blocks": (cfg.memory.swap_blocks, 0),
        "memory.optimizer_device": (cfg.memory.optimizer_device == "cpu", False),
        "train.optimizer": (cfg.train.optimizer == "adamw8bit", False),
    }
    for where, (now, plain) in others.items():
        if now != plain:
            raise UsageError(
                "does not go together with memory.shard fsdp2, by which each card has a part of everything",
                where=where,
                fix="leave one of them out",
            )
