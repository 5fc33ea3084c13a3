"""`avatarctl infer`: a picture and a voice to a talking video."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from avatarctl.cli.options import ConfigCommand, Request, config_options, read_request
from avatarctl.cli.screen import Screen
from avatarctl.config import Resolved, RunConfig, dump_run, require_supported, value_of
from avatarctl.errors import NotYetSupported, OutputRefused, UsageError, WeightsMissing, printable
from avatarctl.events import Notice
from avatarctl.registry import COMPAT, NOT_YET, Row, Wanted, find_model
from avatarctl.weights.locate import missing_files

if TYPE_CHECKING:
    from avatarctl.pipelines.job import Job

__all__ = ["DEFAULT_MODEL", "infer"]

DEFAULT_MODEL = "cartoon-i2v"

_SHARD = re.compile(r"(?P<stem>.*-)(?P<number>\d{5})(?P<rest>-of-\d{5}\..*)")

_PATHS = ("model.weights_root", "input.image", "input.audio", "output.path")

EXAMPLES = """\b
Examples:
  avatarctl infer --chunked
  avatarctl infer --image me.jpg --audio hello.wav --out hello.mp4
  avatarctl infer --model omniavatar-14b --image me.jpg --audio hello.wav --dry-run
"""


@click.command(
    cls=ConfigCommand,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
    short_help="Make a talking video from a picture and a voice.",
    params=config_options("infer"),
)
def infer(**params: Any) -> None:
    """Make a talking video from a picture and a voice.

    Without --model it is the built-in cartoon model, and without --image or --audio its built-in face and
    voice. The path of the video is printed on standard output.
    """
    request = read_request("infer", params, lambda name: find_model(name).for_config, COMPAT, DEFAULT_MODEL)
    cfg = request.resolved.cfg
    require_supported(cfg, "infer", request.resolved.origins)
    assert cfg.model.name is not None
    row = find_model(cfg.model.name)
    if row.status == NOT_YET:
        raise NotYetSupported(f"{row.name} is not yet supported", where="model.name")
    _refuse_existing(cfg)
    with Screen(cfg.runtime.log_level) as screen:
        for notice in _introduction(request, row):
            screen(Notice(notice))
        missing = missing_files(row, cfg.model.weights_root)
        job = _job(request, row, missing, screen)
        if request.dry_run:
            _dry_run(request, row, job, missing, screen)
        else:
            _run(request, row, job, missing, screen)


def _introduction(request: Request, row: Row) -> list[str]:
    asked = "" if "model.name" in request.resolved.asked else " (built in; --model names another)"
    untrained = "" if row.trained else ", untrained: the picture will be noise"
    return [f"model: {row.name}{asked}{untrained}", *request.resolved.notices]


def _job(request: Request, row: Row, weights: tuple[Wanted, ...], screen: Screen) -> Job:
    """The inputs, opened. For the built-in model, and for a dry run, the built-in sample stands in for
    what is not given."""
    cfg = request.resolved.cfg
    missing = [key for key in ("image", "audio") if getattr(cfg.input, key) is None]
    if missing and row.source != "package" and not request.dry_run:
        if weights:  # the larger obstacle first
            raise WeightsMissing(_missing_line(weights), where=row.name, fix=_pull(row))
        raise UsageError(f"{row.name} needs --{missing[0]}")

    from avatarctl.demo.sample import sample_picture, sample_sound
    from avatarctl.media import load_picture, open_sound

    if missing:
        names = {"image": "face (--image for yours)", "audio": "voice (--audio for yours)"}
        screen(Notice(f"input: the built-in {' and '.join(names[key] for key in missing)}"))
    picture = load_picture(cfg.input.image) if cfg.input.image else sample_picture()
    sound = open_sound(cfg.input.audio) if cfg.input.audio else sample_sound()

    # Not before: it takes seconds, which a file that cannot be used need not wait for.
    from avatarctl.pipelines.job import Job

    return Job(picture, sound, cfg.input.prompt or "", cfg.input.negative_prompt or "")


def _dry_run(request: Request, row: Row, job: Job, missing: tuple[Wanted, ...], screen: Screen) -> None:
    from avatarctl.pipelines.infer import environment_problems
    from avatarctl.pipelines.job import check_job

    plan = check_job(request.resolved.cfg, row, job, screen)
    for problem in environment_problems(row, plan):
        screen(Notice(f"a run would end with exit 4: {problem}", "warning"))
    summary = plan.summary()
    summary["missing_weights"] = [f"{item.folder}/{item.file}" for item in missing]
    if missing:
        screen(Notice(_missing_line(missing), "warning"))
    if request.json:
        click.echo(json.dumps({"command": "infer", "dry_run": True, **summary}, ensure_ascii=True))
        return
    for name, value in summary.items():
        if name != "missing_weights":
            click.echo(f"{name}: {printable(', '.join(value) if isinstance(value, list) else value)}")


def _run(request: Request, row: Row, job: Job, missing: tuple[Wanted, ...], screen: Screen) -> None:
    cfg = request.resolved.cfg
    path = Path(cfg.output.path) if cfg.output.path else _fresh_path(row)
    if missing:
        raise WeightsMissing(_missing_line(missing), where=row.name, fix=_pull(row))

    from avatarctl.atomic import atomic_write_text
    from avatarctl.cli.signals import stop_on_signals
    from avatarctl.pipelines.infer import write_video
    from avatarctl.pipelines.job import check_job

    with stop_on_signals() as should_stop, _leaving_no_empty_folder(path.parent):
        plan = check_job(cfg, row, job, screen)
        finished = write_video(row, job, plan, path, emit=screen, should_stop=should_stop)
    if request.json:
        result = {
            "command": "infer",
            "path": finished.path,
            "frames": finished.frames,
            "seconds_to_first_frame": round(finished.seconds_to_first_frame, 3),
            "frames_per_second": round(finished.frames_per_second, 3),
        }
        click.echo(json.dumps({**plan.summary(), **result}, ensure_ascii=True))
    else:
        # A program gets the very bytes of the name; a terminal no control characters.
        terminal = sys.stdout.isatty()
        click.echo(printable(finished.path) if terminal else os.fsencode(finished.path))
    # After the result: a record that cannot be written must not hide a finished video.
    atomic_write_text(_record_path(path), dump_run(_from_anywhere(request.resolved, plan.cfg), "infer"))


def _from_anywhere(resolved: Resolved, cfg: RunConfig) -> Resolved:
    """What a run file holds: absolute paths, so that it repeats the run from any folder.

    The output's path is in it only if it was asked for: otherwise a repeated run picks a fresh folder.
    """
    asked = dict(resolved.asked)
    sections: dict[str, Any] = {}
    for dotted in _PATHS:
        section, _, name = dotted.partition(".")
        value = value_of(cfg, dotted)
        if value is not None:
            absolute = str(Path(value).absolute())
            sections[section] = replace(sections.get(section, getattr(cfg, section)), **{name: absolute})
            if dotted in asked:
                asked[dotted] = replace(asked[dotted], value=absolute)
    return replace(resolved, cfg=replace(cfg, **sections), asked=asked)


@contextlib.contextmanager
def _leaving_no_empty_folder(folder: Path) -> Iterator[None]:
    """Removes the folders that a failed run made, as far as they are empty."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        for each in made:
            with contextlib.suppress(OSError):  # a part that was kept is in it, or it was never made
                each.rmdir()
        raise


