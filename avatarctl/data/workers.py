"""Processes that read and hand over what they read, through pipes and in small pieces.

Shared memory (`/dev/shm`) is 64 MB in many containers and is not used: arrays travel beside the rest of a
result, a piece at a time, and a process that has nobody to hand over to waits. So each holds one result.
Results come in the order of the jobs, whoever made them; with no processes the same calls are made here.
"""

from __future__ import annotations

import atexit
import multiprocessing
import pickle
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final

from avatarctl.errors import AvatarctlError, UnusableFile

__all__ = ["Outcome", "encoding_threads", "run_jobs"]

_PIECE: Final = 1 << 20
_PATIENCE: Final = 5.0  # seconds for a process to end by itself

_THREADS: Final = 1
"""Of torch on a CPU. Fixed, as another number rounds sums in another order; more cores are for more shards.
Two, with another program on the same cores, wait for each other: 10 to 20 times the CPU seconds."""

Job = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True)
class Outcome:
    """What a job returned, or why it could not."""

    value: Any = None
    problem: AvatarctlError | None = None


def run_jobs(jobs: Iterable[Job], workers: int) -> Iterator[Outcome]:
    """Calls module-level functions with picklable arguments, `workers` of them ahead; one outcome for each
    job, in order. What is no `AvatarctlError` is raised here. Leaving the iterator ends the processes."""
    if workers == 0:
        for function, arguments in jobs:
            yield _outcome(function, arguments)
        return
    waiting: deque[_Worker] = deque()
    idle = [_Worker() for _ in range(workers)]
    try:
        for job in jobs:
            if not idle:
                worker = waiting.popleft()
                yield worker.take()
                idle.append(worker)
            worker = idle.pop()
            worker.give(job)
            waiting.append(worker)
        while waiting:
            worker = waiting.popleft()
            idle.append(worker)
            yield worker.take()
    finally:
        for worker in (*idle, *waiting):
            worker.stop()


class encoding_threads:  # noqa: N801 - used as a block
    """A fixed number of torch's threads, put back afterwards."""

    def __enter__(self) -> None:
        import torch

        self._before = torch.get_num_threads()
        torch.set_num_threads(_THREADS)

    def __exit__(self, *error: object) -> None:
        import torch

        torch.set_num_threads(self._before)


class _Worker:
    """One process, started when it is first given something."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def give(self, job: Job) -> None:
        if self._pipe is None:
            # A fresh interpreter: a fork of one with threads may hang, and would keep its memory.
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            _started.add(self)
        with suppress(OSError):  # it died; `take` says so
            self._pipe.send(job)

    def take(self) -> Outcome:
        assert self._pipe is not None
        try:
            return _receive(self._pipe)
        except (EOFError, OSError):
            code = self.stop()
            return Outcome(problem=UnusableFile(f"the process that read it ended by itself (code {code})"))

    def stop(self) -> int | None:
        """Ends the process, which may be in the middle of something; its exit code."""
        code = None
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.join(0 if self._process.is_alive() else _PATIENCE)
            if self._process.is_alive():
                self._process.kill()  # it ignores SIGTERM; it only reads
                self._process.join(_PATIENCE)
            code = self._process.exitcode
        self._process = self._pipe = None
        _started.discard(self)
        return code


_started: Final[weakref.WeakSet[_Worker]] = weakref.WeakSet()


def _stop_all() -> None:
    """Before multiprocessing ends what is left by SIGTERM, which nobody obeys here, and waits for it."""
    for worker in list(_started):
        worker.stop()


atexit.register(_stop_all)


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Outcome:
    try:
        return Outcome(function(*arguments))
    except AvatarctlError as problem:
        return Outcome(problem=problem)


def _serve(pipe: Connection) -> None:
    """The process: jobs in, outcomes out, until the other end is closed or gone."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the run decides, and closes the pipe
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    with suppress(EOFError, OSError):
        while True:
            function, arguments = pipe.recv()
            try:
                result: Outcome | BaseException = _outcome(function, arguments)
            except Exception as bug:
                result = bug
            _send(pipe, result)
            del result


def _send(pipe: Connection, result: object) -> None:
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(result, protocol=5, buffer_callback=arrays.append)
    views = [array.raw() for array in arrays]
    pipe.send((head, [len(view) for view in views]))
    for view in views:
        for start in range(0, len(view), _PIECE):
            pipe.send_bytes(view[start : start + _PIECE])


def _receive(pipe: Connection) -> Outcome:
    head, sizes = pipe.recv()
    arrays = [bytearray(size) for size in sizes]
    for array in arrays:
        for start in range(0, len(array), _PIECE):
            pipe.recv_bytes_into(array, start)
    result = pickle.loads(head, buffers=arrays)
    if isinstance(result, BaseException):
        raise result
    assert isinstance(result, Outcome)
    return result
