"""Checkpoints that are complete."""

from __future__ import annotations

from pathlib import Path

from avatarctl.errors import UnusableWeights
from avatarctl.weights.metadata import read_own
from avatarctl.weights.recognise import read_weight_file, require_complete
from avatarctl.weights.weight_file import WeightFile

__all__ = ["open_model", "require_whole"]


def open_model(path: Path) -> WeightFile:
    """The complete checkpoint at `path`.

    Raises what `read_weight_file` and `require_complete` raise, and UnusableWeights for the second file of an
    adapter that is written as two: half of it would run and be wrong.
    """
    held = read_weight_file(path)
    require_whole(held)
    return held


def require_whole(held: WeightFile) -> None:
    """Raise what `open_model` raises for a checkpoint that is open."""
    if first := read_own(held.metadata).companion_of:
        raise UnusableWeights(
            f"is the second half of an adapter; its first file is {first[:100]}",
            where=held.path,
            fix=f"name {first[:100]}, which reads both",
        )
    require_complete(held)
