"""Options made from RunConfig's keys, and what a person asked for made from the options."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args, get_origin

import click

from avatarctl.cli.command import Command
from avatarctl.config import (
    ANY,
    COMMANDS,
    ConfigFile,
    KeySpec,
    Resolved,
    Setting,
    find_config,
    is_shipped,
    keys,
    keys_of,
    read_assignment,
    read_config,
    read_text,
    resolve,
    unread,
)
from avatarctl.config.rules import PATH
from avatarctl.config.values import kind_of
from avatarctl.errors import ConfigError
from avatarctl.registry import ROWS

__all__ = ["EXAMPLE_MODEL", "ConfigCommand", "Request", "config_options", "read_request"]

SHORT_FORMS: Final[Mapping[str, tuple[str, ...]]] = {
    "model.name": ("--model",),
    "output.path": ("--out",),
    "sampling.guidance_scale": ("--guidance", "--guidance-scale"),
    "sampling.audio_guidance_scale": ("--audio-guidance", "--audio-guidance-scale"),
    "input.jobs": ("--batch", "--jobs"),
    "long_video.strategy": ("--long-video",),
    "long_video.overlap_frames": ("--overlap", "--overlap-frames"),
    "memory.mode": ("--memory",),
    "memory.swap_blocks": ("--swap-blocks",),
    "data.path": ("--data",),
    "data.videos": ("--from-videos",),
    "data.num_frames": ("--frames", "--num-frames"),
    "aux.losses": ("--aux",),
}
"""Flags of keys that have a short form, or whose own name says too little alone."""

METAVARS: Final[Mapping[str, str]] = {
    "model.name": "NAME|PATH",
    "model.weights": "PART=PATH",
    "model.lora": "PATH[:SCALE]",
    "data.faces": "auto|all|none|PATH",
}
"""What stands for a value in the help, where its type says too little."""

TITLES: Final[Mapping[str, str]] = {
    "model": "Model",
    "input": "Input",
    "sampling": "Sampling",
    "long_video": "Long video",
    "output": "Output",
    "memory": "Memory",
    "data": "Data",
    "train": "Training",
    "aux": "Auxiliary losses",
    "checkpoint": "Checkpoints",
    "validation": "Validation",
    "runtime": "Machine",
}

SIZE_SECTIONS: Final = ("data", "output")
"""`--size` is the width and height of the first of these that a command reads, of its main sections if one
of them is."""

WEIGHTS_VARIABLE: Final = "AVATARCTL_WEIGHTS"

EXAMPLE_MODEL: Final = next(
    row.name for row in ROWS.values() if row.kind == "model" and row.source != "package"
)
"""The model that examples in the help name."""


@dataclass(frozen=True)
class Request:
    """What the command line asks a command to do."""

    resolved: Resolved
    dry_run: bool
    json: bool


class KeyOption(click.Option):
    """An option that stands for one key; `section` groups it in the help."""

    def __init__(self, *args: Any, spec: KeySpec, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spec = spec


class ConfigCommand(Command):
    """A command on a RunConfig; its help lists its options by section.

    read: makes the request out of the parsed parameters; `models pull --for` asks it as well.
    """

    def __init__(self, *args: Any, read: Callable[[Mapping[str, Any]], Request], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read = read

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Older flags are read as what they are called now, which is also what messages then name."""
        return super().parse_args(ctx, [_FORMER_FLAGS.get(word, word) for word in args])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {title: [] for title in TITLES.values()}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                title = TITLES[param.spec.section] if isinstance(param, KeyOption) else "Options"
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


_FORMER_FLAGS: Final[Mapping[str, str]] = {
    f"--{no}{spec.key.formerly.replace('_', '-')}": f"--{no}{spec.name.replace('_', '-')}"
    for spec in keys().values()
    if spec.key.formerly
    for no in ("", "no-")
}


def config_options(command: str) -> list[click.Parameter]:
    """An option for every key that `command` reads, and the common options; for `click.command(params=)`."""
    return [*_options(command, flags_of(command))]


