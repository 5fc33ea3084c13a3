"""Writes the pages that are made from the code: docs/cli.md, docs/configuration.md, configs/README.md.

python docs/generate.py           write them
python docs/generate.py --check   write nothing; name the stale ones and end with 1
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from avatarctl.cli import app
from avatarctl.cli.options import flags_of, is_without_code
from avatarctl.config import ANY, COMMANDS, KeySpec, expected, keys, keys_of, preset_names, read_config
from avatarctl.config.keys import Mark
from avatarctl.config.sections import section_types
from avatarctl.registry import COMPAT, ROWS

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100
"""Columns of the printed help, whatever terminal this runs in."""

HEAD = "<!-- Made by `python docs/generate.py`; change the code and run that. -->\n"

LONGEST_VALUE = 60
CARD_AND_SOURCE = re.compile(
    r"\A# (?P<title>.+)\n# Source: (?P<source>.+)\n# Card: (?P<card>.+)\n(# Predicted: (?P<predicted>.+)\n)?"
)


def pages(root: Path) -> Mapping[str, str]:
    """Text of every generated page by its path relative to `root`; presets are read below `root`."""
    return {
        "docs/cli.md": cli_page(),
        "docs/configuration.md": configuration_page(),
        "configs/README.md": presets_page(root / "configs"),
    }


def stale(root: Path) -> dict[str, str]:
    """The pages that are absent or differ from what the code says, with the text they should have."""
    return {name: text for name, text in pages(root).items() if not _holds(root / name, text)}


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


# docs/cli.md


def cli_page() -> str:
    """The help of every command."""
    commands = (f"\n## {name}\n\n```text\n{text.rstrip()}\n```\n" for name, text in helps(app))
    return HEAD + COMMANDS_INTRODUCTION + "".join(commands)


COMMANDS_INTRODUCTION = """# Commands

What `--help` prints. `-o section.key=value` sets any key of [configuration.md](configuration.md), whether it
has a flag or not.
"""


def helps(command: click.Command, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """(full name, help) of a command and of all below it."""
    settings: dict[str, Any] = {**command.context_settings, "terminal_width": WIDTH}
    settings |= {"max_content_width": WIDTH, "color": False}
    context = click.Context(command, parent=parent, info_name=command.name, **settings)
    yield context.command_path, click.unstyle(command.get_help(context))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from helps(below, context)


# docs/configuration.md


def configuration_page() -> str:
    """Every section and key of RunConfig, and what models and compat modes set."""
    text = HEAD + CONFIGURATION_INTRODUCTION
    for section, cls in section_types().items():
        specs = [spec for spec in keys().values() if spec.section == section]
        text += f"\n## {section}\n\n{inspect.getdoc(cls)} {_readers(specs)}\n\n"
        text += _table(("key", "flag", "takes", "default", "meaning"), map(_key_row, specs))
    return text + _models_part() + _compat_part()


CONFIGURATION_INTRODUCTION = """# Configuration

Every key can stand in a file (`--config FILE`), below its section, and be set by `-o section.key=value`; many
have a flag as well. Later wins: the default, the model's row, the compat mode, the environment
(`AVATARCTL_WEIGHTS` for `model.weights_root`), the file, the command line. A key that does not exist or a
value that does not fit is refused with its place, whether the command reads it or not; what you set and the
command does not read is named in one line and has no effect, so one file may serve several commands. Values
marked *not yet* are valid; the commands that are named there end with "not yet supported".

```yaml
model:
  name: omniavatar-14b
sampling:
  steps: 25
```

