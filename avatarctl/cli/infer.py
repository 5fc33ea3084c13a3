"""`avatarctl infer`: an image or a video, and a voice, to a talking video."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from avatarctl.cli.memory_mode import UNDECIDED, decided_without_torch, settled, tell_seats, with_mode
from avatarctl.cli.options import EXAMPLE_MODEL, ConfigCommand, Request, config_options, read_request
from avatarctl.cli.run_file import with_absolute_paths
from avatarctl.cli.screen import Screen
from avatarctl.cli.video_output import fresh_path, make_video, record_path, refuse_existing, sheet_path
from avatarctl.config import dump_run, require_supported
from avatarctl.errors import DoesNotFit, NotYetSupported, printable
from avatarctl.events import Notice
from avatarctl.registry import COMPAT, NOT_YET, ROWS, Row, find_model

# The rooms below import numpy, which `--help` need not wait for: their names come where they are used.
if TYPE_CHECKING:
    from avatarctl.demo.contact_sheet import ContactSheet
    from avatarctl.events import OutputFinished
    from avatarctl.media import Video
    from avatarctl.pipelines.job import Job, JobPlan

__all__ = ["DEFAULT_MODEL", "infer", "tell_checkpoint"]

DEFAULT_MODEL = "cartoon-i2v"

_PATHS = ("input.image", "input.video", "input.audio", "data.mask", "output.path")
"""Keys of paths beside the model's; that of the output is in a run file only if it was asked for: otherwise a
repeated run picks a fresh folder."""

EXAMPLES = f"""\b
Examples:
  avatarctl infer --chunked
  avatarctl infer --image me.jpg --audio hello.wav --out hello.mp4
  avatarctl infer --model cartoon-v2v --video clip.mp4 --audio hello.wav
  avatarctl infer --model {EXAMPLE_MODEL} --image me.jpg --audio hello.wav --dry-run
"""


def _row(name: str) -> Row:
    """The row of a registry name, which needs no file, or of a file or folder."""
    if name in ROWS:
        return find_model(name)
    from avatarctl.loading.model_row import row_named

    return row_named(name)


def _read(params: Mapping[str, Any], row_of: Callable[[str], Row] = _row) -> Request:
    return read_request("infer", params, lambda name: row_of(name).for_config, COMPAT, DEFAULT_MODEL)


@click.command(
    cls=ConfigCommand,
    read=_read,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
    short_help="Make a talking video from an image or a video, and a voice.",
    params=config_options("infer"),
)
def infer(**params: Any) -> None:
    """Make a talking video from an image and a voice, or give a video another voice and the mouth to it.

    Without --model it is the built-in cartoon model, and without --image or --audio its built-in face and
    voice. Which model takes --video is in `avatarctl models list`. The path of the video is printed on
    standard output.
    """
    named = functools.cache(_row)  # a file says once what it is
    request = _read(params, named)
    cfg = request.resolved.cfg
    require_supported(cfg, "infer", request.resolved.origins)
    assert cfg.model.name is not None
    row = named(cfg.model.name)
    if row.status == NOT_YET:
        raise NotYetSupported(f"{row.name} is not yet supported", where="model.name")
    refuse_existing(cfg, row)

    from avatarctl.atomic import atomic_write_text
    from avatarctl.pipelines.job import check_job

    with Screen(cfg.runtime.log_level) as screen, contextlib.ExitStack() as opened:
        for notice in _introduction(request, row):
            screen(Notice(notice))
        tell_checkpoint(row, screen)
        plan = check_job(cfg, row, _job(request, row, screen, opened), screen)
        if request.dry_run:
            _show_plan(plan, request.json, screen)
            return
        plan.require_weights()  # before what is free is asked, which may take seconds
        plan = settled(plan, request.resolved.asked, screen)
        tell_seats(plan, screen)
        path = Path(cfg.output.path) if cfg.output.path else fresh_path(row)
        sheet = _contact_sheet(plan)
        finished = make_video(plan, path, screen, sheet, request.resolved.asked)
        _show_result(plan, finished, sheet_path(path) if sheet else None, request.json)
        # After the result: what cannot be written beside it must not hide a finished video.
        mode = cfg.memory.mode
        decided = {"memory.mode": plan.cfg.memory.mode} if mode == "auto" else None
        record = with_absolute_paths(request.resolved, with_mode(plan.cfg, mode), _PATHS)
        atomic_write_text(record_path(path), dump_run(record, "infer", decided))
        if sheet is not None:
            inputs = (Path(each.name).name for each in (plan.job.visual, plan.job.audio))
            sheet.save(sheet_path(path), f"{path.name}: {', '.join(inputs)}")
            screen(Notice(f"frames at eight moments: {sheet_path(path)}"))


def _introduction(request: Request, row: Row) -> list[str]:
    asked = "" if "model.name" in request.resolved.asked else " (built in; --model names another)"
    untrained = "" if row.trained else ", untrained: the video will be noise"
    title = f" ({row.title})" if row.source == "path" else ""
    lines = [f"model: {row.name}{title}{asked}{untrained}", *request.resolved.notices]
    given = request.resolved.cfg.input
    if row.world and (given.image or given.video):
        lines.append(f"{row.scope}; others will look wrong")
    return lines


def tell_checkpoint(row: Row, screen: Screen) -> None:
    """What of a folder that `avatarctl train` made is used, and what is not."""
    for line in row.passed_over:
        screen(Notice(line, "warning"))
    if row.chosen:
        screen(Notice(f"of this run: {row.chosen}"))


def _job(request: Request, row: Row, screen: Screen, opened: contextlib.ExitStack) -> Job:
    """The inputs, opened. For the built-in models, and for a dry run, the built-in sample stands in for
    what is not given; a video of a person's own is given a voice by that person."""
    from avatarctl.demo.sample import sample_audio, sample_image, sample_video
    from avatarctl.media import load_image, open_audio
    from avatarctl.pipelines.job import Job, missing_inputs, require_inputs, require_taken

    cfg = request.resolved.cfg
    takes = require_taken(cfg, row)
    if (row.source != "package" and not request.dry_run) or cfg.input.video:
        require_inputs(cfg, row)
    if missing := missing_inputs(cfg, row):
        names = {
            "image": "face (--image for yours)",
            "video": "clip (--video for yours)",
            "audio": "voice (--audio for yours)",
        }
        screen(Notice(f"input: the built-in {' and '.join(names[key] for key in missing)}"))
    image = video = None
    if takes == "video":
        video = _open_video(cfg.input.video, opened) if cfg.input.video else sample_video()
    else:
        image = load_image(cfg.input.image) if cfg.input.image else sample_image()
    audio = open_audio(cfg.input.audio) if cfg.input.audio else sample_audio()
    return Job(image, audio, cfg.input.prompt or "", cfg.input.negative_prompt or "", video)


