"""Many processes for one command: those that `--gpus N` starts here, or torchrun and accelerate elsewhere."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from avatarctl.cli.signals import stop_on_signals, stop_signals
from avatarctl.config import preset_folder
from avatarctl.errors import AvatarctlError, EnvironmentMissing, Interrupted, NotYetSupported, UsageError

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.parallel.world import World

__all__ = [
    "Place",
    "found_place",
    "ignored_precision",
    "joined",
    "listening",
    "meeting_place",
    "start_processes",
]

_NEEDED: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets, and accelerate launch by it."""
_FOREIGN: Final = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration of accelerate",
}
_ALONE: Final = 99
"""Exit code of a process that lost another one: not the cause, for whoever started both."""
_GRACE: Final = 10.0
"""Seconds for the others to end by themselves when one has died, and again before they are killed."""
_LOOK: Final = 0.2


@dataclass(frozen=True)
class Place:
    """Of a process among `size`. meeting: where they find each other, as torch.distributed takes it; starter:
    says something, or ends, when the process that started this one wants it to stop; shard: whether whoever
    started it wants each to hold a part of the model."""

    rank: int
    size: int
    local: int
    meeting: str = "env://"
    starter: Connection | None = None
    shard: bool = False


def found_place(environ: Mapping[str, str]) -> Place | None:
    """The place that torchrun or accelerate launch gave this process; None where it is alone.

    Raises UsageError for an environment that is not whole, NotYetSupported for one that asks for weights
    to be spread over the processes otherwise than by FSDP2.
    """
    for name, title in _FOREIGN.items():
        if _is_on(environ, name):
            raise NotYetSupported(
                f"{title} is not used for training",
                where=name,
                fix=f"accelerate launch --config_file {_sharded()}, or -o memory.shard=fsdp2",
            )
    shard = _is_on(environ, "ACCELERATE_USE_FSDP")
    if shard and environ.get("FSDP_VERSION") != "2":
        raise NotYetSupported(
            "of FSDP only the second version is used for training",
            where="FSDP_VERSION",
            fix=f"fsdp_version: 2, as in {_sharded()}",
        )
    if shard and _is_on(environ, "FSDP_OFFLOAD_PARAMS"):
        raise NotYetSupported(
            "parts of weights stay on their card",
            where="FSDP_OFFLOAD_PARAMS",
            fix="fsdp_offload_params: false",
        )
    size = environ.get("WORLD_SIZE") or "1"
    if size == "1":
        return None
    for name in _NEEDED:
        if not environ.get(name):
            raise UsageError(
                f"WORLD_SIZE is {size}, and {name} is not set",
                where="environment",
                fix="start it by torchrun or accelerate launch, or by --gpus N without WORLD_SIZE",
            )
        if name != "MASTER_ADDR" and not environ[name].isdecimal():
            raise UsageError(f"{name} is no number: {environ[name][:40]!r}", where="environment")
    return Place(int(environ["RANK"]), int(size), int(environ["LOCAL_RANK"]), shard=shard)


def _sharded() -> Path:
    """The file by which accelerate asks for what we have of this kind."""
    return preset_folder() / "accelerate" / "fsdp2.yaml"


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes")


def ignored_precision(environ: Mapping[str, str], place: Place | None, cfg: RunConfig) -> str | None:
    """A line where accelerate launch asks for another precision than the run has."""
    asked = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if place is None or asked == "no" or (asked == "bf16" and cfg.runtime.dtype == "bfloat16"):
        return None
    return f"accelerate's mixed_precision {asked} is not used: --dtype decides, and it is {cfg.runtime.dtype}"


@contextlib.contextmanager
def joined(place: Place | None, cfg: RunConfig) -> Iterator[World]:
    """The processes of the run. An error that all of them share is said by the main one alone.

    Raises EnvironmentMissing for a card that is not there, and where they do not find each other.
    """
    from avatarctl.parallel.world import ProcessLost, World

    if place is None:
        yield World()
        return
    from avatarctl.models.device import resolve_device

    world = World(place.rank, place.size, place.local)
    world.join(place.meeting, cfg.runtime.device.partition(":")[0])
    try:
        with world.together():
            resolve_device(world.device(cfg.runtime.device))
        yield world
    except ProcessLost as error:
        if place.starter is not None:  # which tells of the one that is lost
            raise click.exceptions.Exit(_ALONE) from error
        raise
    except AvatarctlError as error:
        if error is not world.agreed:
            raise
        world.leave()
        if not world.is_main:
            raise click.exceptions.Exit(error.exit_code) from error
        raise
    world.leave()


