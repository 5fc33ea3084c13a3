"""A valid value whose code does not exist yet is refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from click.testing import Result

from avatarctl.config import ANY, keys_of
from avatarctl.config.values import kind_of
from avatarctl.registry import ROWS

TEXTS = {  # one value other than the default, where the type does not give it
    "input.face": "largest",
    "sampling.guidance_interval": "0.2,0.8",
    "output.fps": "24",
}


def without_code() -> Iterator[tuple[str, str]]:
    """(key, text) of every value that is marked as not supported, of the keys that infer reads."""
    for dotted, spec in keys_of("infer").items():
        mark, kind = spec.not_yet("infer"), kind_of(spec.type)
        if not mark:
            continue
        if mark != ANY:
            # Of a mapping its keys are marked.
            yield from ((dotted, f"{value}=x.bin" if spec.default == {} else str(value)) for value in mark)
        elif dotted in TEXTS:
            yield dotted, TEXTS[dotted]
        elif get_origin(kind) is Literal:
            yield from ((dotted, choice) for choice in get_args(kind) if choice != spec.default)
        elif kind is bool:
            yield dotted, "false" if spec.default else "true"
        else:
            yield dotted, "some/path" if kind is str else str(spec.key.high)


@pytest.mark.parametrize(("dotted", "text"), list(without_code()))
def test_refused_by_option_and_by_file(
    dotted: str, text: str, refused: Callable[..., str], here: Path
) -> None:
    for words in (("--dry-run", "-o", f"{dotted}={text}"), ("-o", f"{dotted}={text}")):
        line = refused(2, "infer", *words)
        assert dotted in line and "not yet supported by `avatarctl infer`" in line
        assert "=" not in text or text.partition("=")[0] in line.removeprefix(f"-o {dotted}: ")
        assert line.startswith(f"-o {dotted}: ")
    if "=" not in text:
        section, name = dotted.split(".")
        (here / "job.yaml").write_text(f"{section}:\n  {name}: {text}\n", encoding="utf-8")
        assert refused(2, "infer", "--dry-run", "--config", "job.yaml").startswith("job.yaml:2: ")
    assert {path.name for path in here.iterdir()} <= {"job.yaml"}


def test_what_is_known_to_have_no_code() -> None:
    """So that a mark cannot vanish without its code; whoever adds the code deletes the line."""
    marked = {f"{dotted}={text}" for dotted, text in without_code()}
    assert {
        "input.jobs=some/path",
        "sampling.solver=unipc", "sampling.cache=teacache", "output.paste=face",
        "model.weights=yunet=x.bin", "runtime.gpus=1024", "runtime.compile=true", "output.save_latents=true",
    } <= marked  # fmt: skip


def supported() -> Iterator[Any]:
    """The other choices of keys that are supported in part, and one value of simple keys."""
    for dotted, spec in keys_of("infer").items():
        mark = spec.not_yet("infer")
        if mark != ANY:
            choices = get_args(kind_of(spec.type)) if get_origin(kind_of(spec.type)) is Literal else ()
            yield from ((dotted, str(choice)) for choice in choices if choice not in mark)


BUILT_IN = [name for name, row in ROWS.items() if row.kind == "model" and row.source == "package"]
NOBODY_OFFERS = {
    ("long_video.strategy", "stream"),
    ("long_video.carry", "latents"),
    ("model.channels", "65"),  # of a person's own files; none is built in
}


@pytest.mark.parametrize(("dotted", "text"), list(supported()))
def test_supported_choices_pass_where_a_family_offers_them(
    dotted: str, text: str, run: Callable[..., Result], voice: Path
) -> None:
    """The other families say what they offer instead, without a model being loaded."""
    offered = False
    for name in BUILT_IN:
        words = ("--model", name, "--audio", str(voice), "-o", f"{dotted}={text}")
        result = run("infer", "--dry-run", *words)
        offered |= result.exit_code == 0
        if result.exit_code != 0:
            line = result.stderr.splitlines()[-1]
            assert result.exit_code == 2 and dotted in line, line
            assert " offers " in line or "leave it out" in line or "--long-video" in line, line
    assert offered != ((dotted, text) in NOBODY_OFFERS)


@pytest.mark.parametrize("name", ["liveavatar-14b"])
@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["run", "dry"])
def test_models_that_are_only_listed(name: str, flags: tuple[str, ...], refused: Callable[..., str]) -> None:
    assert f"{name} is not yet supported" in refused(2, "infer", "--model", name, *flags)


def test_a_folder_without_weights_as_model(refused: Callable[..., str], here: Path) -> None:
    (here / "mine").mkdir()
    assert "mine: holds no weight file" in refused(3, "infer", "--model", "mine", "--dry-run")
    assert "no such file or folder" in refused(2, "infer", "--model", "a/b.safetensors", "--dry-run")
