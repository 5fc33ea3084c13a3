"""What a running job tells the world: plain immutable events, handed to one callback.

Nothing below `cli/` prints. A library user passes any callable; `cli/` passes one that draws
with rich or writes JSON lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "BytesMoved",
    "Emit",
    "Event",
    "Notice",
    "OutputFinished",
    "PartDone",
    "Planned",
    "SampleFinished",
    "SpanFinished",
    "Stage",
    "StepFinished",
    "TrainingStepFinished",
    "silent",
]


@dataclass(frozen=True)
class Notice:
    """One line that a person should read: a choice made, a fallback taken, a doubt about an input."""

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True)
class Stage:
    """A phase begins, in the words of a screen: "reading the audio", "loading the model", "sampling"."""

    name: str


@dataclass(frozen=True)
class Planned:
    """The work is known: spans, what one is called (chunk, window or block), steps per span, pixel frames,
    size."""

    spans: int
    unit: str
    steps: int
    frames: int
    fps: int
    width: int
    height: int


@dataclass(frozen=True)
class StepFinished:
    """One sampling step of one span is done; both counted from 0."""

    span: int
    step: int


@dataclass(frozen=True)
class SpanFinished:
    """Frames of a span are decoded and handed to the encoder; `frames` counts all so far."""

    span: int
    frames: int


@dataclass(frozen=True)
class OutputFinished:
    """The output stands under its final name."""

    path: str
    frames: int
    seconds_to_first_frame: float
    frames_per_second: float


@dataclass(frozen=True)
class BytesMoved:
    """`done` of `total` bytes of `what` are fetched, checked or written; total 0 if it is not known."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class SampleFinished:
    """`done` of `total` samples, or videos to cut them from, are finished; seconds_left by what they took."""

    name: str
    what: Literal["sample", "video"]
    done: int
    total: int
    failed: int
    seconds_left: float


@dataclass(frozen=True)
class PartDone:
    """`done` of the whole work, 0 to 1, while it is at `what`; seconds_left by what the part took."""

    what: str
    done: float
    seconds_left: float


@dataclass(frozen=True)
class TrainingStepFinished:
    """`step` of `steps` optimizer steps are done; numbers: losses and the like of the last one, by name;
    seconds: that it took; memory: the most bytes that were in use so far, None where nobody tells."""

    step: int
    steps: int
    numbers: Mapping[str, float]
    seconds: float
    seconds_left: float
    memory: int | None = None


Event = (
    Notice
    | Stage
    | Planned
    | StepFinished
    | SpanFinished
    | OutputFinished
    | BytesMoved
    | SampleFinished
    | PartDone
    | TrainingStepFinished
)
Emit = Callable[[Event], None]


def silent(event: Event) -> None:
    """An `Emit` that drops everything."""
