"""What the command line says about itself: help, versions, mistyped words, tables of models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import Result

import avatarctl
from avatarctl.cli import app
from avatarctl.config import keys_of
from avatarctl.registry import ROWS

Run = Callable[..., Result]
COMMANDS = [
    (), ("infer",), ("convert-ckpt",), ("models",), ("models", "list"), ("models", "show"),
    ("models", "pull"), ("models", "verify"),
]  # fmt: skip


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_everywhere(command: tuple[str, ...], flag: str, run: Run) -> None:
    result = run(*command, flag)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.startswith("Usage: " + " ".join(("avatarctl", *command)))


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"avatarctl {avatarctl.__version__}\n"


@pytest.mark.parametrize("command", [(), ("models",)])
def test_a_group_alone_shows_its_help_on_stderr_and_ends_with_2(command: tuple[str, ...], run: Run) -> None:
    result = run(*command)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("Usage: avatarctl") and "\nCommands:\n" in result.stderr
    assert "error:" not in result.stderr


def test_infer_help_groups_the_options_that_do_something(run: Run) -> None:
    text = run("infer", "--help").stdout
    titles = ["Model:", "Input:", "Sampling:", "Long video:", "Output:", "Machine:", "Options:"]
    places = [text.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places) and "avatarctl infer --chunked\n" in text[places[-1] :]
    for flag in (
        "--model",
        "--image",
        "--video",
        "--mask",
        "--steps",
        "--guidance,",
        "--chunked",
        "--size WxH",
        "--overwrite",
    ):
        assert f"  {flag}" in text, flag
    for flag in ("--jobs", "--compile", "--paste"):  # without code
        assert f"  {flag}" not in text, flag


def test_every_key_that_infer_reads_has_an_option(run: Run) -> None:
    from avatarctl.cli.infer import infer

    parameters = {param.name for param in infer.params}
    by_option_only = {"data.width", "data.height"}  # `--width` is the video's
    assert {dotted.replace(".", "__") for dotted in keys_of("infer").keys() - by_option_only} <= parameters
    flags = [flag for param in infer.params for flag in (*param.opts, *param.secondary_opts)]
    assert len(flags) == len(set(flags)), "no flag stands for two things"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("infr",), "no such command 'infr' (did you mean infer?)"),
        (
            ("zzz",),
            "no such command 'zzz' (there are infer, train, convert-ckpt, vram-profile, models, "
            "precompute-audio, precompute-latents, demo, separate, doctor)",
        ),
        (("models", "lst"), "did you mean list?"),
        (("models", "show", "cartoon-i2w"), "did you mean cartoon-i2v?"),
        (("models", "show"), "missing argument 'NAME'"),
        (("models", "list", "--kind", "foo"), "'model'"),
        (("infer", "--imag", "x"), "'--image'"),
        (("infer", "--stepz", "3"), "'--steps'"),
        (("infer", "--steps"), "'--steps' requires an argument"),
        (("infer", "--model", "cartoon-i2w"), "did you mean cartoon-i2v?"),
        (("infer", "--model", "wan2.1-t2v-14b"), "did you mean omniavatar-14b?"),
        (("infer", "-o", "sampling.stepz=3"), "did you mean sampling.steps?"),
        (("infer", "-o", "steps=3"), "expected section.key=value"),
        (("infer", "--config", "infer/omniavatar-14c"), "did you mean infer/omniavatar-14b?"),
        (("infer", "more"), "unexpected extra argument (more)"),
        (("--versio",), "'--version'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistyped(words: tuple[str, ...], says: str, refused: Callable[..., str]) -> None:
    assert says in refused(2, *words)


def options_given_once() -> Iterator[tuple[str, str, str]]:
    """(command, flag, a value) of every option outside `infer` that takes a value and counts once."""
    for name in ("convert-ckpt", "models list", "models show", "models pull", "models verify"):
        command: click.Command | None = app
        for word in name.split():
            assert isinstance(command, click.Group)
            command = command.get_command(click.Context(command), word)
        assert command is not None
        for param in command.params:
            if isinstance(param, click.Option) and not param.is_flag:
                choices = getattr(param.type, "choices", ("1",))
                yield name, param.opts[0], choices[0]


@pytest.mark.parametrize(("command", "flag", "value"), list(options_given_once()))
def test_an_option_said_twice_is_refused_by_name(
    command: str, flag: str, value: str, refused: Callable[..., str], here: Path
) -> None:
    named = () if command == "models list" else ("a",)
    line = refused(2, *command.split(), *named, flag, value, flag, value)
    assert line == f"{flag}: given more than once (give it once)"
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("flag", "first", "second", "key"),
    [
        ("--prompt", "a cat", "a dog", "input.prompt"),
        ("--negative-prompt", "", "a" * 1000, "input.negative_prompt"),
        ("--image", "a.png", "b.png", "input.image"),
        ("--model", "a", "b", "model.name"),
        ("--out", "a.mp4", "b.mp4", "output.path"),
        ("--long-video", "chunks", "off", "long_video.strategy"),
        ("--weights", "dit=a", "dit=b", "model.weights"),
        ("--overwrite", "--no-overwrite", "", ""),
    ],
)
def test_an_option_of_infer_said_twice_is_refused_by_name(
    flag: str, first: str, second: str, key: str, refused: Callable[..., str], here: Path
) -> None:
    words = (flag, first, flag, second) if key else (flag, first)
    line = refused(2, "infer", *words)
    assert flag in line and (f"{key} is asked for twice" in line if key else "given more than once" in line)
    assert len(line) < 200
    assert not list(here.iterdir())


def test_a_switch_may_be_repeated(run: Run) -> None:
    assert run("models", "list", "--json", "--json").exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("a\x1b[31m\nb",),
        ("infer", "--a\x1b[31m\nb"),
        ("infer", "\u202ea\nb"),
        ("infer", "--model", "a\x1b[31m\nb"),
        ("infer", "--model", "a\x1b[31m/b"),
        ("infer", "--image", "a\x1b[31m\nb"),
        ("infer", "--audio", "a\x1b[31m\nb"),
        ("infer", "--config", "a\x1b[31m\nb"),
        ("infer", "--steps", "a\x1b[31m\nb"),
        ("infer", "-o", "a\x1b[31m.b\n=c"),
        ("infer", "--size", "a\x1b[31m\nb"),
        ("models", "show", "a\x1b[31m\nb"),
        ("models", "list", "--kind", "a\x1b[31m\nb"),
    ],
    ids=lambda words: " ".join(words).encode("unicode_escape").decode(),
)
def test_control_characters_come_back_escaped(words: tuple[str, ...], refused: Callable[..., str]) -> None:
    line = refused(2, *words)
    assert any(shown in line for shown in (r"\x1b[31m", r"\u202ea"))


def test_nul_in_a_path(refused: Callable[..., str]) -> None:
    for flag in ("--config", "--image", "--audio", "--out"):
        assert r"\x00" in refused(2, "infer", flag, "a\0b") or flag == "--config"


def test_names_longer_than_any_file_system_takes(refused: Callable[..., str]) -> None:
    for flag in ("--model", "--config", "--image", "--audio", "--out"):
        line = refused(2, "infer", flag, "a" * 300 + ".mp4")
        assert ("no model" if flag == "--model" else "too long") in line, flag


def test_models_list(run: Run) -> None:
    lines = run("models", "list").stdout.splitlines()
    assert lines[0] == "model"
    (cartoon,) = [line for line in lines if line.split()[0] == "cartoon-i2v"]
    assert cartoon.endswith("[works]")
    (live,) = [line for line in lines if line.split()[0] == "liveavatar-14b"]
    assert "[not yet supported]" in live
    assert {line.split()[0] for line in lines if line.startswith("  ")} == set(ROWS)


def test_models_list_json(run: Run) -> None:
    rows = json.loads(run("models", "list", "--json").stdout)
    assert [row["name"] for row in rows] == list(ROWS)
    assert set(rows[0]) >= {"name", "kind", "title", "status", "source", "hub_id"}
    adapters = json.loads(run("models", "list", "--json", "--kind", "adapter").stdout)
    assert adapters and {row["kind"] for row in adapters} == {"adapter"}


@pytest.mark.parametrize("name", ROWS)
def test_models_show(name: str, run: Run) -> None:
    text = run("models", "show", name).stdout
    facts = {line.split()[0]: line.split(None, 1)[1] for line in text.splitlines()}
    assert facts["name"] == name and facts["kind"] == ROWS[name].kind
    document = json.loads(run("models", "show", name, "--json").stdout)
    assert document["name"] == name
    assert ("missing" in facts) == bool(document["missing"])
    for wanted in document["missing"]:
        assert f"{wanted['folder']}/{wanted['file']}" in text


def test_models_show_of_the_built_in_model(run: Run) -> None:
    text = run("models", "show", "cartoon-i2v").stdout
    assert "all files are here" in text and "sampling.steps = 4" in text


def test_weights_root_from_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATARCTL_WEIGHTS", "/elsewhere")
    assert "/elsewhere/OmniAvatar-14B/" in run("models", "show", "omniavatar-14b").stdout
    own = run("models", "show", "omniavatar-14b", "--weights-root", "/mine").stdout
    assert "/mine/OmniAvatar-14B/" in own and "/elsewhere" not in own
