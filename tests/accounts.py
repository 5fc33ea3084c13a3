"""Counts as tests need them: of what they were made is of no matter."""

from __future__ import annotations

from collections.abc import Mapping

from avatarctl.profiling.account import Account


def account(
    stages: Mapping[str, int],
    weights: Mapping[str, int] | None = None,
    host: int = 0,
    packing: int = 0,
    trained: int = 0,
) -> Account:
    """All of each phase are activations."""
    parts = {stage: {"activations": size} for stage, size in stages.items()}
    return Account(stages, weights or {}, parts, trained, host, packing)
