"""`avatarctl train i2v` and `train v2v`: samples to weights."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from avatarctl.cli.app import CommandGroup
from avatarctl.cli.infer import _row, tell_checkpoint
from avatarctl.cli.launch import Place, found_place, ignored_precision, joined, listening, start_processes
from avatarctl.cli.memory_mode import free_room
from avatarctl.cli.options import EXAMPLE_MODEL, ConfigCommand, Request, config_options, read_request
from avatarctl.cli.run_file import with_absolute_paths
from avatarctl.cli.screen import Screen
from avatarctl.cli.video_output import leaving_no_empty_folder
from avatarctl.config import RunConfig, dump_run, require_supported
from avatarctl.errors import (
    AvatarctlError,
    DoesNotFit,
    NotYetSupported,
    PathNotFound,
    UsageError,
    WeightsMissing,
    printable,
)
from avatarctl.events import Notice
from avatarctl.placement.seats import shown
from avatarctl.registry import COMPAT, NOT_YET, ROWS, Row

if TYPE_CHECKING:
    from avatarctl.parallel.world import World
    from avatarctl.profiling.happened import TrainingHappened
    from avatarctl.training.run import TrainingResult, TrainingRun

__all__ = ["train"]

Name = Literal["train i2v", "train v2v"]

_DEFAULT_MODELS: Final[Mapping[Name, str]] = {"train i2v": "cartoon-i2v", "train v2v": "cartoon-v2v"}
_CHANNELS: Final[Mapping[Name, str]] = {"train i2v": "", "train v2v": " --channels 49"}
"""What published weights, which have 33, need in the examples."""
_PATHS: Final = ("data.path", "data.mask", "data.faces")
_DRAWN: Final = range(8)
"""Seeds of the clips that are drawn where no data set is given."""

_EXAMPLES: Final = """\b
Examples:
  avatarctl train {which} --aux sync,lpips
  avatarctl train {which} --data samples --model {model}{channels} --out runs/mine
  avatarctl train {which} --resume runs/mine
