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
    command: click.Command = app
    context = click.Context(app, info_name=app.name)
    try:
        while isinstance(command, click.Group):
            if not words:
                raise UsageError("names no command", where="--for", fix="try 'infer --model NAME'")
            name, found, words = command.resolve_command(context, words)
            assert found is not None and name is not None
            command, context = found, click.Context(found, context, name)
        if not isinstance(command, ConfigCommand):
            raise UsageError(f"{context.info_name} needs no model", where="--for")
        return command.read(command.make_context(context.info_name, words).params)
    except click.ClickException as error:
        raise UsageError(one_line(error), where="--for") from error
