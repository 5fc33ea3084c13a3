"""The outcome of a count: bytes by phase and by component, and what a card needs beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from avatarctl.placement.seats import ALLOWANCE

__all__ = ["Account"]


@dataclass(frozen=True)
class Account:
    """stages: the largest number of live bytes in each phase; weights: bytes of each network, wherever they
    are; parts: of each phase, what it was made of at its largest, by component; trained: numbers that are
    trained; host: bytes that waited on the host at most; packing: those of the largest unit, which the host
    holds twice while it is packed; host_parts: of `host`, by component."""

    stages: Mapping[str, int]
    weights: Mapping[str, int]
    parts: Mapping[str, Mapping[str, int]]
    trained: int
    host: int = 0
    packing: int = 0
    host_parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def live_bytes(self) -> int:
        """The largest of all phases."""
        return max(self.stages.values())

    @property
    def peak_bytes(self) -> int:
        """What a card needs: the live bytes and the allowance."""
        return round(self.live_bytes * (1 + ALLOWANCE))

    @property
    def components(self) -> dict[str, int]:
        """What is alive at the worst moment; their sum is `live_bytes`. Gradients count as far as they are
        made by then."""
        return dict(self.parts[max(self.stages, key=lambda name: self.stages[name])])

    def summary(self) -> dict[str, Any]:
        """As `--json` shows it."""
        return {
            "live_bytes": self.live_bytes,
            "peak_bytes": self.peak_bytes,
            "stages": dict(self.stages),
            "components": self.components,
            "components_by_stage": {stage: dict(parts) for stage, parts in self.parts.items()},
            "weights": dict(self.weights),
            "trained": self.trained,
            "host_bytes": self.host,
            "host_components": dict(self.host_parts),
        }
