"""`avatarctl precompute-latents` and `precompute-audio`: videos and samples to what training reads."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import click

from avatarctl.cli.infer import _row, tell_checkpoint
from avatarctl.cli.options import EXAMPLE_MODEL, ConfigCommand, Request, config_options, read_request
from avatarctl.cli.run_file import with_absolute_paths
from avatarctl.cli.screen import Screen
from avatarctl.config import dump_run, require_supported
from avatarctl.errors import NotYetSupported, printable
from avatarctl.events import Notice
from avatarctl.registry import COMPAT, NOT_YET, Row

if TYPE_CHECKING:
    from avatarctl.data.prepare import Preparation, Summary

__all__ = ["DEFAULT_MODEL", "precompute_audio", "precompute_latents"]

Name = Literal["precompute-audio", "precompute-latents"]

DEFAULT_MODEL = "cartoon-v2v"

_PATHS = ("data.path", "data.videos", "data.mask", "data.faces")

EXAMPLES = f"""\b
Examples:
  avatarctl precompute-latents --from-videos talks --data samples
  avatarctl precompute-audio --data samples
  avatarctl precompute-latents --data samples --model {EXAMPLE_MODEL} --channels 49 --dry-run
"""


def _reader(command: Name) -> Callable[..., Request]:
    def read(params: Mapping[str, Any], row_of: Callable[[str], Row] = _row) -> Request:
        return read_request(command, params, lambda name: row_of(name).for_config, COMPAT, DEFAULT_MODEL)

    return read


def _command(name: Name, short: str) -> Callable[[Callable[..., None]], click.Command]:
    return click.command(
        name=name,
        cls=ConfigCommand,
        read=_reader(name),
        epilog=EXAMPLES,
        context_settings={"help_option_names": ["-h", "--help"]},
        short_help=short,
        params=config_options(name),
    )


@_command("precompute-latents", "Cut videos into training samples; encode their video and text once.")
def precompute_latents(**params: Any) -> None:
    """Cut videos into training samples; encode their video and text once.

    --from-videos makes the samples below --data, a folder for each window of each video. Without it --data
    is a folder of samples or a list. What stands and is up to date is not made again, so the same command
    goes on after an interruption.
    """
    _run("precompute-latents", params)


@_command("precompute-audio", "Encode the audio of training samples once.")
def precompute_audio(**params: Any) -> None:
    """Encode the audio of training samples once: one row of features for each frame.

    It takes the same options as precompute-latents. What stands and is up to date is not made again.
    """
    _run("precompute-audio", params)


def _run(command: Name, params: Mapping[str, Any]) -> None:
    named = functools.cache(_row)
    request = _reader(command)(params, named)
    cfg = request.resolved.cfg
    require_supported(cfg, command, request.resolved.origins)
    assert cfg.model.name is not None
    row = named(cfg.model.name)
    from avatarctl.families import family_named

    if row.status == NOT_YET or not hasattr(family := family_named(row.family), "encode_clip"):
        raise NotYetSupported(f"nothing is prepared for {row.name} yet", where="model.name")

    from avatarctl.atomic import atomic_write_text
    from avatarctl.cli.signals import stop_on_signals
    from avatarctl.data.prepare import Preparation

    with Screen(cfg.runtime.log_level) as screen:
        built_in = "" if "model.name" in request.resolved.asked else " (built in; --model names another)"
        for notice in (f"model: {row.name}{built_in}", *request.resolved.notices):
            screen(Notice(notice))
        tell_checkpoint(row, screen)
        preparation = Preparation(command, cfg, row, family, screen, dry_run=request.dry_run)  # type: ignore[arg-type]
        preparation.doubt_world()
        if request.dry_run:
            _show_plan(command, preparation, request.json, screen)
            return
        with stop_on_signals() as should_stop:
            text = dump_run(with_absolute_paths(request.resolved, cfg, _PATHS), command)
            preparation.own.mkdir(parents=True, exist_ok=True)
            atomic_write_text(preparation.own / f"{command}.run.yaml", text)
            summary = preparation.run(should_stop)
    _show_result(command, summary, request.json)


def _show_plan(command: Name, preparation: Preparation, as_json: bool, screen: Screen) -> None:
    from avatarctl.data.plan import plan_summary
    from avatarctl.loading.sources import missing_line

    if preparation.encoders.missing:
        screen(Notice(missing_line(preparation.encoders.missing), "warning"))
    summary = plan_summary(preparation, screen)
    if as_json:
        click.echo(json.dumps({"command": command, "dry_run": True, **summary}))
        return
    for name, value in summary.items():
        # How long it takes is known once something was prepared here.
        click.echo(f"{name}: {'not known yet' if value is None else printable(value)}")


def _show_result(command: Name, summary: Summary, as_json: bool) -> None:
    if as_json:
        values = {**vars(summary), "report": str(summary.report), "seconds": round(summary.seconds, 3)}
        click.echo(json.dumps({"command": command, **values}))
    else:
        click.echo(printable(summary.report))
