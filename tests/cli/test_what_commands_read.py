"""Options follow from what a command reads, and what it does not read is said instead of passed over.

The commands that read `data` are still to come; one defined here stands for them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from avatarctl.cli.options import ConfigCommand, Request, config_options, flags_of, read_request
from avatarctl.config import COMMANDS, CommandKeys, find_config
from avatarctl.errors import ConfigError
from avatarctl.registry import COMPAT, find_model

Asks = Callable[..., Request]

READS_DATA = CommandKeys(
    main=("data", "train"),
    read={
        "model": "name",
        "long_video": "num_frames",
        "output": "path width height",
        "data": "num_frames width height stride",
        "train": "max_steps",
        "aux": "stride",
        "validation": "steps",
    },
)


def made(command: str) -> ConfigCommand:
    def read(params: Mapping[str, Any]) -> Request:
        return read_request(command, params, lambda name: find_model(name).for_config, COMPAT, "cartoon-i2v")

    return ConfigCommand(command, read=read, params=config_options(command))


def ask(command: str, *words: str) -> Request:
    """What `avatarctl command words` asks for."""
    parsed = made(command)
    return parsed.read(parsed.make_context(command, list(words)).params)


def asked(request: Request) -> dict[str, tuple[Any, str]]:
    return {name: (setting.value, setting.origin) for name, setting in request.resolved.asked.items()}


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, here: Path) -> Asks:
    """`prepare("--size", "64x32")`: a request to a command that reads `data`."""
    monkeypatch.setitem(COMMANDS, "prepare", READS_DATA)
    return lambda *words: ask("prepare", *words)


def test_size_is_that_of_the_data_where_a_command_reads_data(prepare: Asks) -> None:
    request = prepare("--size", "64x32")
    assert asked(request) == {"data.width": (64, "--size"), "data.height": (32, "--size")}
    cfg, bare = request.resolved.cfg, prepare().resolved.cfg
    assert (cfg.data.width, cfg.data.height) == (64, 32) and cfg.output == bare.output
    with pytest.raises(ConfigError, match=r"data\.width"):
        prepare("--size", "63x32")


def test_size_is_that_of_the_output_in_infer(here: Path) -> None:
    request = ask("infer", "--size", "64x32")
    assert asked(request) == {"output.width": (64, "--size"), "output.height": (32, "--size")}


def test_no_size_where_a_command_reads_none(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setitem(COMMANDS, "small", CommandKeys(main=(), read={"data": "path width"}))
    words = {word for option in config_options("small") for word in option.opts}
    assert words.isdisjoint(("--size", "--chunked"))
    with pytest.raises(click.NoSuchOption):
        ask("small", "--size", "64x32")


def test_frames_are_those_of_the_data_where_a_command_reads_data(prepare: Asks) -> None:
    for flag in ("--frames", "--num-frames"):
        request = prepare(flag, "17")
        assert asked(request) == {"data.num_frames": (17, "--frames")}
        assert request.resolved.cfg.data.num_frames == 17
        assert request.resolved.cfg.long_video == prepare().resolved.cfg.long_video
    with pytest.raises(click.NoSuchOption):
        ask("infer", "--frames", "17")
    assert asked(ask("infer", "--num-frames", "17")) == {"long_video.num_frames": (17, "--num-frames")}


def test_a_flag_of_several_sections_belongs_to_the_main_ones(prepare: Asks) -> None:
    assert set(asked(prepare("--width", "64", "--height", "32"))) == {"data.width", "data.height"}
    assert set(asked(prepare("--stride", "3"))) == {"data.stride"}
    flags = flags_of("prepare")
    assert flags["output.width"] == flags["aux.stride"] == flags["long_video.num_frames"] == ()
    assert flags["output.path"] == ("--out",), "its flag is its own"
    words = ("-o", "output.width=64", "-o", "output.height=64", "-o", "aux.stride=3")
    assert set(asked(prepare(*words))) == {"output.width", "output.height", "aux.stride"}


def test_a_shared_flag_means_no_other_section_even_if_only_that_is_read(prepare: Asks) -> None:
    """`--steps` is of sampling; a command that reads the steps of validation only does not have it."""
    with pytest.raises(click.NoSuchOption):
        prepare("--steps", "3")
    assert prepare("-o", "validation.steps=3").resolved.cfg.validation.steps == 3


def test_no_flag_of_a_command_stands_for_two_keys(prepare: Asks) -> None:
    for command in COMMANDS:
        flags = [flag for own in flags_of(command).values() for flag in own]
        assert len(flags) == len(set(flags)), command


def test_help_has_titles_for_other_sections_than_those_of_infer(prepare: Asks) -> None:
    text = CliRunner().invoke(made("prepare"), ["--help"]).stdout
    places = [text.index(f"\n{title}:\n") for title in ("Model", "Output", "Data", "Training", "Options")]
    assert places == sorted(places)
    assert "--frames, --num-frames N" in text and "--size WxH" in text and "--chunked" not in text


UNREAD = "no effect: `avatarctl infer` does not read "

SHARED = """
memory: {vae_gradient: checkpoint}
train: {optimizer: adamw8bit, max_steps: 3}
runtime: {seed: 7, trackers: [jsonl, wandb]}
data: {path: samples}
"""


def notices(result: Result) -> list[str]:
    """What is said of keys that infer does not read."""
    assert result.exit_code == 0, result.stderr
    assert "does not read" not in result.stdout
    return [line for line in result.stderr.splitlines() if "does not read" in line]


def test_one_line_names_all_that_a_file_sets_and_infer_does_not_read(
    run: Callable[..., Result], voice: Path, here: Path
) -> None:
    (here / "job.yaml").write_text(SHARED, encoding="utf-8")
    said = notices(run("infer", "--dry-run", "--audio", str(voice), "--config", "job.yaml"))
    assert said == [
        UNREAD + "memory.vae_gradient, data.path, train.optimizer, train.max_steps, runtime.trackers"
    ]


def test_the_same_line_names_what_options_set(run: Callable[..., Result], voice: Path, here: Path) -> None:
    (here / "job.yaml").write_text("train: {ema: 0.5}\nsampling: {steps: 2}\n", encoding="utf-8")
    words = (
        "infer",
        "--dry-run",
        "--audio",
        str(voice),
        "--config",
        "job.yaml",
        "-o",
        "train.optimizer=adamw8bit",
    )
    assert notices(run(*words)) == [UNREAD + "train.optimizer, train.ema"]


def test_nothing_is_said_of_keys_that_infer_reads(
    run: Callable[..., Result], voice: Path, here: Path
) -> None:
    (here / "job.yaml").write_text("memory: {mode: full}\nruntime: {seed: 7}\n", encoding="utf-8")
    words = ("infer", "--dry-run", "--audio", str(voice), "--config", "job.yaml", "--steps", "2")
    assert notices(run(*words)) == []


def test_nothing_is_said_of_the_resolved_values_of_a_run_file(
    run: Callable[..., Result], voice: Path, here: Path
) -> None:
    words = ("infer", "--size", "32x32", "--steps", "1", "--audio", str(voice))
    assert notices(run(*words, "--out", "a.mp4")) == []
    record = (here / "a.run.yaml").read_text("utf-8")
    assert "max_steps: " in record and "vae_gradient: " in record, "it holds what infer does not read"
    again = ("infer", "--dry-run", "--config", "a.run.yaml", "--out", "b.mp4")
    assert notices(run(*again)) == []
    own = re.search(r"max_steps: (\d+)", record)[1]  # type: ignore[index]
    (here / "plain.yaml").write_text(
        record.replace("asked:", f"asked:\n  train:\n    max_steps: {own}", 1), encoding="utf-8"
    )
    assert notices(run(*again[:3], "plain.yaml", *again[4:])) == [UNREAD + "train.max_steps"], (
        "that was asked"
    )


def test_nothing_is_said_of_a_shipped_file(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    """Of a command that would not read what it asks for; a copy by hand is answered."""
    read = {section: names for section, names in COMMANDS["infer"].read.items() if section != "model"}
    monkeypatch.setitem(COMMANDS, "infer", replace(COMMANDS["infer"], read={**read, "model": "name"}))
    shipped = find_config("compat/reference", "infer")
    for name in ("compat/reference", str(shipped)):
        assert not [line for line in ask("infer", "--config", name).resolved.notices if "read" in line]
    shutil.copyfile(shipped, here / "mine.yaml")
    assert UNREAD + "model.compat" in ask("infer", "--config", "mine.yaml").resolved.notices


def test_unread_keys_are_checked(refused: Callable[..., str], voice: Path, here: Path) -> None:
    words = ("infer", "--dry-run", "--audio", str(voice))
    assert "train.optimizer" in refused(2, *words, "-o", "train.optimizer=sgd")
    assert "did you mean train.optimizer?" in refused(2, *words, "-o", "train.optimiser=adamw")
    (here / "job.yaml").write_text("memory:\n  vae_gradient: half\n", encoding="utf-8")
    assert refused(2, *words, "--config", "job.yaml").startswith("job.yaml:2: memory.vae_gradient: expected")


@pytest.mark.parametrize("word", ["--no-batch-branches", "--no-batch-passes"])
def test_an_older_flag_is_read_as_what_it_is_called_now(here: Path, word: str) -> None:
    assert asked(ask("infer", word)) == {"sampling.batch_branches": (False, "--batch-branches")}
