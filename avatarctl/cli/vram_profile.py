"""`avatarctl vram-profile`: what a run will need, counted without a card."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from avatarctl.atomic import atomic_write_text
from avatarctl.cli.app import CommandGroup
from avatarctl.cli.memory_mode import free_room, with_mode
from avatarctl.cli.options import ConfigCommand, Request, config_options, read_request
from avatarctl.cli.screen import Screen
from avatarctl.config import RunConfig, Setting, dump_run
from avatarctl.errors import DoesNotFit, NotYetSupported, OutputRefused, UsageError
from avatarctl.events import Notice, Stage
from avatarctl.placement.seats import shown
from avatarctl.registry import COMPAT, NOT_YET, PROFILED, PROFILED_MODEL, Row, based_on, configure, find_model
from avatarctl.timeline import SAMPLE_RATE

if TYPE_CHECKING:
    from avatarctl.profiling.account import Account
    from avatarctl.profiling.fit import Room
    from avatarctl.profiling.plans import Plan

__all__ = ["vram_profile"]

Job = Literal["infer", "train i2v", "train v2v"]

_BAR: Final = 32
_ASSUMED: Final = (
    "counted on fake tensors by the code of the run; no card was asked",
    "infer: networks where memory.mode has them; two chunks or windows, or those that --audio fills",
    "train: prepared samples; a step behind the first, as moments exist by then; every sample is judged",
    "train: a validation where validation.every asks for one, with all judges that it names",
    "what is like something before is counted, not run; blocks of training are extended where that is exact",
    "the allowance for workspaces and rounding is a guess until it was measured on a card",
)


_PHASES: Final = (
    "load", "text", "image", "audio", "condition", "forward", "aux", "aux backward", "backward", "optimizer",
    "step", "decode", "checkpoint", "validation text", "validation image", "validation audio",
    "validation condition", "validation step", "validation decode", "validation judges", "validation",
)  # fmt: skip
_TOLD: Final = 1 << 16
"""Bytes from which a component has a line."""
_BETWEEN: Final = "between them"
"""What is outside of all phases."""


@dataclass(frozen=True)
class _Counted:
    """samples: of the recording, see `_samples`; measured: the account of real tensors on `place`, where that
    was asked for."""

    job: Job
    row: Row
    cfg: RunConfig
    account: Account
    seconds: float
    samples: int | None = None
    measured: Account | None = None
    place: str = ""


@click.group(
    cls=CommandGroup,
    invoke_without_command=True,
    short_help="Say what a run will need, without a card.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def vram_profile(ctx: click.Context, as_json: bool) -> None:
    """Say what a run will need, without a card: its own code is run on tensors that have no numbers.

    Without a command: a table of published models at 512x512, 81 frames a chunk or clip.
    """
    if ctx.invoked_subcommand is None:
        _headline(as_json)


def _command(name: Job, group: click.Group, short: str) -> None:
    def run(**params: Any) -> None:
        _profile(name, params)

    run.__doc__ = (
        f"{short}\n\n    Takes the options of `avatarctl {name}`; nothing of that run is made or read."
    )
    # How an image fits a frame needs no memory: here the word is free for the card.
    options = [
        *(option for option in config_options(name) if not {"--fit", "--out"} & {*option.opts}),
        click.Option(
            ["--fit"], metavar="SIZE|CARD", help="Find the fastest plan that fits: 24GiB, 24GB, 4090; else 5."
        ),
        click.Option(["--host"], metavar="SIZE", help="What may wait on the host, with --fit."),
        click.Option(["--out"], metavar="FILE", help="Write the plan that --fit finds as a configuration."),
        click.Option(["--measure"], is_flag=True, help="Do the same on real tensors here, and show both."),
        click.Option(["--exact"], is_flag=True, help="Run everything that is counted, and extend nothing."),
    ]
    made = click.command(
        name=name.split()[-1],
        cls=ConfigCommand,
        read=_reader(name),
        context_settings={"help_option_names": ["-h", "--help"]},
        short_help=short,
        params=options,
    )(run)
    group.add_command(made)


def _row_of(name: Job) -> Callable[[str], Row]:
    """The row of a model; training starts from a base as well."""
    return find_model if name == "infer" else lambda model: based_on(model) or find_model(model)


def _reader(name: Job) -> Callable[..., Request]:
    own = _row_of(name)

    def read(params: Mapping[str, Any], row_of: Callable[[str], Row] = own) -> Request:
        return read_request(name, params, lambda each: row_of(each).for_config, COMPAT, PROFILED_MODEL)

    return read


@click.group(
    cls=CommandGroup,
    short_help="What training will need.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
def train() -> None:
    """What training will need."""


def _profile(name: Job, params: dict[str, Any]) -> None:
    fit, host, out, exact, measure = (params.pop(each) for each in ("fit", "host", "out", "exact", "measure"))
    wanted = _wanted(fit, host, out)
    request = _with_everything_there(_reader(name)(params))
    cfg = request.resolved.cfg
    assert cfg.model.name is not None
    row = _row_of(name)(cfg.model.name)
    with Screen(cfg.runtime.log_level) as screen:
        for notice in request.resolved.notices:
            screen(Notice(notice))
        samples = _samples(cfg) if name == "infer" else None
        counted = _count(name, row, cfg, screen, samples, exact=exact)
        if measure:
            counted = _measure(counted, screen)
        if not request.json:
            click.echo("\n".join(_table(counted)))
        if wanted is None:
            if request.json:
                click.echo(json.dumps(_document(counted)))
            return
        plan, counted = _search(counted, wanted, request, screen, exact)
    if request.json:
        click.echo(json.dumps({**_document(counted), "changes": dict(plan.changes), "costs": plan.costs}))
    _show(plan, counted, wanted, request)


def _with_everything_there(request: Request) -> Request:
    """Where `auto` would look for a mode, `full` is counted, and `--fit` looks from there on."""
    resolved = request.resolved
    if resolved.cfg.memory.mode != "auto":
        return request
    asked = {dotted: each for dotted, each in resolved.asked.items() if dotted != "memory.mode"}
    return replace(request, resolved=replace(resolved, cfg=with_mode(resolved.cfg, "full"), asked=asked))


@dataclass(frozen=True)
class _Wanted:
    """out: the file of the plan."""

    room: Room
    out: Path | None


def _wanted(fit: str | None, host: str | None, out: str | None) -> _Wanted | None:
    """Raises UsageError for sizes that are none, OutputRefused for a file that exists."""
    from avatarctl.files.named_path import expanded
    from avatarctl.profiling.fit import Room
    from avatarctl.profiling.sizes import read_size

    if fit is None:
        for word, value in (("--host", host), ("--out", out)):
            if value is not None:
                raise UsageError("means nothing without --fit", where=word)
        return None
    path = None if out is None else expanded(out)
    if path is not None and (out == "" or path.exists()):
        raise OutputRefused("exists already" if out else "is empty", where="--out", fix="another name")
    return _Wanted(Room(read_size(fit), None if host is None else read_size(host, "--host")), path)


def _search(
    counted: _Counted, wanted: _Wanted, request: Request, screen: Screen, exact: bool
) -> tuple[Plan, _Counted]:
    """The fastest plan that fits. Raises DoesNotFit with the smallest need, where none does."""
    from avatarctl.profiling.fit import fastest

    job, row, made = counted.job, counted.row, [counted]

    def count(cfg: RunConfig) -> Account:
        if cfg != counted.cfg:
            made.append(_count(job, row, cfg, screen, counted.samples, exact=exact))
        return made[-1].account

    blocks = row.network["dit"].get("num_layers", 0)
    found = fastest(job, row.name, counted.cfg, request.resolved.asked, wanted.room, count, screen,
                    blocks=blocks, rounded=True)  # fmt: skip
    return found.plan, next(each for each in made if each.cfg == found.plan.cfg)


def _show(plan: Plan, counted: _Counted, wanted: _Wanted, request: Request) -> None:
    """What was found, how to run it, and the file of it."""
    resolved = request.resolved
    changes = {dotted: Setting(value, "--fit") for dotted, value in plan.changes.items()}
    asked = {**resolved.asked, **changes}
    lines = [f"fits: {shown(counted.account.peak_bytes)} of {shown(wanted.room.card)}, {plan}"]
    if plan.costs:
        lines.append(f"given up: {plan.costs}")
    command = f"avatarctl {counted.job}"
    if wanted.out is not None:
        atomic_write_text(wanted.out, dump_run(replace(resolved, cfg=plan.cfg, asked=asked), counted.job))
        lines.append(f"{command} --config {shlex.quote(str(wanted.out))}")
    else:
        lines.append(shlex.join([*command.split(), *_words(counted, asked)]))
    for line in lines:
        click.echo(line, err=request.json)


def _words(counted: _Counted, asked: Mapping[str, Setting]) -> Iterator[str]:
    """Options that ask for the same."""
    yield from ("--model", counted.row.name)
    for dotted, setting in asked.items():
        if isinstance(setting.value, Mapping):
            for part, path in setting.value.items():
                yield from ("--weights", f"{part}={path}")
        elif dotted != "model.name":
            yield from ("-o", f"{dotted}={_word(setting.value)}")


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _count(
    name: Job, row: Row, cfg: RunConfig, screen: Screen, samples: int | None = None, *, exact: bool = False
) -> _Counted:
    """Raises NotYetSupported for what has no code."""
    from avatarctl.families import family_named

    family = family_named(row.family) if row.status != NOT_YET else None
    training = name != "infer"
    if family is None or (training and not hasattr(family, "training_condition")):
        raise NotYetSupported(f"{row.name} has no code for it yet", where="model.name")
    screen(Stage(f"counting {name} of {row.name}"))
    from avatarctl.profiling.inference import profile_inference
    from avatarctl.profiling.training import profile_training

    started = time.monotonic()
    if training:
        account = profile_training(row, cfg, exact=exact)
    else:
        account = profile_inference(row, cfg, exact=exact, samples=samples)
    return _Counted(name, row, cfg, account, time.monotonic() - started, samples)


def _samples(cfg: RunConfig) -> int | None:
    """Of the recording that was given, with the silence in front of it, at 16 kHz; None where there is none.
    Raises UnusableAudio."""
    if cfg.input.audio is None:
        return None
    from avatarctl.media import open_audio, survey

    return round(cfg.output.lead_silence * SAMPLE_RATE) + survey(open_audio(cfg.input.audio)).samples


def _measure(counted: _Counted, screen: Screen) -> _Counted:
    """With the account of the same on this device. Raises DoesNotFit where that has no room for it."""
    from avatarctl.models.device import resolve_device
    from avatarctl.profiling.inference import profile_inference
    from avatarctl.profiling.training import profile_training

    row, cfg = counted.row, counted.cfg
    device = resolve_device(cfg.runtime.device)
    room = free_room(device)
    # Weights of a CPU are drawn in float32 first.
    drawn = 0 if device.type == "cuda" else 2 * sum(counted.account.weights.values())
    if (need := room.need(counted.account) + drawn) > room.card:
        raise DoesNotFit(
            f"{shown(need)} are needed on {device}, and {shown(room.card)} are free there: {room.where}",
            where="--measure",
            fix="a smaller model, --size or fewer frames; without --measure nothing is needed",
        )
    screen(Stage(f"measuring {counted.job} of {row.name} on {device}"))
    if counted.job == "infer":
        measured = profile_inference(row, cfg, "real", str(device), samples=counted.samples)
    else:
        measured = profile_training(row, cfg, "real", device=str(device))
    return replace(counted, measured=measured, place=str(device))


def _comparison(counted: _Counted) -> list[str]:
    """Each phase, predicted and measured."""
    measured = counted.measured
    if measured is None:
        return []
    rows = [(name, size, _size_of(measured.stages, name)) for name, size in _in_order(counted.account.stages)]
    rows.append(("on the host", counted.account.host, measured.host))
    width = max(len(name) for name, *_ in rows) + 1
    lines = [f"  {'on ' + counted.place:{width}} {'predicted':>14} {'measured':>14}  bytes"]
    for name, one, other in rows:
        off = f"{(other - one) / one:+.1%}" if one and one != other else ""
        lines.append(f"  {name:{width}} {one:>14,} {other:>14,}  {off}".rstrip())
    return [*lines, ""]


def _headline(as_json: bool) -> None:
    """Rows as they come: each takes from seconds to a minute."""
    found = []
    with Screen("info") as screen:
        for name, model, words in PROFILED:
            row = find_model(model)
            counted = _count(name, row, configure(f"model.name={model}", *words), screen)
            found.append(counted)
            if not as_json:
                click.echo(_line(counted))
    if as_json:
        click.echo(json.dumps({"command": "vram-profile", "rows": [_document(each) for each in found]}))


def _line(counted: _Counted) -> str:
    account = counted.account
    what = f"{counted.job} {counted.row.name}, {_frame(counted)}"
    largest = max(account.stages, key=lambda name: account.stages[name])
    needs = f"{shown(account.peak_bytes):>10} ({shown(account.live_bytes)} live, in {largest})"
    return f"{what:64} {needs}"


def _frame(counted: _Counted) -> str:
    cfg = counted.cfg
    if counted.job == "infer":
        width, height = cfg.output.width or cfg.data.width, cfg.output.height or cfg.data.height
        frames = cfg.long_video.num_frames
        return f"{width}x{height}" + (f", {frames} frames" if frames else "")
    aux = f", {'+'.join(cfg.aux.losses)}" if cfg.aux.losses else ""
    return f"{cfg.data.width}x{cfg.data.height}, {cfg.data.num_frames} frames{aux}"


def _table(counted: _Counted) -> list[str]:
    account = counted.account
    largest = account.live_bytes
    width = max(map(len, (_BETWEEN, *account.stages))) + 1
    lines = [f"{counted.job} of {counted.row.name}, {_frame(counted)}", ""]
    for name, size in _in_order(account.stages):
        bar = "#" * round(_BAR * size / largest)
        lines.append(f"  {name:{width}} {shown(size):>12}  {bar}")
    lines.append("")
    lines += _components(account)
    lines += ["", f"live at most {shown(largest)}; with the allowance {shown(account.peak_bytes)}", ""]
    return [*lines, *_comparison(counted), *(f"- {line}" for line in _assumed(counted.job))]


def _components(account: Account) -> list[str]:
    """What the largest moment is made of, and what waits on the host at its own; crumbs are left out."""
    largest = max(account.stages, key=lambda name: account.stages[name])
    here, there = account.components, account.host_parts
    head = f"  {'at the largest, in ' + largest:32} {'device':>12}"
    lines = [head + (f" {'host':>12}" if there else "")]
    for part in sorted({**here, **there}, key=lambda part: -here.get(part, 0)):
        if max(here.get(part, 0), there.get(part, 0)) < _TOLD:
            continue
        waits = f" {shown(there[part]):>12}" if part in there else ""
        lines.append(f"  {part:32} {shown(here.get(part, 0)):>12}{waits}")
    if account.trained:
        lines.append(f"  {'trained numbers':32} {account.trained:>12,}")
    return lines


def _in_order(stages: Mapping[str, int]) -> list[tuple[str, int]]:
    """Phases as a run goes through them; what is outside of all comes last, by a name that people know."""
    names = sorted(stages, key=lambda name: _PHASES.index(name) if name in _PHASES else len(_PHASES))
    return [(_BETWEEN if name == "loop" else name, stages[name]) for name in names]


def _size_of(stages: Mapping[str, int], name: str) -> int:
    return stages.get("loop" if name == _BETWEEN else name, 0)


def _assumed(job: Job) -> list[str]:
    """Without what is about other commands."""
    others = "train:" if job == "infer" else "infer:"
    return [line for line in _ASSUMED if not line.startswith(others)]


def _measured(place: str, account: Account) -> dict[str, Any]:
    found = account.summary()
    return {"device": place, **{name: found[name] for name in ("live_bytes", "stages", "host_bytes")}}


def _document(counted: _Counted) -> dict[str, Any]:
    return {
        "command": f"vram-profile {counted.job}",
        "model": counted.row.name,
        "frame": _frame(counted),
        **counted.account.summary(),
        **({} if counted.measured is None else {"measured": _measured(counted.place, counted.measured)}),
        "seconds": round(counted.seconds, 3),
        "assumptions": _assumed(counted.job),
    }


_command("infer", vram_profile, "What a talking video will need.")
_command("train i2v", train, "What training from an image will need.")
_command("train v2v", train, "What training on videos will need.")
vram_profile.add_command(train)
