"""Runs of `avatarctl train` as they are typed, and what two of them are compared by."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner, Result

from avatarctl.cli import app
from avatarctl.events import Event
from avatarctl.families import family_named
from avatarctl.parallel.world import World
from avatarctl.registry import configure, find_model
from avatarctl.training.run import TrainingRun
from avatarctl.training.trainer import Trainer

__all__ = ["ADAPTED", "COMPARED", "QUICK", "SMALL", "bits", "forked", "made_trainer", "typed"]

SMALL = ("--size", "32x32", "--frames", "9", "--max-steps", "3", "--batch-size", "2")
"""A run that costs little."""

QUICK = ("-o", "memory.activation_checkpointing=none")
"""Activations are kept, which changes no number: the runs that others are compared with make them again."""

ADAPTED = (
    *SMALL[:4], "--max-steps", "2", "--batch-size", "1", "--mode", "lora", "--lora-rank", "2", "--ema", "0.5",
    *QUICK, "-o", "checkpoint.every=1",
)  # fmt: skip

COMPARED = ("trainable_weights.safetensors", "optimizer.safetensors")


def typed(*words: object) -> Result:
    return CliRunner().invoke(app, list(map(str, words)), prog_name="avatarctl")


def made_trainer(
    folder: Path, data: Path, *words: str, model: str = "cartoon-v2v", world: World | None = None
) -> Trainer:
    """A trainer as `train` makes it, in a new folder; words: settings. Its `events` are what the run said."""
    events: list[Event] = []
    settings = {
        "model.name": model, "data.path": str(data), "data.width": "32", "data.height": "32",
        "data.num_frames": "9", "train.max_steps": "9", "memory.activation_checkpointing": "none",
        **dict(word.split("=", 1) for word in words),
    }  # fmt: skip
    cfg = configure(*(f"{name}={value}" for name, value in settings.items()))
    row = find_model(model)
    command = "train i2v" if cfg.model.channels == 33 else "train v2v"
    run = TrainingRun(command, cfg, row, family_named(row.family), folder, events.append, world=world)  # type: ignore[arg-type]
    folder.mkdir()
    (folder / "run.yaml").write_text(f"command: {command}\nasked: {{}}\n", encoding="utf-8")
    trainer = run._trainer(run.open_data())
    trainer.events = events  # type: ignore[attr-defined]
    return trainer


def bits(run: Path, step: int) -> list[bytes]:
    """Weights, moments and log of a run."""
    checkpoint = run / f"checkpoint-{step}"
    return [*((checkpoint / name).read_bytes() for name in COMPARED), (run / "log.jsonl").read_bytes()]


def forked(prepare: Callable[[], None], *words: object, said: Path) -> int:
    """The same in a process of its own, a fork of this one, that `prepare` may harm; its exit code, minus the
    number of a signal that ended it. What it says is written to `said`.

    A fork and not a new process: that would import for five seconds. Nothing may have touched a GPU before.
    """
    gc.collect()
    child = os.fork()
    if child == 0:
        # What other tests left is theirs: a decoder that is freed here waits for threads that only they have.
        gc.freeze()
        code = 1
        try:
            with said.open("wb") as file:
                for stream in (1, 2):
                    os.dup2(file.fileno(), stream)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w") for stream in (1, 2))
            prepare()
            app.main(list(map(str, words)), prog_name="avatarctl")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # no end of a test run: this is a copy of one
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
