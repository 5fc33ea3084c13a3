"""`avatarctl separate`: speech out of a mix."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from avatarctl.cli.command import Command
from avatarctl.cli.options import WEIGHTS_VARIABLE
from avatarctl.cli.screen import Screen
from avatarctl.cli.signals import stop_on_signals
from avatarctl.errors import (
    AvatarctlError,
    EnvironmentMissing,
    ExtraMissing,
    UsageError,
    WeightsMissing,
    printable,
)
from avatarctl.events import Notice
from avatarctl.files.named_path import expanded
from avatarctl.registry import ROWS

if TYPE_CHECKING:
    from avatarctl.data.mixes import Mix
    from avatarctl.data.separate import Separated, Separation
    from avatarctl.perception.separation import Separator

__all__ = ["separate"]

BACKENDS: Final = ("mdx-onnx", "dsp", "none")
ROW: Final = "kim-vocal-2"
MDX: Final = "--backend mdx-onnx"
OTHERS: Final = (
    "--backend dsp needs no weights and is of demo quality, --backend none takes the audio as it is"
)

EXAMPLES = """\b
Examples:
  avatarctl separate talk.mp4 --out talk.vocal.wav
  avatarctl separate talks --out vocals --stems
  avatarctl separate samples
"""


@click.command(
    "separate",
    cls=Command,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
    short_help="Take speech out of a mix.",
)
@click.argument("source", metavar="IN")
@click.option(
    "--out", metavar="OUT", help="A file ending in .wav, or a folder. [default: beside each sample]"
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="mdx-onnx",
    help="mdx-onnx: a network, Kim_Vocal_2. dsp: a spectral gate of demo quality, without weights. none: "
    "all of the audio. [default: mdx-onnx]",
)
@click.option("--weights", metavar="mdx=PATH", help="The network's file, instead of what was fetched.")
@click.option("--weights-root", metavar="PATH", help="Folder of fetched weights.")
@click.option("--stems", is_flag=True, help="Write speech.wav and rest.wav at full rate as well.")
@click.option(
    "--audio-name",
    metavar="NAME",
    default="audio.wav",
    help="What is read in a sample folder. [default: audio.wav]",
)
@click.option("--overwrite", is_flag=True, help="Replace results that exist, whoever wrote them.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; touch nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Say warnings and errors only.")
def separate(**params: Any) -> None:
    """Take speech out of a mix: 16 kHz mono, as the models read audio.

    IN is an audio or video file, a folder of them, a list, a sample folder or a folder of those. A result is
    called vocal.wav, beside each sample, or in OUT in a folder for each file. What is done is not made again,
    so the same command goes on after an interruption.
    """
    for name in ("source", "out", "weights_root"):
        if params[name] == "":  # it would mean the current folder
            raise UsageError("is empty", where={"source": "IN"}.get(name, f"--{name.replace('_', '-')}"))
    from avatarctl.data.mixes import find_mixes
    from avatarctl.data.separate import Separation, conclude

    source, out = expanded(params["source"]), None if params["out"] is None else expanded(params["out"])
    with Screen("warning" if params["quiet"] else "info") as screen:
        mixes = find_mixes(source, out, params["audio_name"], screen)
        try:
            separator = _separator(params["backend"], params["weights"], params["weights_root"])
        except EnvironmentMissing as error:
            if not params["dry_run"]:
                raise
            screen(Notice(str(error), "warning"))
            _show_plan(None, mixes, params["as_json"])
            return
        with stop_on_signals() as should_stop:
            work = Separation(
                separator, screen, should_stop, stems=params["stems"], overwrite=params["overwrite"]
            )
            if params["dry_run"]:
                _show_plan(work, mixes, params["as_json"])
                return
            results = work.run(mixes)
    if all(each.error is not None for each in results):
        conclude(results)
    home = results[0].files[0] if len(results) == 1 else out or source
    _show(results, separator, home, params["as_json"])
    conclude(results)


def _separator(backend: str, weights: str | None, weights_root: str | None) -> Separator:
    """The way that was asked for; never another one in its place."""
    from avatarctl.perception.separation import MdxOnnx, SpectralGate, Unchanged

    if backend != "mdx-onnx":
        for flag, value in (("--weights", weights), ("--weights-root", weights_root)):
            if value is not None:
                raise UsageError(f"has no meaning with --backend {backend}, which has none", where=flag)
        return SpectralGate() if backend == "dsp" else Unchanged()
    path = _named(weights) if weights is not None else _found(weights_root)
    try:
        return MdxOnnx(path)
    except ExtraMissing as error:
        raise ExtraMissing(error.what, where=MDX, fix=f"{error.fix}; {OTHERS}") from error


def _named(weights: str) -> Path:
    part, given, path = weights.partition("=")
    if part != "mdx" or not given or not path:
        raise UsageError(f"expected mdx=PATH, got {weights[:80]!r}", where="--weights")
    return expanded(path)


def _found(weights_root: str | None) -> Path:
    """The file where `models pull` puts it. Raises WeightsMissing."""
    from avatarctl.hub.locate import locate
    from avatarctl.loading.sources import missing_line

    extra = "" if find_spec("onnxruntime") else ", and pip install 'avatarctl[separate]' onnxruntime"
    found = locate(ROWS[ROW], weights_root or os.environ.get(WEIGHTS_VARIABLE) or None)
    if found.missing:
        raise WeightsMissing(
            missing_line(found.missing),
            where=MDX,
            fix=f"`avatarctl models pull {ROW}` fetches it, --weights mdx=PATH names it{extra}; {OTHERS}",
        )
    (path,) = found.files.values()
    return path


def _show_plan(work: Separation | None, mixes: list[Mix], as_json: bool) -> None:
    """work: None where weights are missing, without which nobody knows what is up to date."""
    plan = []
    for mix in mixes:
        try:
            done = work is not None and work.state_of(mix) == "skipped"
            state = "up to date" if done else "make"
        except AvatarctlError as error:
            if len(mixes) == 1:
                raise
            state = f"fail: {error}"
        plan.append({"name": mix.name, "vocal": str(mix.vocal), "state": state})
    if as_json:
        click.echo(json.dumps({"command": "separate", "dry_run": True, "files": plan}))
        return
    for each in plan:
        click.echo(printable(f"{each['vocal']}: {each['state']}"))


def _show(results: list[Separated], separator: Separator, home: Path, as_json: bool) -> None:
    """One document for programs; else the place of the results, of which a program gets the very bytes."""
    if not as_json:
        click.echo(printable(home) if sys.stdout.isatty() else os.fsencode(home))
        return
    files = [
        {
            "name": each.name,
            "state": each.state,
            "files": [str(path) for path in each.files],
            "seconds_of_audio": round(each.seconds, 3),
            "error": None if each.error is None else str(each.error),
        }
        for each in results
    ]
    count = {state: sum(each.state == state for each in results) for state in ("done", "skipped", "failed")}
    click.echo(json.dumps({"command": "separate", "method": separator.method, **count, "files": files}))
