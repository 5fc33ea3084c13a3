"""The command line: parse, build RunConfig, call one function, show events.

Only this package reads arguments, and the environment but for the hub's. Commands are imported when they are
called, and heavy libraries inside the functions that need them, so that help costs next to nothing.
"""

from avatarctl.cli.app import app, main

__all__ = ["app", "main"]
