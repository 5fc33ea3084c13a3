"""RunConfig: what every command can be told, from where, and how it is checked.

keys.py      what a key is                      reader.py   files and `section.key=value` to settings
sections.py  all keys, as frozen dataclasses    resolve.py  layers to one RunConfig
rules.py     conditions on single values        checks.py   conditions on several; what has no code yet
values.py    text to typed value                runfile.py  RunConfig to a file that repeats the run
tree.py      YAML without interpretation        presets.py  shipped configurations
"""

from avatarctl.config.checks import COMMAND_SECTIONS, require_supported, value_of
from avatarctl.config.keys import ANY, Key, KeySpec
from avatarctl.config.presets import find_config, preset_folder, preset_names
from avatarctl.config.reader import ConfigFile, Setting, read_assignment, read_config, read_text
from avatarctl.config.resolve import ModelRowDefaults, Resolved, resolve
from avatarctl.config.runfile import dump_run
from avatarctl.config.sections import (
    Aux,
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
    WeightFile,
    keys,
    section_names,
)
from avatarctl.config.suggest import nearest
from avatarctl.config.values import expected

__all__ = [
    "ANY",
    "COMMAND_SECTIONS",
    "Aux",
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
    "WeightFile",
    "dump_run",
    "expected",
    "find_config",
    "keys",
    "nearest",
    "preset_folder",
    "preset_names",
    "read_assignment",
    "read_config",
    "read_text",
    "require_supported",
    "resolve",
    "section_names",
    "value_of",
]