def _open_video(path: str, opened: contextlib.ExitStack) -> Video:
    """Open until the run ends: chunks are read while they are made."""
    from avatarctl.media.video_reader import open_video

    return opened.enter_context(open_video(path))


def _show_plan(plan: JobPlan, as_json: bool, screen: Screen) -> None:
    from avatarctl.loading.sources import missing_line
    from avatarctl.pipelines.job import environment_problems

    missing = plan.sources.missing
    for problem in environment_problems(plan):
        screen(Notice(f"a run would end with exit 4: {problem}", "warning"))
    mode, why = decided_without_torch(plan)
    if mode is not None:
        plan = replace(plan, cfg=with_mode(plan.cfg, mode))
    try:
        plan.require_host()
    except DoesNotFit as problem:
        screen(Notice(f"a run would end with exit 5: {problem}", "warning"))
    summary = plan.summary()
    summary["missing_weights"] = [f"{item.folder}/{item.file}" for item in missing]
    if missing:
        screen(Notice(missing_line(missing), "warning"))
    if as_json:
        summary["memory"] = {**plan.seating.summary(), "decided": mode, "why": why}
        click.echo(json.dumps({"command": "infer", "dry_run": True, **summary}, ensure_ascii=True))
        return
    for name, value in summary.items():
        if name != "missing_weights":
            click.echo(f"{name}: {printable(', '.join(value) if isinstance(value, list) else value)}")
    if mode is None:
        click.echo(f"memory: {UNDECIDED} (auto; {why}); with everything on the device:")
    else:
        click.echo(f"memory: {plan.seating.mode}" + (f" (auto; {why})" if why else ""))
    for line in plan.seating.lines():
        click.echo(f"  {line}")


def _contact_sheet(plan: JobPlan) -> ContactSheet | None:
    """For a model whose faces can be measured. How a mouth should move is known of the built-in sentence
    alone."""
    if plan.row.world != "cartoon":
        return None
    from avatarctl.demo.contact_sheet import ContactSheet
    from avatarctl.demo.sample import sentence

    given = plan.cfg.input
    if given.audio or given.image or given.video or plan.lead_samples:
        return ContactSheet(plan.video.frames)
    return ContactSheet(plan.video.frames, sentence(plan.video.frames).opening)


def _show_result(plan: JobPlan, finished: OutputFinished, sheet: Path | None, as_json: bool) -> None:
    if as_json:
        result = {
            "command": "infer",
            "path": finished.path,
            **({"sheet": str(sheet.absolute())} if sheet else {}),
            "frames": finished.frames,
            "seconds_to_first_frame": round(finished.seconds_to_first_frame, 3),
            "frames_per_second": round(finished.frames_per_second, 3),
        }
        click.echo(json.dumps({**plan.summary(), **result}, ensure_ascii=True))
    else:
        # A program gets the very bytes of the name; a terminal no control characters.
        terminal = sys.stdout.isatty()
        click.echo(printable(finished.path) if terminal else os.fsencode(finished.path))
