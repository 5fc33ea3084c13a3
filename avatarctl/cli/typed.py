"""A command as somebody would type it, read by the command itself and not run."""

from __future__ import annotations

import shlex

import click

from avatarctl.cli.app import app, one_line
from avatarctl.cli.options import ConfigCommand, Request
from avatarctl.errors import UsageError

__all__ = ["read_typed"]


def read_typed(text: str) -> Request:
    """What `[avatarctl] COMMAND OPTIONS...` asks for.

    Raises UsageError for words that the command line itself would refuse and for commands without a model.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"a quotation mark is open in {text[:100]!r}", where="--for") from error
    if words[:1] == [app.name]:
        del words[0]
    if {"-h", "--help", "--version"} & set(words):
        raise UsageError("asks for help or the version, not for a run", where="--for")
    command, name, words = _command(words)
    if not isinstance(command, ConfigCommand):
        raise UsageError(f"{name} needs no model", where="--for")
    try:
        return command.read(command.make_context(name, words).params)
    except click.ClickException as error:
        raise UsageError(one_line(error), where="--for") from error


def _command(words: list[str]) -> tuple[click.Command, str, list[str]]:
    """The command that `words` begin with, its full name, and the words behind it."""
    command: click.Command = app
    names: list[str] = []
    while isinstance(command, click.Group):
        if not words:
            raise UsageError("names no command", where="--for", fix="try 'infer --model NAME'")
        try:
            name, found, words = command.resolve_command(click.Context(command), words)
        except UsageError as error:
            raise UsageError(error.what, where="--for", fix=error.fix) from error
        assert found is not None and name is not None
        command = found
        names.append(name)
    return command, " ".join(names), words