@contextlib.contextmanager
def listening(place: Place | None) -> Iterator[Callable[[], bool]]:
    """Yields whether a signal or the starter wants this process to stop."""
    if place is None:
        with stop_on_signals() as asked:
            yield asked
        return
    starter = place.starter
    with stop_on_signals(one_of_many=True, quiet=place.rank > 0 or starter is not None) as asked:
        yield lambda: asked() or (starter is not None and starter.poll())


def start_processes(
    size: int, target: Callable[..., None], arguments: tuple[Any, ...], *, method: str = "spawn"
) -> int:
    """Calls `target(*arguments, place)` in `size` processes of this machine; their exit code.

    Signals are passed on as a wish. Where a process dies the others are ended. Raises Interrupted for one
    that a signal ended.
    """
    context = multiprocessing.get_context(method)
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with meeting_place() as meeting, stop_on_signals() as should_stop:
        try:
            for rank in range(size):
                theirs, ours = context.Pipe(duplex=False)
                place = Place(rank, size, rank, meeting, theirs)
                process = context.Process(target=_serve, args=(target, arguments, place))  # type: ignore[attr-defined]
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            codes = _watched(processes, pipes, should_stop)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return _cause(codes)


@contextlib.contextmanager
def meeting_place() -> Iterator[str]:
    """Where processes of this machine find each other: a file. A port that is free now may be taken a moment
    later. Raises EnvironmentMissing where there can be none."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="avatarctl-")
    except OSError as error:
        fix = "set TMPDIR to a folder that can be written"
        raise EnvironmentMissing("there is no usable temporary folder", fix=fix) from error
    with folder as name:
        yield f"file://{Path(name).absolute() / 'meeting'}"


def _watched(
    processes: list[BaseProcess], pipes: list[Connection], should_stop: Callable[[], bool]
) -> dict[int, int]:
    """The exit codes of the processes that ended by themselves, in the order in which they did."""
    codes: dict[int, int] = {}
    told, failed_at, asked = False, 0.0, 0
    while True:
        alive = [process for rank, process in enumerate(processes) if rank not in codes]
        if not alive:
            return codes
        wait([process.sentinel for process in alive], _LOOK)
        for rank, process in enumerate(processes):
            if rank not in codes and process.exitcode is not None:
                codes[rank] = process.exitcode if not asked else _ALONE
                failed_at = failed_at or (time.monotonic() if codes[rank] else 0.0)
        if should_stop() and not told:
            told = True
            for pipe in pipes:
                with contextlib.suppress(OSError):  # it has ended
                    pipe.send_bytes(b"stop")
        if failed_at and time.monotonic() - failed_at > _GRACE * (asked + 1):
            asked += 1
            for process in alive:
                process.terminate() if asked == 1 else process.kill()


def _cause(codes: Mapping[int, int]) -> int:
    """The exit code of all: of the first that failed by itself."""
    failed = {rank: code for rank, code in codes.items() if code not in (0, _ALONE)}
    if not failed:
        if not any(codes.values()):
            return 0
        raise Interrupted("the processes of this run lost each other")
    rank, code = next(iter(failed.items()))
    if code > 0:
        return code  # and it has said why
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    raise Interrupted(
        f"process {rank} of {len(codes)} (counted from 0) was ended by {name}, and the others with it",
        fix="the same command with --resume auto goes on behind the last checkpoint",
    )


def _serve(target: Callable[..., None], arguments: tuple[Any, ...], place: Place) -> NoReturn:
    """A process that `start_processes` made."""
    from avatarctl.cli.app import exit_code_of
    from avatarctl.cli.screen import spell_out
    from avatarctl.cli.start import let_waiting_threads_sleep

    let_waiting_threads_sleep()
    _share_cores(place.size)
    for stream in (sys.stdout, sys.stderr):
        spell_out(stream)
    for each in stop_signals():
        signal.signal(each, _end)

    def work() -> None:
        try:
            target(*arguments, place)
        except _Ended as ended:
            raise click.exceptions.Exit(Interrupted.exit_code) from ended

    code = exit_code_of(work)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for reader in multiprocessing.active_children():
        reader.terminate()
    # Not by taking the interpreter down: threads of a connection that outlive it abort the process, one time
    # in eight where all ended at an early error, and its exit code is then that of a signal.
    os._exit(code)


class _Ended(BaseException):
    """A signal before or after the run listens, or a second one: whoever started this process tells of it."""


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise _Ended


def _share_cores(size: int) -> None:
    """What torchrun leaves at one thread: each process takes its part of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // size)))
    if sys.platform in ("linux", "darwin"):  # they are on one machine, whatever its name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
