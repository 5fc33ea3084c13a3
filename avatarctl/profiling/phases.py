"""Bytes that are alive, phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from avatarctl.live_bytes import Component

__all__ = ["CACHES", "FRAMES", "GRADIENTS", "Counter", "Phases", "weights_of"]

CACHES: Final = "caches"
FRAMES: Final = "frames"
GRADIENTS: Final = "gradients"

_WORKS: Final = "activations"
_LEAVES: Final = {
    "load": "tables",
    "text": "text embeddings",
    "audio": "audio features",
    "image": "image latents and features",
    "condition": "conditions",
    "step": "latents",
    "decode": CACHES,
    "optimizer": "others",
    "loop": "latents and frames",
}
"""What a phase made that is alive behind it; what others made is activations still, for the backward pass."""


def weights_of(part: str) -> str:
    """The component of the weights of a network."""
    return f"weights of {part}"


class Counter(Protocol):
    """Live bytes, as `LiveBytes` or a card counts them."""

    @property
    def current(self) -> int:
        """Now."""

    @property
    def peak(self) -> int:
        """At most since the last `reset_peak`."""

    def reset_peak(self) -> None:
        """Starts again from what is alive now."""

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes of the peak by component; empty where they are not told apart."""
        return {}

    def charge(self, component: Component) -> Component:
        """What is made from now on belongs to it; returns the one before."""
        return component

    def assign(self, things: Any, name: str) -> None:
        """Tensors belong to the component of this name."""
        return


@dataclass
class Phases:
    """The largest number of live bytes in each phase, in the order in which phases were first met; `parts`:
    what these are, by component; `lives`: what was alive when it was left last.

    A phase inside another belongs to itself alone; what is outside of all is the loop's own. failed: the one
    that an exception came out of, innermost first; None as long as none did.
    """

    live: Counter
    peaks: dict[str, int] = field(default_factory=dict)
    lives: dict[str, int] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    failed: str | None = None
    _now: str = "loop"
    _outer: str = ""
    _error: int = 0
    _component: Component = field(default_factory=lambda: Component(_LEAVES["loop"]))

    def __post_init__(self) -> None:
        self.live.charge(self._component)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before, outer = self._now, self._component
        self._note()
        self._begin(name)
        try:
            yield
        except BaseException as error:
            if self._error != id(error):
                self.failed, self._error = self._now, id(error)
            raise
        finally:
            self._end()
            self._now, self._component = before, outer
            self.live.charge(outer)

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A phase whose inner ones have names of their own: "validation" and "validation step"."""
        before, self._outer = self._outer, f"{name} "
        try:
            with self(name):
                yield
        finally:
            self._outer = before

    def turn(self, name: str) -> None:
        """The phase that the block is in ends here, and another begins; both end with the block."""
        self._end()
        self._begin(name)

    def _begin(self, name: str) -> None:
        inner = self._outer and name != self._outer.rstrip()
        self._now, self._component = f"{self._outer}{name}" if inner else name, Component(_WORKS)
        self.live.charge(self._component)

    def _end(self) -> None:
        self._component.name = _LEAVES.get(self._now.removeprefix(self._outer), _WORKS)
        self._note()

    def end(self) -> None:
        """Notes what is outside of all phases."""
        self._note()

    def _note(self) -> None:
        # Of equal ones the last: moments of a first step are told apart from behind it on.
        if self.live.peak >= self.peaks.get(self._now, 0):
            self.peaks[self._now], self.parts[self._now] = self.live.peak, self.live.at_peak
        self.lives[self._now] = self.live.current
        self.live.reset_peak()

    def wrapped(self, function: Callable[..., Any], name: str | Callable[..., str]) -> Callable[..., Any]:
        """The function as a phase. name: or what gives it, from the arguments."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        return call

    @property
    def peak(self) -> int:
        """Of all phases."""
        return max([*self.peaks.values(), self.live.peak])