"""


def _trained_row(name: str) -> Row:
    """The row of a model, or of a base that one is made of."""
    from avatarctl.registry import based_on

    return based_on(name) or _row(name)


def _reader(command: Name) -> Callable[..., Request]:
    def read(params: Mapping[str, Any], row_of: Callable[[str], Row] = _trained_row) -> Request:
        default = _DEFAULT_MODELS[command]
        run = next((each for each in params.get("checkpoint__resume") or () if each != "auto"), None)
        if run is not None and not params["config"]:
            # A run that is named goes on as it was started; of `auto` the same command is expected.
            folder = _run_of(run)[0]
            params = {**params, "config": (str(folder / "run.yaml"),)}
        return read_request(command, params, lambda name: row_of(name).for_config, COMPAT, default)

    return read


@click.group(
    cls=CommandGroup,
    short_help="Teach a model new faces, voices and languages.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
def train() -> None:
    """Teach a model new faces, voices and languages."""


def _command(name: Name, short: str) -> Callable[[Callable[..., None]], click.Command]:
    return train.command(
        name=name.split()[1],
        cls=ConfigCommand,
        read=_reader(name),
        epilog=_EXAMPLES.format(which=name.split()[1], model=EXAMPLE_MODEL, channels=_CHANNELS[name]),
        context_settings={"help_option_names": ["-h", "--help"]},
        short_help=short,
        params=config_options(name),
    )


@_command("train i2v", "Train a model that starts from an image.")
def i2v(**params: Any) -> None:
    """Train a model that starts from an image, on a folder or list of samples (--data).

    Without --data it learns from a few drawn clips. --resume auto goes on where a run stopped, bit for bit.
    """
    _run("train i2v", params)


@_command("train v2v", "Train a model that gives a video another mouth.")
def v2v(**params: Any) -> None:
    """Train a model that gives a video another mouth, on a folder or list of samples (--data).

    Without --data it learns from a few drawn clips. --resume auto goes on where a run stopped, bit for bit.
    """
    _run("train v2v", params)


def _run(command: Name, params: Mapping[str, Any], place: Place | None = None) -> None:
    """place: of this process among others, where a process of ours started it."""
    row_named = functools.cache(_trained_row)
    request = _reader(command)(params, row_named)
    cfg = request.resolved.cfg
    require_supported(cfg, command, request.resolved.origins)
    assert cfg.model.name is not None
    row = row_named(cfg.model.name)
    place = place or found_place(os.environ)
    if place is None and cfg.runtime.gpus > 1 and not request.dry_run:
        raise click.exceptions.Exit(start_processes(cfg.runtime.gpus, _run, (command, params)))
    with joined(place, cfg) as world:
        here = _of_this_process(request, world, place)
        _run_here(command, here, row, world, place, row_named, says_length=_says_length(params))


def _of_this_process(request: Request, world: World, place: Place | None) -> Request:
    """The request with as many processes as there are, whoever started them, and shares of the model where
    that wants them."""
    resolved = request.resolved
    if world.size == 1:
        return request
    cfg = replace(resolved.cfg, runtime=replace(resolved.cfg.runtime, gpus=world.size))
    if place is not None and place.shard:
        cfg = replace(cfg, memory=replace(cfg.memory, shard="fsdp2"))
    return replace(request, resolved=replace(resolved, cfg=cfg))


def _run_here(
    command: Name,
    request: Request,
    row: Row,
    world: World,
    place: Place | None,
    row_named: Callable[[str], Row],
    *,
    says_length: bool,
) -> None:
    """What one process does. says_length: whether the command says how many steps the run has."""
    cfg, asked = request.resolved.cfg, row
    from avatarctl.families import family_named

    of_the_row = request.resolved.is_of_the_row
    with world.together():
        if row.status == NOT_YET or not hasattr(family := family_named(row.family), "training_condition"):
            raise NotYetSupported(f"{row.name} is not trained yet", where="model.name")
        from avatarctl.training.audio_offset import settled_offset
        from avatarctl.training.run import WITH_SEQUENCE

        if command == "train v2v" and cfg.data.reference_sequence and of_the_row("model.channels"):
            cfg = replace(cfg, model=replace(cfg.model, channels=WITH_SEQUENCE))
        set_offset = not of_the_row("model.audio_offset")
        cfg, offset = settled_offset(cfg, row, of_video=command == "train v2v", asked=set_offset)
        where = _place(command, cfg, row)
    folder, resume, step, found = world.from_main(where)
    cfg = _pinned(command, cfg, row, folder)
    if resume and not says_length:
        cfg = _as_long(cfg, folder, step)
    assert cfg.model.name is not None
    row = row_named(cfg.model.name)
    with (
        Screen(cfg.runtime.log_level if world.is_main else "error") as screen,
        _leaving_nothing_refused(folder, world),
    ):
        built_in = "" if "model.name" in request.resolved.asked else " (built in; --model names another)"
        known = row.name == cfg.model.name
        named = f"model: {row.name}{built_in}" if known else f"model: {cfg.model.name} ({row.title})"
        shown = "" if request.dry_run and not request.json else named  # the plan says it
        for notice in filter(None, (shown, *request.resolved.notices, offset)):
            screen(Notice(notice))
        tell_checkpoint(asked, screen)
        for each in found:
            screen(each)
        if ignored := ignored_precision(os.environ, place, cfg):
            screen(Notice(ignored, "warning"))
        with world.together():
            draw = _drawing(cfg, row, folder, screen)
        if draw is not None and not request.dry_run:
            from avatarctl.training.run_folder import DRAWN

            cfg = replace(cfg, data=replace(cfg.data, path=str(folder / DRAWN)))
        request = replace(request, resolved=replace(request.resolved, cfg=cfg))

        from avatarctl.cli.out_of_memory import answered, of_training
        from avatarctl.profiling.happened import TrainingHappened
        from avatarctl.training.run import TrainingRun

        account = TrainingHappened(counting=cfg.runtime.log_level == "debug" and world.is_main)
        own = replace(cfg, runtime=replace(cfg.runtime, device=world.device(cfg.runtime.device)))
        with world.together():
            run = TrainingRun(
                command,
                own,
                row,
                family,  # type: ignore[arg-type]
                folder,
                screen,
                resume=resume,
                from_step=step,
                world=world,
                watch=account.watch,
            )
        if request.dry_run:
            with world.together():
                if world.is_main:
                    _show_plan(command, run, named, request.json, screen)
            return
        with world.together():
            _require_weights_fit(command, run)
        answer = of_training(command, row, cfg, request.resolved.asked, screen)
        with (
            answered(f"{command} of {row.name}", lambda: account.failed, own.runtime.device, answer, screen),
            listening(place) as should_stop,
            _accounted(account, screen),
        ):
            result = run.run(_run_text(request, command), should_stop, draw)
        if not world.is_main:
            return
        _advise(command, result, screen)
    _show_result(command, result, request.json)
    if result.partly is not None:  # not before: what was trained can be used
        raise result.partly


def _require_weights_fit(command: Name, run: TrainingRun) -> None:
    """What a card surely has no room for is not begun. Raises DoesNotFit."""
    from avatarctl.models.device import resolve_device

    device = resolve_device(run.cfg.runtime.device)
    if device.type != "cuda" or run.weights is None:
        return
    room = free_room(device)
    if run.weights > room.card:
        raise DoesNotFit(
            f"the weights alone take {shown(run.weights)}, and {shown(room.card)} are free",
            where=f"{command} of {run.row.name} on {room.where}",
            fix=f"`avatarctl vram-profile {command} ... --fit {room.card >> 20}MiB` finds settings that fit",
        )


@contextlib.contextmanager
def _accounted(account: TrainingHappened, screen: Screen) -> Iterator[None]:
    """What a run held, phase by phase, told behind it, however it ended."""
    try:
        with account:
            yield
    finally:
        for line in account.lines():
            screen(Notice(line))


@contextlib.contextmanager
def _leaving_nothing_refused(folder: Path, world: World) -> Iterator[None]:
    """Removes a folder that was made for a run which was refused before it began."""
    is_new = world.is_main and not folder.exists()
    with leaving_no_empty_folder(folder):
        try:
            yield
        except BaseException:
            if is_new:
                from avatarctl.training.run_folder import RunFolder

                RunFolder(folder).remove_unbegun()
            raise


def _place(command: Name, cfg: RunConfig, row: Row) -> tuple[Path, bool, int | None, list[Notice]]:
    """The folder of the run, whether it is gone on with, behind which step, None for the newest, and what was
    found on the way."""
    from avatarctl.files.named_path import expanded

    out = expanded(cfg.output.path) if cfg.output.path else None
    asked = cfg.checkpoint.resume
    home = Path("runs") / f"{command.replace(' ', '-')}-{row.name}"
    if asked is None:
        return out or _fresh(home), False, None, []
    if asked == "auto":
        found: list[Notice] = []
        return out or _newest(home, cfg, row, command, found) or _fresh(home), True, None, found
    path, step = _run_of(asked)
    if out is not None and out.absolute() != path.absolute():
        raise UsageError(f"a run goes on in its own folder, {path}", where="--out", fix="leave it out")
    return path, True, step, []


def _run_of(asked: str) -> tuple[Path, int | None]:
    """The run that somebody named, and the step of its checkpoint where they named that.

    Raises PathNotFound.
    """
    from avatarctl.files.named_path import expanded

    path, step = expanded(asked), None
    if match := re.fullmatch(r"checkpoint-(\d{1,9})", path.name):
        path, step = path.parent, int(match[1])
    if re.fullmatch(r"best-[a-z]+-\d{1,9}", path.name) and (path / "run.yaml").is_file():
        fix = f"--resume {path.parent}, or start anew from these weights by --model {path}"
        raise UsageError("holds the best weights and no state of training", where=asked, fix=fix)
    if not (path / "run.yaml").is_file():
        raise PathNotFound("is no run, nor a checkpoint of one", where=asked, fix="name the folder of --out")
    return path, step


def _newest(home: Path, cfg: RunConfig, row: Row, command: Name, found: list[Notice]) -> Path | None:
    """The newest run of this configuration in the usual place; `found` gets why others are not taken."""
    from avatarctl.training.run_folder import changed

    runs = [path for path in home.iterdir() if (path / "run.yaml").is_file()] if home.is_dir() else []
    others: list[str] = []
    for path in sorted(runs, reverse=True):
        try:
            differs = changed(path, _pinned(command, cfg, row, path), command)
        except AvatarctlError as broken:
            found.append(Notice(f"{path} is passed over: {broken}", "warning"))
            continue
        if not differs:
            return path
        others.append(f"{path}, differs in {', '.join(differs)}")
    if others:
        found.append(Notice(f"no run of this configuration; the newest, {others[0]}"))
    return None


def _pinned(command: Name, cfg: RunConfig, row: Row, folder: Path) -> RunConfig:
    """`cfg` with the checkpoint to start from where it names a run: that run's newest one today, or the one
    that the run in `folder` began with, since the newest may be another one by now."""
    from avatarctl.config import read_config
    from avatarctl.files.named_path import expanded

    name = cfg.model.name
    if name is None or name in ROWS or Path(row.path).parent.parent != (run := expanded(name).absolute()):
        return cfg
    chosen = Path(row.path).parent
    if (folder / "run.yaml").is_file():
        begun = read_config(folder / "run.yaml", command=command).settings.get("model.name")
        if begun is not None and Path(str(begun.value)).parent == run:
            chosen = Path(str(begun.value))
    return replace(cfg, model=replace(cfg.model, name=str(chosen)))


def _says_length(params: Mapping[str, Any]) -> bool:
    """Whether the command line says how long the run is to be."""
    assigned = {text.partition("=")[0].strip() for text in params["assignments"]}
    return bool(params["config"] or params.get("train__max_steps") or "train.max_steps" in assigned)


def _as_long(cfg: RunConfig, folder: Path, step: int | None) -> RunConfig:
    """`cfg` with the length that the run in `folder`, if there is one, was given last."""
    from avatarctl.training.run_folder import length_so_far

    if not (folder / "run.yaml").is_file():
        return cfg
    return replace(cfg, train=replace(cfg.train, max_steps=length_so_far(folder, step)))


def _fresh(home: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (stamp if attempt == 1 else f"{stamp}-{attempt}" for attempt in itertools.count(1))
    return next(folder for name in names if not (folder := home / name).exists())


def _drawing(cfg: RunConfig, row: Row, folder: Path, screen: Screen) -> Callable[[], None] | None:
    """What draws a data set where none is given, into the folder of the run, for a model of the drawn world;
    None where one is given. Nothing is drawn before the run has its folder for itself.

    Raises UsageError for a model that only a data set teaches.
    """
    if cfg.data.path is not None:
        return None
    if not row.world:
        raise UsageError(f"{row.name} learns from a data set", where="data.path", fix="give it by --data")
    screen(Notice(f"data: {len(_DRAWN)} clips of the {row.world} world, drawn (--data for yours)"))
    frames, audio_name = cfg.data.num_frames, cfg.data.audio_name
    assert frames is not None

    def draw() -> None:
        from avatarctl.demo.samples import write_samples
        from avatarctl.training.run_folder import DRAWN

        write_samples(folder / DRAWN, _DRAWN, frames, audio_name)

    return draw


def _show_plan(command: Name, run: TrainingRun, named: str, as_json: bool, screen: Screen) -> None:
    """named: the line that says which model it is. Raises WeightsMissing, behind the plan, where samples
    cannot be encoded."""
    from avatarctl.loading.sources import missing_line, weights_missing

    lacks: WeightsMissing | None = None
    if run.cfg.data.path is None:  # they are drawn when training begins
        summary = run.summary(len(_DRAWN), 0, {})
    else:
        data = run.open_data(complete=False)
        summary = run.summary(len(data.names) - len(data.bad), len(data.bad), data.lacking)
        try:
            run.require_encoders(data)
        except WeightsMissing:
            lacks = weights_missing(run.row, run.sources)  # with all the others, once
    if run.sources.missing and lacks is None:
        screen(Notice(missing_line(run.sources.missing), "warning"))
    if as_json:
        click.echo(json.dumps({"command": command, "dry_run": True, **summary}))
    else:
        _show_summary(summary, named)
    if lacks is not None:
        raise lacks


def _show_summary(summary: Mapping[str, Any], named: str) -> None:
    click.echo(printable(named))
    for name, value in summary.items():
        # A start that was found has said what it is, and `train.init` is nothing to complete weights.
        if name == "model" or (name == "start" and summary["trained_numbers"] is not None):
            continue
        if name == "missing_weights" and value:
            value = f"{len(value)} files"  # another line names them
        if value not in (None, [], {}, 0) or name in ("samples", "audio_offset"):
            click.echo(f"{name.replace('_', ' ')}: {printable(_told(value))}")


def _told(value: Any) -> str:
    """A value of the plan for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _advise(command: Name, result: TrainingResult, screen: Screen) -> None:
    line = shlex.join(["avatarctl", "infer", "--model", str(result.folder)])
    screen(Notice(f"to use it: {line}"))


def _show_result(command: Name, result: TrainingResult, as_json: bool) -> None:
    if as_json:
        values = {
            "folder": str(result.folder),
            "steps": result.steps,
            "checkpoint": None if result.checkpoint is None else str(result.checkpoint),
        }
        click.echo(json.dumps({"command": command, **values}))
    else:
        click.echo(printable(result.folder))


def _run_text(request: Request, command: Name) -> str:
    """The run file. Where the run lies is not in it: it may be moved, and a repetition is another run."""
    resolved = request.resolved
    cfg = replace(
        resolved.cfg,
        output=replace(resolved.cfg.output, path=None),
        checkpoint=replace(resolved.cfg.checkpoint, resume=None),
    )
    of_this_start = ("checkpoint.resume", "output.path")
    asked = {name: setting for name, setting in resolved.asked.items() if name not in of_this_start}
    return dump_run(with_absolute_paths(replace(resolved, asked=asked), cfg, _PATHS), command)
