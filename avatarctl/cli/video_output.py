"""A video that a command makes: where it goes, what stands beside it, and what is never written over."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avatarctl.cli.screen import Screen
from avatarctl.config import RunConfig
from avatarctl.errors import OutputRefused
from avatarctl.events import Notice
from avatarctl.registry import Row

# The rooms below import numpy, which `--help` need not wait for: their names come where they are used.
if TYPE_CHECKING:
    from avatarctl.demo.contact_sheet import ContactSheet
    from avatarctl.events import OutputFinished
    from avatarctl.pipelines.job import JobPlan

__all__ = [
    "fresh_path",
    "leaving_no_empty_folder",
    "make_video",
    "record_path",
    "refuse_existing",
    "sheet_path",
]


def make_video(
    plan: JobPlan,
    path: Path,
    screen: Screen,
    sheet: ContactSheet | None,
    asked: Mapping[str, Any] | None = None,
) -> OutputFinished:
    """The file at `path`, growing until it is whole; `sheet` is shown its frames. asked: settings that a
    person chose, which an answer to a full memory leaves alone."""
    from avatarctl.atomic import remove_left_behind
    from avatarctl.cli.out_of_memory import answered, of_infer
    from avatarctl.cli.signals import stop_on_signals
    from avatarctl.cli.start import importing_networks

    plan.require_weights()  # before the seconds that the next import takes
    plan.require_host()
    with importing_networks():
        from avatarctl.pipelines.infer import write_video
        from avatarctl.profiling.happened import Happened

    for line in remove_left_behind(path.parent):
        screen(Notice(line))
    happened = Happened(counting=plan.cfg.runtime.log_level == "debug")
    answer = of_infer(plan, asked or {}, screen)
    with (
        answered(
            f"infer of {plan.row.name}", lambda: happened.failed, plan.cfg.runtime.device, answer, screen
        ),
        stop_on_signals() as should_stop,
        leaving_no_empty_folder(path.parent),
    ):
        watch = sheet.add if sheet else None
        with happened:
            finished = write_video(
                plan, path, emit=screen, should_stop=should_stop, watch=watch, seen=happened.watch
            )
    for line in happened.lines():
        screen(Notice(line))
    return finished


@contextlib.contextmanager
def leaving_no_empty_folder(folder: Path) -> Iterator[None]:
    """Removes the folders that a failed run made, as far as they are empty."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        for each in made:
            with contextlib.suppress(OSError):  # a part that was kept is in it, or it was never made
                each.rmdir()
        raise


def record_path(path: Path) -> Path:
    """Of the run file."""
    return path.with_suffix(".run.yaml")


def sheet_path(path: Path) -> Path:
    """Of the page that shows it."""
    return path.with_suffix(".sheet.png")


def refuse_existing(cfg: RunConfig, row: Row) -> None:
    """Before anything is read or loaded; the writer looks again when it opens the file."""
    if cfg.output.path is None:
        return
    path = Path(cfg.output.path)
    if path.is_dir():
        raise OutputRefused("is a folder", where=path, fix="name a file in it")
    from avatarctl.media.growing_file import check_video_name

    check_video_name(path)
    sheet = [sheet_path(path)] if row.world else []
    for output in (path, record_path(path), *sheet):
        if os.path.lexists(output) and not cfg.output.overwrite:
            raise OutputRefused("exists", where=output, fix="add --overwrite or choose another --out")
    for output, given in itertools.product(sheet, filter(None, (cfg.input.image, cfg.data.mask))):
        with contextlib.suppress(OSError):  # one of the two is no file; its reader says so
            if output.samefile(given):
                raise OutputRefused(f"writing it would destroy the input {given}", where=output)


def fresh_path(row: Row, command: str = "infer") -> Path:
    """A folder that nobody has: two runs may start in one second."""
    stamp = Path("runs") / f"{command}-{row.name}" / time.strftime("%Y%m%d-%H%M%S")
    names = (stamp.name if attempt == 1 else f"{stamp.name}-{attempt}" for attempt in itertools.count(1))
    return next(folder for name in names if not (folder := stamp.with_name(name)).exists()) / "video.mp4"
