"""Events on the screen: a progress display for a terminal, plain lines for a log. Always standard error."""

from __future__ import annotations

import codecs
import contextlib
import io
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from avatarctl.errors import printable
from avatarctl.events import (
    BytesMoved,
    Event,
    Notice,
    OutputFinished,
    PartDone,
    Planned,
    SampleFinished,
    SpanFinished,
    Stage,
    StepFinished,
    TrainingStepFinished,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Screen", "spell_out"]

LONG_MOVE = 10**9
"""Bytes from which a log says how far they are."""

LONG_WORK = 10.0
"""Seconds, of all the work, from which a log says how far it is."""

_LEVELS = ("debug", "info", "warning", "error")
_SPELLED_OUT = {"…": "...", "–": "-", "—": "-", "→": "->", "×": "x", "±": "+-", "“": '"', "”": '"', "’": "'"}


def _replacement(error: UnicodeError) -> tuple[str, int]:
    """What codecs ask of a handler: text for what cannot be encoded, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    refused = error.object[error.start : error.end]
    escaped = (
        _SPELLED_OUT.get(char) or char.encode("ascii", "backslashreplace").decode() for char in refused
    )
    return "".join(escaped), error.end


codecs.register_error("avatarctl-spelled-out", _replacement)


def spell_out(stream: TextIO) -> None:
    """Let a stream whose encoding lacks a sign (ASCII, Latin-1) write it with the signs it has, or escaped:
    neither "\\u2026" for an ellipsis nor a failure at somebody's name."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="avatarctl-spelled-out")


class Screen:
    """An `Emit` that draws. A context manager: leaving it takes the progress display away.

    level: `runtime.log_level`; "warning" shows nothing but warnings, "error" nothing at all.
    """

    def __init__(self, level: str, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        spell_out(self._stream)
        self._rank = _LEVELS.index(level)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._plan: Planned | None = None
        self._moving = ""
        self._tenth = 0

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_progress()

    def __call__(self, event: Event) -> None:
        match event:
            case Notice(text, level):
                self.line(f"warning: {text}" if level == "warning" else text, level)
            case Stage(name):
                self.line(f"{name} …", "debug" if name == "sampling" else "info")
            case Planned():
                self._plan = event
                self.line(
                    f"{_count(event.frames, 'frame')} of {event.width}x{event.height} at {event.fps} fps, "
                    f"{_count(event.spans, event.unit)} of {_count(event.steps, 'step')}"
                )
                self._start_progress(event)
            case StepFinished(span):
                self._advance(span)
            case SpanFinished(span, frames):
                if self._progress is None and self._plan is not None:
                    self.line(
                        f"{self._plan.unit} {span + 1} of {self._plan.spans}: "
                        f"{frames} of {_count(self._plan.frames, 'frame')}"
                    )
            case BytesMoved():
                self._move(event)
            case SampleFinished():
                self._sample(event)
            case PartDone():
                self._part(event)
            case TrainingStepFinished():
                self._train(event)
            case OutputFinished():
                self._end_progress()
                self.line(
                    f"{_count(event.frames, 'frame')}, the first after {event.seconds_to_first_frame:.1f} s, "
                    f"{event.frames_per_second:.1f} frames per second"
                )

    def line(self, text: str, level: str = "info") -> None:
        """One line, if the level asks for it; strangers' control characters are escaped."""
        if _LEVELS.index(level) < self._rank:
            return
        with self._unread():
            if self._progress is not None:
                self._progress.console.print(printable(text), markup=False, highlight=False)
            else:
                print(printable(text), file=self._stream, flush=True)

    @staticmethod
    def _unread() -> contextlib.AbstractContextManager[None]:
        """A reader that went away (`2>&1 | head`), a full disk behind `2> log` or a terminal that was closed
        is no reason to give up hours of work."""
        return contextlib.suppress(OSError)

    def _start_progress(self, plan: Planned) -> None:
        if not self._stream.isatty() or self._rank > _LEVELS.index("info"):
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            transient=True,
        )
        self._task = self._progress.add_task("sampling", total=plan.spans * plan.steps)
        with self._unread():
            self._progress.start()

    def _advance(self, span: int) -> None:
        """Steps are counted, not told from where they are: windows take them in turns."""
        if self._progress is not None and self._task is not None and self._plan is not None:
            with self._unread():
                self._progress.update(
                    self._task,
                    advance=1,
                    description=f"{self._plan.unit} {span + 1} of {self._plan.spans}",
                )

    def _move(self, event: BytesMoved) -> None:
        """A bar for a terminal; in a log a line per tenth of what takes long."""
        if event.what != self._moving:
            self._end_progress()
            self._moving, self._tenth = event.what, 0
            self._start_moving(event)
        if self._progress is not None and self._task is not None:
            with self._unread():
                self._progress.update(self._task, completed=event.done)
        elif event.total >= LONG_MOVE and event.done * 10 // event.total > self._tenth:
            self._tenth = event.done * 10 // event.total
            self.line(f"{event.what}: {self._tenth * 10} %")
        if event.done == event.total:
            self._end_progress()

    def _sample(self, event: SampleFinished) -> None:
        """A bar for a terminal; in a log every sample of a few, a line per twentieth of many."""
        failed = f", {event.failed} failed" if event.failed else ""
        if event.done == 1:
            self._start_bar(f"{event.what}s", event.total)
        if self._progress is not None and self._task is not None:
            with self._unread():
                self._progress.update(self._task, completed=event.done, description=f"{event.what}s{failed}")
        elif event.done * 20 // event.total > (event.done - 1) * 20 // event.total:
            left = f", {_duration(event.seconds_left)} left" if event.done < event.total else ""
            self.line(f"{event.what} {event.done} of {event.total}{failed}{left}")
        if event.done == event.total:
            self._end_progress()

    def _train(self, event: TrainingStepFinished) -> None:
        """A bar for a terminal, losses above it; in a log a line per twentieth of the steps."""
        numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in event.numbers.items())
        cost = f"{_pace(event.seconds)} a step"
        if event.memory is not None:
            cost += f", {event.memory / (1 << 30):.2f} GiB"
        left = f"{_duration(event.seconds_left)} left" if event.step < event.steps else ""
        if self._task is None or self._progress is None:
            self._start_training(event.steps)
        if self._progress is not None and self._task is not None:
            with self._unread():
                self._progress.update(
                    self._task, completed=event.step, description=cost, numbers=numbers, left=left
                )
        elif event.step * 20 // event.steps > (event.step - 1) * 20 // event.steps:
            told = ", ".join(filter(None, (cost, left)))
            self.line(f"step {event.step} of {event.steps}: {numbers}; {told}")
        if event.step == event.steps:
            self._end_progress()

    def _start_training(self, total: int) -> None:
        """Two lines, as losses alone fill one. Time left is the trainer's: a bar knows none while its steps
        take half a minute."""
        if not self._stream.isatty() or self._rank > _LEVELS.index("info"):
            return
        from rich.console import Console, RenderableType
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.text import Text

        class WithNumbers(Progress):
            def get_renderables(self) -> Iterator[RenderableType]:
                yield from (Text(task.fields["numbers"]) for task in self.tasks)
                yield self.make_tasks_table(self.tasks)

        self._end_progress()
        self._progress = WithNumbers(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(file=self._stream),
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, numbers="", left="")
        with self._unread():
            self._progress.start()

    def _start_bar(self, what: str, total: int) -> None:
        if not self._stream.isatty() or self._rank > _LEVELS.index("info"):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._end_progress()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            transient=True,
        )
        self._task = self._progress.add_task(what, total=total)
        with self._unread():
            self._progress.start()

    def _part(self, event: PartDone) -> None:
        """A bar for a terminal; in a log a line per tenth."""
        if self._progress is None and self._stream.isatty() and self._rank <= _LEVELS.index("info"):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                transient=True,
            )
            self._task = self._progress.add_task("", total=1.0)
            with self._unread():
                self._progress.start()
        if self._progress is not None and self._task is not None:
            with self._unread():
                self._progress.update(self._task, completed=event.done, description=printable(event.what))
        elif int(event.done * 10) > self._tenth and event.seconds_left >= LONG_WORK * (1 - event.done):
            self._tenth = int(event.done * 10)
            self.line(f"{event.what}: {self._tenth * 10} %, {_duration(event.seconds_left)} left")

    def _start_moving(self, event: BytesMoved) -> None:
        if not self._stream.isatty() or self._rank > _LEVELS.index("info"):
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            transient=True,
        )
        self._task = self._progress.add_task(printable(event.what), total=event.total or None)
        with self._unread():
            self._progress.start()

    def _end_progress(self) -> None:
        self._moving = ""
        if self._progress is not None:
            with self._unread():
                self._progress.stop()
            self._progress = None


def _duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _pace(seconds: float) -> str:
    """Of one step, which may take milliseconds or minutes."""
    return f"{seconds:.2g} s" if seconds < 10 else _duration(seconds)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