def _record_path(path: Path) -> Path:
    return path.with_suffix(".run.yaml")


def _refuse_existing(cfg: RunConfig) -> None:
    """Before anything is read or loaded; the writer looks again when it opens the file."""
    if cfg.output.path is None:
        return
    path = Path(cfg.output.path)
    if path.is_dir():
        raise OutputRefused("is a folder", where=path, fix="name a file in it")
    from avatarctl.media.growing_file import check_video_name

    check_video_name(path)
    for output in (path, _record_path(path)):
        if os.path.lexists(output) and not cfg.output.overwrite:
            raise OutputRefused("exists", where=output, fix="add --overwrite or choose another --out")


def _fresh_path(row: Row) -> Path:
    """A folder that nobody has: two runs may start in one second."""
    stamp = Path("runs") / f"infer-{row.name}" / time.strftime("%Y%m%d-%H%M%S")
    names = (stamp.name if attempt == 1 else f"{stamp.name}-{attempt}" for attempt in itertools.count(1))
    return next(folder for name in names if not (folder := stamp.with_name(name)).exists()) / "video.mp4"


def _pull(row: Row) -> str:
    return f"`avatarctl models pull {row.name}` fetches them"


def _missing_line(missing: tuple[Wanted, ...]) -> str:
    """All files in one line, grouped by the folder they go to."""
    folders: dict[str, list[str]] = {}
    for item in missing:
        source = f" from {item.hub_id}" if item.hub_id else ""
        folders.setdefault(f"{item.folder}/{source}", []).append(item.file)
    places = "; ".join(
        f"{', '.join(_shards_as_ranges(files))} in {place}" for place, files in folders.items()
    )
    return f"weights are missing: {places}"


def _shards_as_ranges(files: Iterable[str]) -> list[str]:
    """The names, neighbouring shards as one: `model-00001..00006-of-00006.safetensors`."""
    shown: list[str] = []
    first, previous = "", None
    for name in files:
        shard = _SHARD.fullmatch(name)
        if shard and previous and _follows(shard, previous):
            shown[-1] = f"{shard['stem']}{first}..{shard['number']}{shard['rest']}"
        else:
            shown.append(name)
            first = shard["number"] if shard else ""
        previous = shard
    return shown


def _follows(shard: re.Match[str], previous: re.Match[str]) -> bool:
    same = (shard["stem"], shard["rest"]) == (previous["stem"], previous["rest"])
    return same and int(shard["number"]) == int(previous["number"]) + 1