def _options(command: str, flags: Mapping[str, tuple[str, ...]]) -> list[click.Option]:
    """flags: of every key that the command reads."""
    options = [_option(keys()[dotted], own, command) for dotted, own in flags.items() if own]
    if "long_video.strategy" in flags:
        options.append(click.Option(["--chunked"], is_flag=True, help="The same as --long-video chunks."))
    if _size_section(command):
        options.append(
            click.Option(["--size"], multiple=True, metavar="WxH", help="Width and height in pixels.")
        )
    return [*options, *_common_options()]


def _size_section(command: str) -> str | None:
    """The section of which `--size` is width and height: the command's main one before others."""
    read, main = keys_of(command), COMMANDS[command].main
    sections = [each for each in SIZE_SECTIONS if f"{each}.width" in read and f"{each}.height" in read]
    return next((each for each in sections if each in main), sections[0] if sections else None)


def _common_options() -> list[click.Option]:
    return [
        click.Option(
            ["--config"], multiple=True, metavar="FILE", help="Configuration or run file, or a shipped name."
        ),
        click.Option(
            ["-o", "--option", "assignments"], multiple=True, metavar="SECTION.KEY=VALUE", help="Set any key."
        ),
        click.Option(["--dry-run"], is_flag=True, help="Check everything and print the plan; touch nothing."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document."),
        click.Option(["-v", "--verbose"], is_flag=True, help="Say more; the same as --log-level debug."),
        click.Option(["-q", "--quiet"], is_flag=True, help="Say warnings and errors only."),
    ]


def flags_of(command: str) -> dict[str, tuple[str, ...]]:
    """Every key that `command` reads -> its flags, the preferred one first.

    A flag that keys of several sections could have belongs to the command's main sections alone, even if the
    command reads only one of these keys: where sampling is not a main section, `--steps` must not come to
    mean validation.steps. A key without a flag is set by `-o`.
    """
    keys_with = Counter(flag for spec in keys().values() for flag in _possible_flags(spec))
    main = COMMANDS[command].main
    return {
        dotted: tuple(flag for flag in _possible_flags(spec) if keys_with[flag] == 1 or spec.section in main)
        for dotted, spec in keys_of(command).items()
    }


def _possible_flags(spec: KeySpec) -> tuple[str, ...]:
    return SHORT_FORMS.get(spec.dotted, (f"--{spec.name.replace('_', '-')}",))


def _option(spec: KeySpec, flags: tuple[str, ...], command: str) -> click.Option:
    parameter = _parameter(spec.dotted)
    kind, help_line = kind_of(spec.type), _help(spec)
    hidden = is_without_code(spec, command)
    if kind is bool:
        switch = f"{flags[0]}/--no-{flags[0][2:]}"
        return KeyOption([switch, parameter], default=None, help=help_line, hidden=hidden, spec=spec)
    return KeyOption(
        [*flags, parameter],
        multiple=True,
        metavar=_metavar(spec, command),
        help=help_line,
        hidden=hidden,
        spec=spec,
    )


def _parameter(dotted: str) -> str:
    return dotted.replace(".", "__")


def is_without_code(spec: KeySpec, command: str) -> bool:
    """Whether `command` would accept no value of the key but the default today."""
    if spec.not_yet(command) == ANY:
        return True
    choices = get_args(kind_of(spec.type)) if get_origin(kind_of(spec.type)) is Literal else ()
    return bool(choices) and len(_supported(spec, choices, command)) <= 1


def _supported(spec: KeySpec, choices: tuple[Any, ...], command: str) -> list[Any]:
    mark = spec.not_yet(command)
    return [] if mark == ANY else [choice for choice in choices if choice not in mark]


def _metavar(spec: KeySpec, command: str) -> str:
    kind = kind_of(spec.type)
    if get_origin(kind) is Literal:
        return "|".join(map(str, _supported(spec, get_args(kind), command) or get_args(kind)))
    if spec.dotted in METAVARS:
        return METAVARS[spec.dotted]
    if spec.key.rule is PATH:
        return "PATH"
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _help(spec: KeySpec) -> str:
    first = spec.key.help.split()[0].rstrip(":,")
    # A sentence begins with a capital, unless it begins with a value as it must be typed.
    literal = first == "auto" or first in map(str, get_args(kind_of(spec.type)))
    text = (first if literal else first[0].upper() + first[1:]) + spec.key.help[len(first) :] + "."
    if spec.key.from_row:
        return f"{text} [default: the model's]"
    if spec.default is None or spec.default == () or spec.default == {} or isinstance(spec.default, bool):
        return text
    # As it would be typed.
    shown = ",".join(map(str, spec.default)) if isinstance(spec.default, tuple) else spec.default
    return f"{text} [default: {shown}]"


def read_request(
    command: str,
    params: Mapping[str, Any],
    row_of: Callable[[str], Any],
    compat: Mapping[str, Mapping[str, Any]],
    default_model: str,
) -> Request:
    """The options of a command, its configuration file and the environment, resolved.

    One notice names all that a person asked for and the command does not read. What a shipped file asks for
    is not the person's, nor are the resolved values of a run file.
    row_of, compat, default_model: see `avatarctl.config.resolve`. Raises ConfigError, PathNotFound.
    """
    asked: dict[str, Setting] = {}
    for dotted, setting in _asked(command, params):
        other = asked.setdefault(dotted, setting)
        if isinstance(setting.value, Mapping) and _agree(other.value, setting.value):
            asked[dotted] = Setting({**other.value, **setting.value}, setting.origin)
        elif other.value != setting.value:
            raise ConfigError(
                f"{dotted} is asked for twice: {_short(other.value)} by {other.origin}, "
                f"{_short(setting.value)} by {setting.origin}"
            )
    files = params["config"]
    if len(files) > 1:
        raise ConfigError("given twice; one configuration file is read", where="--config")
    path = find_config(files[0], command) if files else None
    file: ConfigFile | None = read_config(path, command=command) if path else None
    ambient = {}
    if os.environ.get(WEIGHTS_VARIABLE):
        spec = keys()["model.weights_root"]
        ambient[spec.dotted] = read_text(spec, os.environ[WEIGHTS_VARIABLE], WEIGHTS_VARIABLE)
    resolved = resolve(
        row_of, compat, file, asked, default_model=default_model, ambient=ambient, stated_by=_stated_by
    )
    in_file = file.asked if file and path and not is_shipped(path) else frozenset()
    if idle := unread(asked.keys() | in_file, command):
        line = f"no effect: `avatarctl {command}` does not read {', '.join(idle)}"
        resolved = replace(resolved, notices=(*resolved.notices, line))
    return Request(resolved, dry_run=params["dry_run"], json=params["as_json"])


def _stated_by(model: str, transformer: str) -> Mapping[str, Any]:
    from avatarctl.loading.model_row import stated_by  # with numpy, which most commands can do without

    return stated_by(model, transformer)


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(part, value) == value for part, value in other.items())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _asked(command: str, params: Mapping[str, Any]) -> Iterator[tuple[str, Setting]]:
    for dotted, flags in flags_of(command).items():
        given = params.get(_parameter(dotted))
        if given is None or given == ():
            continue
        spec, origin = keys()[dotted], flags[0]
        if isinstance(given, bool):
            yield spec.dotted, Setting(given, origin)
        elif get_origin(kind_of(spec.type)) is tuple:
            parts = [read_text(spec, text, origin).value for text in given]
            yield spec.dotted, Setting(tuple(item for part in parts for item in part), origin)
        else:
            yield from ((spec.dotted, read_text(spec, text, origin)) for text in given)
    for text in params["assignments"]:
        yield read_assignment(text, f"-o {text.partition('=')[0][:60]}")
    if params.get("chunked"):
        yield "long_video.strategy", Setting("chunks", "--chunked")
    for text in params.get("size", ()):
        yield from _width_and_height(text, _size_section(command))
    if params["verbose"]:
        yield "runtime.log_level", Setting("debug", "--verbose")
    if params["quiet"]:
        yield "runtime.log_level", Setting("warning", "--quiet")


def _width_and_height(text: str, section: str | None) -> Iterator[tuple[str, Setting]]:
    width, by, height = text.lower().partition("x")
    if not by:
        raise ConfigError(f"expected WIDTHxHEIGHT such as 720x400, got {text[:60]!r}", where="--size")
    for dotted, pixels in ((f"{section}.width", width), (f"{section}.height", height)):
        yield dotted, read_text(keys()[dotted], pixels, "--size")
