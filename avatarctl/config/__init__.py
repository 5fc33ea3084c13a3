"""RunConfig: what every command can be told, from where, and how it is checked.

keys.py      what a key is                      reader.py   files and `section.key=value` to settings
sections.py  all keys, as frozen dataclasses    resolve.py  layers to one RunConfig
commands.py  which keys each command reads      checks.py   conditions on several; what has no code yet
rules.py     conditions on single values        runfile.py  RunConfig to a file that repeats the run
values.py    text to typed value                presets.py  shipped configurations
tree.py      YAML without interpretation        suggest.py  what a mistyped name was meant to be
"""

from avatarctl.config.checks import require_supported, value_of
from avatarctl.config.commands import COMMANDS, CommandKeys, keys_of, unread
from avatarctl.config.keys import ANY, Key, KeySpec
from avatarctl.config.presets import find_config, is_shipped, preset_folder, preset_names
from avatarctl.config.reader import ConfigFile, Setting, read_assignment, read_config, read_text
from avatarctl.config.resolve import ModelRowDefaults, Resolved, resolve
from avatarctl.config.runfile import dump_run
from avatarctl.config.sections import (
    Aux,
    Checkpoint,
    Data,
    Input,
    LongVideo,
    Memory,
    Model,
    Output,
    RunConfig,
    Runtime,
    Sampling,
    Train,
    Validation,
    keys,
    section_names,
)
from avatarctl.config.suggest import nearest
from avatarctl.config.values import expected

__all__ = [
    "ANY",
    "COMMANDS",
    "Aux",
    "Checkpoint",
    "CommandKeys",
    "ConfigFile",
    "Data",
    "Input",
    "Key",
    "KeySpec",
    "LongVideo",
    "Memory",
    "Model",
    "ModelRowDefaults",
    "Output",
    "Resolved",
    "RunConfig",
    "Runtime",
    "Sampling",
    "Setting",
    "Train",
    "Validation",
    "dump_run",
    "expected",
    "find_config",
    "is_shipped",
    "keys",
    "keys_of",
    "nearest",
    "preset_folder",
    "preset_names",
    "read_assignment",
    "read_config",
    "read_text",
    "require_supported",
    "resolve",
    "section_names",
    "unread",
    "value_of",
]
