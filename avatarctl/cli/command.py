"""A command that takes each option as often as it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import click

from avatarctl.errors import UsageError

__all__ = ["Command"]


class Command(click.Command):
    """Refuses an option that is given more often than it counts; click would take the last in silence.

    A switch may be repeated, but not contradicted. Options declared `multiple` are left to the command.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Raises UsageError naming the option."""
        words = list(args)  # parsing empties the list
        left = super().parse_args(ctx, args)
        _, _, order = self.make_parser(ctx).parse_args(args=list(words))
        for param, count in Counter(order).items():
            if isinstance(param, click.Option) and count > 1 and not _may_repeat(param, words):
                raise UsageError("given more than once", where=param.opts[0], fix="give it once")
        return left


def _may_repeat(option: click.Option, words: Sequence[str]) -> bool:
    if option.is_flag:
        return not (set(option.opts) & set(words) and set(option.secondary_opts) & set(words))
    return option.multiple or option.count
