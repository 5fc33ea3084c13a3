"""The root command, and the one place where errors become exit codes."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

import avatarctl
from avatarctl.cli.command import Command
from avatarctl.cli.screen import spell_out
from avatarctl.cli.signals import HANGUP, stop_signals
from avatarctl.cli.start import let_waiting_threads_sleep
from avatarctl.errors import (
    AvatarctlError,
    DoesNotFit,
    EnvironmentMissing,
    Interrupted,
    PathNotFound,
    UsageError,
    WriteFailed,
    printable,
)

__all__ = ["CommandGroup", "app", "is_out_of_memory", "main", "one_line"]

_UNREACHABLE = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
"""What the system says about a person's path already when it is looked at."""

_FAILED_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class CommandGroup(click.Group):
    """A group that imports a command when it is called, and knows what a mistyped one was meant to be.

    lazy: command name -> ("module:attribute", the short help shown without importing it).
    """

    command_class = Command

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = dict(lazy or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            known = f"did you mean {near[0]}?" if near else f"there are {', '.join(self.list_commands(ctx))}"
            raise UsageError(f"no such command {name[:100]!r}", fix=known)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, help_line) for name, (_, help_line) in self.lazy.items()]
        for name, command in self.commands.items():
            if not command.hidden:
                rows.append((name, command.get_short_help_str(limit=80)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class App(CommandGroup):
    """The root: runs a command and ends the process with the exit code of what happened."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        def run() -> Any:
            return super(App, self).main(args, prog_name, complete_var, standalone_mode=False, **extra)

        if not standalone_mode:
            return run()
        code = exit_code_of(run)
        _flush_or_forget()
        sys.exit(code)


def exit_code_of(run: Callable[[], object]) -> int:
    """Run a command; report a failure on standard error and return the exit code.

    A failure is one line, unless it is a bug: then the traceback, and 1. The help of a group that was
    called without a command is no failure to explain, and stays as it is.
    """
    try:
        code = run()
        return code if isinstance(code, int) and not isinstance(code, bool) else 0
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except SystemExit:
        # Click's way to say that nobody reads standard output any more (`| head`): no failure of ours.
        return 0
    except BaseException as error:
        known = _known(error)
        # The exit code counts even where nobody reads the words: a closed pipe, a full disk.
        with contextlib.suppress(OSError):
            if isinstance(error, click.exceptions.NoArgsIsHelpError):
                click.echo(error.format_message(), err=True)
            elif known is None:
                traceback.print_exception(error)
            else:
                click.echo(f"error: {known}", err=True)
        return known.exit_code if known is not None else AvatarctlError.exit_code


def _flush_or_forget() -> None:
    """Write what is buffered; where nobody reads any more, point the stream to nowhere.

    The interpreter flushes once more at its end and would replace the exit code by 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # closed, or no file at all
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _known(error: BaseException) -> AvatarctlError | None:
    """`error` as one of ours, or None for a bug."""
    if isinstance(error, AvatarctlError):
        return error
    if isinstance(error, click.ClickException):
        return UsageError(one_line(error))
    if isinstance(error, (click.Abort, KeyboardInterrupt, _Stopped)):
        return Interrupted("interrupted")
    if is_out_of_memory(error):
        return DoesNotFit(
            "out of memory", where=str(error)[:200] or None, fix="use a smaller --size or fewer --num-frames"
        )
    if _is_of_the_device(error):
        return EnvironmentMissing(
            f"the device failed or went away: {str(error).partition(chr(10))[0][:200]}",
            where="runtime.device",
            fix="look whether `nvidia-smi` still names it, then run the same command again",
        )
    if isinstance(error, Exception) and (package := _failed_import(error)) is not None:
        return _of_this_machine(error, package)
    if isinstance(error, OSError) and error.errno in _UNREACHABLE and error.filename is not None:
        return PathNotFound(os.strerror(error.errno).lower(), where=error.filename)
    if isinstance(error, OSError) and error.errno in _FAILED_OUTPUT and _is_of_a_result(error):
        return WriteFailed(os.strerror(error.errno).lower(), where="standard output")
    return None


def _failed_import(error: BaseException) -> str | None:
    """The foreign package whose import raised `error` or its cause, empty if its name is unknown; None if it
    came from no import.

    Within an import the body of a foreign module is on the stack; a call into a finished one has none. Python
    leaves out its own frames of an import.
    """
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if module == "avatarctl":
            found = None
        elif frame.f_code.co_name == "<module>" and found is None:
            found = module
    if found is None and error.__cause__ is not None:
        found = _failed_import(error.__cause__)
    if found is None and isinstance(error, ImportError):
        found = (error.name or "").partition(".")[0]
    return None if found == "avatarctl" else found


def _of_this_machine(error: Exception, package: str) -> EnvironmentMissing:
    """What an import met here, and the variable to set, where one is known."""
    import tempfile

    said = " ".join(str(error).split())[:300]
    fix = f"`{sys.executable} -c 'import {package}'` says more" if package else None
    if isinstance(error, OSError) and error.filename is None:
        try:
            tempfile.gettempdir()
        except OSError:
            said, fix = "there is no usable temporary folder", "set TMPDIR to a folder that can be written"
    elif isinstance(error, OSError):
        named = [name for name, value in os.environ.items() if value and _is_below(error.filename, value)]
        if named:
            nearest = max(named, key=lambda name: len(os.environ[name]))
            fix = f"set {nearest} to a folder that can be written"
    return EnvironmentMissing(f"{package or 'a package'} cannot be imported: {said}", fix=fix)


def _is_below(path: object, folder: str) -> bool:
    return isinstance(path, str) and Path(path).is_relative_to(folder)


def _is_of_a_result(error: OSError) -> bool:
    """Whether `error` arose while a result was printed; lines for people are lost without one."""
    return any(frame.f_code is click.echo.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def one_line(error: click.ClickException) -> str:
    """What click says, as one line in the style of ours."""
    message = " ".join(error.format_message().split())
    return printable(message[:1].lower() + message[1:].rstrip("."))


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, torch's on a device, or torch's on the host (a plain RuntimeError); torch is not imported."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _is_of_the_device(error: BaseException) -> bool:
    """What CUDA reports of itself; out of memory is asked before."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.AcceleratorError)


@click.command(
    cls=App,
    name="avatarctl",
    lazy={
        "infer": ("avatarctl.cli.infer:infer", "Make a talking video from an image and a voice."),
        "train": ("avatarctl.cli.train:train", "Teach a model new faces, voices and languages."),
        "convert-ckpt": (
            "avatarctl.cli.convert:convert_ckpt",
            "Convert, merge, extract or inspect weight files.",
        ),
        "vram-profile": (
            "avatarctl.cli.vram_profile:vram_profile",
            "Say what a run will need, without a card.",
        ),
        "models": ("avatarctl.cli.models:models", "Show, fetch and check models and published files."),
        "precompute-audio": (
            "avatarctl.cli.precompute:precompute_audio",
            "Encode the audio of training samples once.",
        ),
        "precompute-latents": (
            "avatarctl.cli.precompute:precompute_latents",
            "Cut videos into training samples; encode their video and text once.",
        ),
        "demo": ("avatarctl.cli.demo:demo", "Let a face of the built-in cartoon world speak."),
        "separate": ("avatarctl.cli.separate:separate", "Take speech out of a mix."),
        "doctor": ("avatarctl.cli.doctor:doctor", "Say what is missing on this machine."),
    },
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(avatarctl.__version__, message="%(prog)s %(version)s")
def app() -> None:
    """Train, run, convert and size up audio-driven avatar video models.

    Results go to standard output, everything for people to standard error.
    """


class _Stopped(BaseException):
    """A signal before or after a job listens for itself (signals.py).

    Not KeyboardInterrupt: one that passes through `exec`, as in many imports, makes `python -m` end by
    the signal even after it was handled.
    """


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    for each in stop_signals():
        signal.signal(each, _interrupt_again)
    raise _Stopped


def _interrupt_again(number: int, frame: FrameType | None) -> None:
    """Lets a command that ends remove what it began; a third signal ends the process at once.

    Terminals and the programs that start others often send the same one twice, and an exception here would
    come in the middle of the removal.
    """
    if number == HANGUP:
        return
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, b"cleaning up; once more to stop at once\n")
    for each in stop_signals():
        if each != HANGUP:
            signal.signal(each, signal.SIG_DFL)


def _open_closed_streams() -> None:
    """Nowhere for streams that were closed (`2>&-`), which Python has as None.

    In this order they also take the descriptors 0 to 2, so that no file of ours does and is then written
    into by whoever means standard error.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - for as long as we run
            setattr(sys, name, nowhere)


def main() -> NoReturn:
    """The console script."""
    _open_closed_streams()
    let_waiting_threads_sleep()
    for stream in (sys.stdout, sys.stderr):
        spell_out(stream)
    for each in stop_signals():
        signal.signal(each, _interrupt)
    # The hub's client warns of it at its import, whatever the command; it changes nothing here.
    warnings.filterwarnings("ignore", ".*HF_HUB_ENABLE_HF_TRANSFER", FutureWarning)
    app.main(prog_name="avatarctl")
    raise AssertionError("unreachable: App.main ends the process")
