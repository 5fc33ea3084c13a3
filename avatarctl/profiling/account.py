"""The outcome of a count: bytes by phase and by component, and what a card needs beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from avatarctl.placement.seats import ALLOWANCE

__all__ = ["Account"]


@dataclass(frozen=True)
class Account:
    """stages: the largest number of live bytes in each phase; weights: bytes of each network; components:
    other bytes by what they are; trained: numbers that are trained; host: bytes that wait on the host;
    packing: those of the largest unit, which the host holds twice while it is packed."""

    stages: Mapping[str, int]
    weights: Mapping[str, int]
    components: Mapping[str, int]
    trained: int
    host: int = 0
    packing: int = 0

    @property
    def live_bytes(self) -> int:
        """The largest of all phases."""
        return max(self.stages.values())

    @property
    def peak_bytes(self) -> int:
        """What a card needs: the live bytes and the allowance."""
        return round(self.live_bytes * (1 + ALLOWANCE))

    @property
    def held(self) -> dict[str, int]:
        """Beside the weights, what is alive at the worst moment: with them the live bytes. Of a training step
        gradients count as far as they are made by then. Where things wait on the host, nobody knows which of
        them are there at that moment: components alone."""
        if "moments" not in self.components or self.host:
            return dict(self.components)
        moments = self.components["moments"]
        rest = self.live_bytes - sum(self.weights.values()) - moments
        return {"moments": moments, "activations and gradients": rest}

    def summary(self) -> dict[str, Any]:
        """As `--json` shows it."""
        return {
            "live_bytes": self.live_bytes,
            "peak_bytes": self.peak_bytes,
            "stages": dict(self.stages),
            "components": {
                **{f"weights of {part}": size for part, size in self.weights.items()},
                **self.held,
            },
            "trained": self.trained,
            "host_bytes": self.host,
        }
