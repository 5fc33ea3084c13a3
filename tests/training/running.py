"""Runs of `avatarctl train` as they are typed, and what two of them are compared by."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner, Result

from avatarctl.cli import app

__all__ = ["COMPARED", "SMALL", "bits", "forked", "typed"]

SMALL = ("--size", "32x32", "--frames", "9", "--max-steps", "3", "--batch-size", "2")
"""A run that costs little."""

COMPARED = ("trainable_weights.safetensors", "optimizer.safetensors")


def typed(*words: object) -> Result:
    return CliRunner().invoke(app, list(map(str, words)), prog_name="avatarctl")


def bits(run: Path, step: int) -> list[bytes]:
    """Weights, moments and log of a run."""
    checkpoint = run / f"checkpoint-{step}"
    return [*((checkpoint / name).read_bytes() for name in COMPARED), (run / "log.jsonl").read_bytes()]


def forked(prepare: Callable[[], None], *words: object, said: Path) -> int:
    """The same in a process of its own, a fork of this one, that `prepare` may harm; its exit code, minus the
    number of a signal that ended it. What it says is written to `said`.

    A fork and not a new process: that would import for five seconds. Nothing may have touched a GPU before.
    """
    child = os.fork()
    if child == 0:
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
