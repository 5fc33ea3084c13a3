"""`avatarctl vram-profile`: what a run will need, counted without a card."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from avatarctl.cli.app import CommandGroup
from avatarctl.cli.options import ConfigCommand, Request, config_options, read_request
from avatarctl.cli.screen import Screen
from avatarctl.config import RunConfig
from avatarctl.errors import DoesNotFit, NotYetSupported
from avatarctl.events import Notice, Stage
from avatarctl.registry import COMPAT, NOT_YET, PROFILED, PROFILED_MODEL, Row, configure, find_model

if TYPE_CHECKING:
    from avatarctl.profiling.account import Account

__all__ = ["vram_profile"]

Job = Literal["infer", "train i2v", "train v2v"]

_BAR: Final = 32
_SLOWER: Final = ("model", "group", "sequential")
"""Memory modes, from the fastest to the smallest."""

_ASSUMED: Final = (
    "counted on fake tensors by the code of the run; no card was asked",
    "infer: networks where memory.mode has them; two chunks or windows of two steps, which others repeat",
    "train: prepared samples, so only the transformer is loaded; two optimizer steps, as moments come later",
    "the allowance for workspaces and rounding is a guess until it was measured on a card",
)


@dataclass(frozen=True)
class _Counted:
    job: Job
    row: Row
    cfg: RunConfig
    account: Account
    seconds: float


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
        *(option for option in config_options(name) if "--fit" not in option.opts),
        click.Option(["--fit"], metavar="SIZE|CARD", help="End with 5 unless it fits: 24GiB, 24GB, 4090."),
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


def _reader(name: Job) -> Callable[..., Request]:
    def read(params: Mapping[str, Any], row_of: Callable[[str], Row] = find_model) -> Request:
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
    from avatarctl.profiling.sizes import read_size

    fit = params.pop("fit")
    limit = None if fit is None else read_size(fit)
    request = _reader(name)(params)
    cfg = request.resolved.cfg
    assert cfg.model.name is not None
    with Screen(cfg.runtime.log_level) as screen:
        for notice in request.resolved.notices:
            screen(Notice(notice))
        counted = _count(name, find_model(cfg.model.name), cfg, screen)
    if request.json:
        click.echo(json.dumps(_document(counted)))
    else:
        click.echo("\n".join(_table(counted)))
        if limit is not None and counted.account.peak_bytes > limit and name == "infer":
            counted = _smaller(counted, limit, request, screen)
    if limit is not None:
        _require(counted, limit)


def _count(name: Job, row: Row, cfg: RunConfig, screen: Screen) -> _Counted:
    """Raises NotYetSupported for what has no code, or is not counted yet."""
    from avatarctl.families import family_named

    family = family_named(row.family) if row.status != NOT_YET else None
    training = name != "infer"
    if family is None or (training and not hasattr(family, "training_condition")):
        raise NotYetSupported(f"{row.name} has no code for it yet", where="model.name")
    if training and cfg.aux.losses:
        raise NotYetSupported("auxiliary losses are not counted yet", where="aux.losses")
    screen(Stage(f"counting {name} of {row.name}"))
    from avatarctl.profiling.inference import profile_inference
    from avatarctl.profiling.training import profile_training

    started = time.monotonic()
    account = (profile_training if training else profile_inference)(row, cfg)
    return _Counted(name, row, cfg, account, time.monotonic() - started)


def _smaller(counted: _Counted, limit: int, request: Request, screen: Screen) -> _Counted:
    """The first memory mode that fits, from the fastest on; the last one where none does. A mode that was
    asked for stays."""
    from avatarctl.profiling.sizes import shown

    if "memory.mode" in request.resolved.asked or "memory.swap_blocks" in request.resolved.asked:
        return counted
    model = counted.cfg.model.name
    for mode in _SLOWER:
        memory = replace(counted.cfg.memory, mode=mode)
        counted = _count("infer", counted.row, replace(counted.cfg, memory=memory), screen)
        need = counted.account.peak_bytes
        click.echo(f"--memory {mode}: {shown(need)}, {shown(counted.account.host)} on the host")
        if need <= limit:
            click.echo(f"avatarctl infer --model {model} --memory {mode}")
            break
    return counted


def _require(counted: _Counted, limit: int) -> None:
    from avatarctl.profiling.sizes import shown

    need = counted.account.peak_bytes
    if need > limit:
        raise DoesNotFit(
            f"{counted.job} of {counted.row.name} needs {shown(need)}, and {shown(limit)} were asked for",
            where="--fit",
            fix="a smaller --size or fewer frames",
        )
    click.echo(f"fits: {shown(need)} of {shown(limit)}", err=True)


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
        screen(Notice("with auxiliary losses: not counted yet"))
    if as_json:
        click.echo(json.dumps({"command": "vram-profile", "rows": [_document(each) for each in found]}))


def _line(counted: _Counted) -> str:
    from avatarctl.profiling.sizes import shown

    account = counted.account
    what = f"{counted.job} {counted.row.name}, {_frame(counted)}"
    largest = max(account.stages, key=lambda name: account.stages[name])
    needs = f"{shown(account.peak_bytes):>10} ({shown(account.live_bytes)} live, in {largest})"
    return f"{what:46} {needs}"


def _frame(counted: _Counted) -> str:
    cfg = counted.cfg
    if counted.job == "infer":
        width, height = cfg.output.width or cfg.data.width, cfg.output.height or cfg.data.height
        frames = cfg.long_video.num_frames
        return f"{width}x{height}" + (f", {frames} frames" if frames else "")
    return f"{cfg.data.width}x{cfg.data.height}, {cfg.data.num_frames} frames"


def _table(counted: _Counted) -> list[str]:
    from avatarctl.profiling.sizes import shown

    account = counted.account
    largest = account.live_bytes
    lines = [f"{counted.job} of {counted.row.name}, {_frame(counted)}", ""]
    for name, size in account.stages.items():
        bar = "#" * round(_BAR * size / largest)
        lines.append(f"  {name:10} {shown(size):>12}  {bar}")
    lines.append("")
    for part, size in account.weights.items():
        lines.append(f"  weights of {part:6} {shown(size):>12}")
    for part, size in account.components.items():
        lines.append(f"  {part:17} {shown(size):>12}")
    if account.host:
        lines.append(f"  waits on the host {shown(account.host):>12}")
    if account.trained:
        lines.append(f"  trained numbers   {account.trained:>12,}")
    lines += ["", f"live at most {shown(largest)}; with the allowance {shown(account.peak_bytes)}", ""]
    return [*lines, *(f"- {line}" for line in _ASSUMED)]


def _document(counted: _Counted) -> dict[str, Any]:
    return {
        "command": f"vram-profile {counted.job}",
        "model": counted.row.name,
        "frame": _frame(counted),
        **counted.account.summary(),
        "seconds": round(counted.seconds, 3),
        "assumptions": list(_ASSUMED),
    }


_command("infer", vram_profile, "What a talking video will need.")
_command("train i2v", train, "What training from an image will need.")
_command("train v2v", train, "What training on videos will need.")
vram_profile.add_command(train)
