"""Every error that avatarctl raises on purpose, as one tree; the class decides the exit code.

    AvatarctlError                 1   never raised itself
    ├── UsageError                 2   the command line or a configuration is wrong
    │   ├── ConfigError            2   a configuration file, key or value
    │   ├── NotYetSupported        2   a valid value whose code does not exist yet
    │   ├── PathNotFound           2   a path that was named does not exist
    │   └── OutputRefused          2   the output exists, is locked, or cannot be written there
    ├── UnusableFile               3   a file exists and cannot be used
    │   ├── UnusableAudio          3
    │   ├── UnusableImage          3
    │   ├── UnusableVideo          3
    │   ├── UnusableWeights        3
    │   └── WriteFailed            3   the disk refused bytes while a file was being written
    ├── EnvironmentMissing         4   weights, an optional package or a device are absent
    │   ├── WeightsMissing         4
    │   └── ExtraMissing           4
    ├── DoesNotFit                 5   the work does not fit in memory
    ├── Interrupted                6   stopped by a signal; can be run again
    └── PartlyFailed               7   some jobs or samples failed, at least one succeeded

Anything else that reaches the top of a command is a bug: exit 1, and the only traceback.
"""

from __future__ import annotations

import unicodedata
from pathlib import PurePath

__all__ = [
    "AvatarctlError",
    "ConfigError",
    "DoesNotFit",
    "EnvironmentMissing",
    "ExtraMissing",
    "Interrupted",
    "NotYetSupported",
    "OutputRefused",
    "PartlyFailed",
    "PathNotFound",
    "UnusableAudio",
    "UnusableFile",
    "UnusableImage",
    "UnusableVideo",
    "UnusableWeights",
    "UsageError",
    "WeightsMissing",
    "WriteFailed",
    "printable",
    "under_name",
]


def printable(text: object) -> str:
    """`text` on one line, with every control, format and surrogate character escaped.

    File names and file contents are strangers' text: raw escape sequences would reach the
    terminal, and line breaks would make one message look like two.
    """
    return "".join(
        char.encode("unicode_escape", "surrogatepass").decode("ascii")
        if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
        else char
        for char in str(text)
    )


class AvatarctlError(Exception):
    """A failure that the user can understand and mend, shown as one line without a traceback.

    what:  the cause, in lower case and without a full stop
    where: the file, key or option concerned, if any
    fix:   one thing to do about it, if we know one
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        head = f"{self.where}: " if self.where is not None else ""
        tail = f" ({self.fix})" if self.fix else ""
        return printable(f"{head}{self.what}{tail}")


class UsageError(AvatarctlError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class NotYetSupported(UsageError):
    pass


class PathNotFound(UsageError):
    pass


class OutputRefused(UsageError):
    pass


class UnusableFile(AvatarctlError):
    exit_code = 3


class UnusableAudio(UnusableFile):
    pass


class UnusableImage(UnusableFile):
    pass


class UnusableVideo(UnusableFile):
    pass


class UnusableWeights(UnusableFile):
    pass


class WriteFailed(UnusableFile):
    pass


class EnvironmentMissing(AvatarctlError):
    exit_code = 4


class WeightsMissing(EnvironmentMissing):
    pass


class ExtraMissing(EnvironmentMissing):
    pass


class DoesNotFit(AvatarctlError):
    exit_code = 5


class Interrupted(AvatarctlError):
    exit_code = 6


class PartlyFailed(AvatarctlError):
    exit_code = 7


def under_name(name: str, problem: AvatarctlError) -> str:
    """What is wrong with the file or sample of this name, once: the path in the problem may end with it or
    lead through it."""
    said = "" if problem.where is None else PurePath(str(problem.where)).as_posix()
    return str(problem) if f"/{name}/" in f"/{said}/" else printable(f"{name}: {problem}")
