"""Bytes that are alive, phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Counter", "Phases"]


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


@dataclass
class Phases:
    """The largest number of live bytes in each phase, in the order in which phases were first met; `lives`:
    what was alive when it was left last.

    A phase inside another belongs to itself alone; what is outside of all is the loop's own. failed: the one
    that an exception came out of, innermost first; None as long as none did.
    """

    live: Counter
    peaks: dict[str, int] = field(default_factory=dict)
    lives: dict[str, int] = field(default_factory=dict)
    failed: str | None = None
    _now: str = "loop"
    _error: int = 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = self._now
        self._note()
        self._now = name
        try:
            yield
        except BaseException as error:
            if self._error != id(error):
                self.failed, self._error = self._now, id(error)
            raise
        finally:
            self._note()
            self._now = before

    def turn(self, name: str) -> None:
        """The phase that the block is in ends here, and another begins; both end with the block."""
        self._note()
        self._now = name

    def end(self) -> None:
        """Notes what is outside of all phases."""
        self._note()

    def _note(self) -> None:
        self.peaks[self._now] = max(self.peaks.get(self._now, 0), self.live.peak)
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