A run writes the file that repeats it beside its result (`NAME.run.yaml`); `--config` takes that as well, and
the names of [shipped files](../configs/README.md).
"""


def _readers(specs: Sequence[KeySpec]) -> str:
    """Which commands read a section, and which of its keys where it is not all."""
    readers = [_reader(command, specs) for command in COMMANDS if _read(command, specs)]
    if readers:
        return f"Read by {', '.join(readers)}."
    return "No command reads this section yet: its values are checked and have no effect."


def _reader(command: str, specs: Sequence[KeySpec]) -> str:
    read = _read(command, specs)
    others = [spec for spec in specs if spec not in read]
    if not others:
        return f"`avatarctl {command}`"
    few, word = (others, "all but") if len(others) < len(read) else (read, "only")
    return f"`avatarctl {command}` ({word} {', '.join(f'`{spec.name}`' for spec in few)})"


def _read(command: str, specs: Sequence[KeySpec]) -> list[KeySpec]:
    return [spec for spec in specs if spec.dotted in keys_of(command)]


def _key_row(spec: KeySpec) -> Sequence[str]:
    return (f"`{spec.name}`", _flags(spec), expected(spec), _default(spec), spec.key.help + _not_yet(spec))


def _flags(spec: KeySpec) -> str:
    """Its flags in the commands where it does something; mostly they are the same in all."""
    able = [each for each in COMMANDS if _read(each, [spec]) and not is_without_code(spec, each)]
    flags = dict.fromkeys(flag for command in able for flag in flags_of(command)[spec.dotted])
    return ", ".join(f"`{flag}`" for flag in flags)


def _default(spec: KeySpec) -> str:
    if spec.key.from_row:
        return "the model's"
    return "not set" if spec.default is None else f"`{_value(spec.default)}`"


def _not_yet(spec: KeySpec) -> str:
    """Which values which command refuses today."""
    marks = {command: spec.not_yet(command) for command in COMMANDS if _read(command, [spec])}
    return "".join(f"; *not yet in `{command}`: {_marked(mark)}*" for command, mark in marks.items() if mark)


def _marked(mark: Mark) -> str:
    return "any value but the default" if mark == ANY else ", ".join(f"`{_value(value)}`" for value in mark)


def _models_part() -> str:
    """One column per model that has defaults, one line per key that any of them sets."""
    rows = [row for row in ROWS.values() if row.defaults]
    names = [dotted for dotted in keys() if any(dotted in row.defaults for row in rows)]
    lines = [
        [f"`{name}`", *(_shortened(row.defaults[name]) if name in row.defaults else "" for row in rows)]
        for name in names
    ]
    text = "\n## What the model sets\n\n"
    text += "The defaults marked *the model's*, and others that a model changes.\n\n"
    return text + _table(("key", *(row.name for row in rows)), lines)


def _compat_part() -> str:
    lines = [
        (f"`{mode}`", ", ".join(f"`{name}` = {_shortened(value)}" for name, value in values.items()))
        for mode, values in COMPAT.items()
    ]
    text = "\n## What `model.compat` sets\n\n"
    text += "Besides the arithmetic that it changes; weights that state their own audio offset keep it.\n\n"
    return text + _table(("mode", "sets"), lines)


def _shortened(value: Any) -> str:
    text = _value(value)
    return f"`{text}`" if len(text) <= LONGEST_VALUE else f"`{text[: LONGEST_VALUE - 2]} …`"


def _value(value: Any) -> str:
    """A value as a configuration file would hold it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return "{}" if not value else str(dict(value))
    return '""' if value == "" else str(value)


# configs/README.md


def presets_page(folder: Path) -> str:
    """The table of shipped files; title, card and source are the first lines of each."""
    files = [folder / f"{name}.yaml" for name in preset_names(folder)]
    header = ("job", "name", "model", "card", "predicted memory", "what for", "source of the values")
    return HEAD + PRESETS_INTRODUCTION + _table(header, [_preset_row(folder, path) for path in files])


PRESETS_INTRODUCTION = """# Shipped configurations

`avatarctl COMMAND --config NAME` finds them, a folder in front of the name included; options win over what
they hold. Those of `data` are for `precompute-latents` and `precompute-audio`, those of `train` for
`train i2v` or `train v2v`, whichever is in the name ([training](../docs/training.md)). With another `--model`
only what stands under `asked:` is taken over. What is predicted was counted without a card
([memory](../docs/memory.md)).

Two files more are for `accelerate launch --config_file` ([training](../docs/training.md#one-card-to-many)):
[accelerate/ddp.yaml](accelerate/ddp.yaml), every card with the whole model, and
[accelerate/fsdp2.yaml](accelerate/fsdp2.yaml), each with a part.

"""


def _preset_row(folder: Path, path: Path) -> Sequence[str]:
    stated = CARD_AND_SOURCE.match(path.read_text(encoding="utf-8"))
    if stated is None:
        raise SystemExit(f"{path}: expected three lines of comment first: a title, `Source: …`, `Card: …`")
    model = read_config(path).settings["model.name"].value
    name = path.relative_to(folder).with_suffix("").as_posix()
    link = f"[{name}]({name}.yaml)"
    return (
        path.parent.name, link, model, stated["card"],
        stated["predicted"] or "`avatarctl vram-profile` counts it", stated["title"], stated["source"],
    )  # fmt: skip


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write the pages, or with --check compare them. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the pages that are made from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    check = parser.parse_args(arguments).check
    outdated = stale(root)
    for name, text in outdated.items():
        if check:
            print(f"{name} is stale: run `python docs/generate.py` and commit it", file=sys.stderr)
        else:
            (root / name).write_text(text, encoding="utf-8", newline="\n")
            print(f"wrote {name}", file=sys.stderr)
    return 1 if check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
