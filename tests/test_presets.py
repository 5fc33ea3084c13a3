"""Shipped configurations: each runs, repeats itself, says what the model's row says, and ships."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result
from PIL import Image

from avatarctl.cli import app
from avatarctl.cli.options import is_without_code
from avatarctl.config import (
    Resolved,
    dump_run,
    find_config,
    keys_of,
    preset_folder,
    preset_names,
    read_assignment,
    read_config,
    resolve,
    value_of,
)
from avatarctl.errors import PathNotFound
from avatarctl.families import family_named
from avatarctl.media import write_clip
from avatarctl.registry import COMPAT, ROWS, based_on, find_model

ROOT = Path(__file__).resolve().parents[1]
NAMES = preset_names()
FOR_A_CARD = [name for name in NAMES if re.fullmatch(r"infer/.+-\d+gb", name)]
FOR_A_MODEL = [name for name in NAMES if name.startswith("infer/") and name not in FOR_A_CARD]
FOR_DATA = [name for name in NAMES if name.startswith("data/")]
FOR_TRAINING = [name for name in NAMES if name.startswith("train/")]
OF_INFER = [name for name in NAMES if name not in (*FOR_DATA, *FOR_TRAINING)]
RUNNABLE = [row.name for row in ROWS.values() if row.kind == "model" and row.status != "not yet supported"]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """`--image` and `--audio` of 90 x 50 pixels and two seconds."""
    folder = tmp_path_factory.mktemp("material")
    Image.new("RGB", (90, 50), (200, 130, 90)).save(folder / "face.png")
    tone = 0.3 * np.sin(2 * np.pi * 220 * np.arange(32_000) / 16_000)
    soundfile.write(folder / "voice.wav", tone, 16_000)
    return "--image", str(folder / "face.png"), "--audio", str(folder / "voice.wav")


def command_of(name: str) -> str:
    """One that a shipped file is for."""
    if name in FOR_TRAINING:
        return "train i2v" if "-i2v" in name else "train v2v"
    return "precompute-latents" if name in FOR_DATA else "infer"


def resolved(path: Path, *assignments: str, command: str = "infer") -> Resolved:
    """What `--config path -o …` makes."""
    asked = dict(read_assignment(text, "-o") for text in assignments)
    file = read_config(path, command=command)
    return resolve(lambda name: (based_on(name) or find_model(name)).for_config, COMPAT, file, asked)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["infer", *arguments])


def test_the_promised_ones_are_there() -> None:
    shipped = {"infer/omniavatar-14b", "infer/omniavatar-1.3b", "infer/stableavatar-1.3b", "compat/reference"}
    assert shipped <= set(NAMES)


@pytest.mark.parametrize("name", OF_INFER)
def test_each_dry_runs(name: str, material: tuple[str, ...]) -> None:
    result = run("--config", name, *material, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["model"] == resolved(find_config(name, "infer")).cfg.model.name
    assert plan["frames"] >= 50


@pytest.mark.parametrize("name", NAMES)
def test_each_comes_back_from_its_run_file(name: str, tmp_path: Path) -> None:
    command = command_of(name)
    first = resolved(find_config(name, command), command=command)
    (tmp_path / "run.yaml").write_text(dump_run(first, command), encoding="utf-8")
    again = resolved(find_config(str(tmp_path), command), command=command)
    assert again.cfg == first.cfg
    values = [{key: setting.value for key, setting in each.asked.items()} for each in (first, again)]
    assert values[0] == values[1] and "model.name" in values[0]


@pytest.mark.parametrize("name", NAMES)
def test_each_holds_every_value_that_its_command_takes(name: str) -> None:
    """Complete: a later change of a default does not change what a shipped file makes."""
    command = command_of(name)
    file = read_config(find_config(name, command))
    cfg = resolved(find_config(name, command), command=command).cfg
    for dotted, spec in keys_of(command).items():
        of_video = name in OF_INFER and dotted.startswith(
            "data."
        )  # read for models that take a video, which none of these does
        if dotted not in file.settings and not of_video:
            nothing = value_of(cfg, dotted) in (None, (), {})
            assert nothing or is_without_code(spec, command), dotted


@pytest.mark.parametrize("name", FOR_TRAINING)
def test_each_for_training_fits_its_command(name: str, tmp_path: Path) -> None:
    """By its short name; the weights alone are missing here, and they are what it says."""
    command = command_of(name)
    cfg = resolved(find_config(name, command), command=command).cfg
    row = based_on(cfg.model.name or "") or find_model(cfg.model.name or "")
    wants = "image" if command == "train i2v" else "video"
    assert family_named(row.family).takes(cfg) == wants
    assert cfg.data.reference_sequence == (cfg.model.channels == 65)
    assert cfg.model.audio_offset == (1 if wants == "image" and not name.endswith("-base") else 0)
    assert bool(cfg.aux.losses) == name.endswith("-aux")
    (tmp_path / "samples" / "a").mkdir(parents=True)
    words = (*command.split(), "--config", name.removeprefix("train/"), "--data", str(tmp_path / "samples"))
    made = CliRunner().invoke(app, [*words, "--weights-root", str(tmp_path), "--out", str(tmp_path / "run")])
    assert made.exit_code == 4 and "weights" in made.output and "are missing" in made.output, made.output


@pytest.mark.parametrize("name", FOR_DATA)
@pytest.mark.parametrize("command", ["precompute-latents", "precompute-audio"])
def test_each_for_data_plans_a_folder_of_videos(name: str, command: str, tmp_path: Path) -> None:
    """By its short name, with either command; no weights are needed for a plan."""
    grey = np.full((170, 64, 64, 3), 90, np.uint8)
    write_clip(tmp_path / "v.mp4", iter([grey]), audio=np.zeros(170 * 640, np.float32))
    words = ("--from-videos", str(tmp_path), "--data", str(tmp_path / "out"), "--dry-run", "--json")
    short = name.removeprefix("data/")
    planned = CliRunner().invoke(app, [command, "--config", short, *words])
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["samples"] == 2


@pytest.mark.parametrize("name", FOR_A_MODEL)
def test_a_models_file_says_what_its_row_says(name: str, tmp_path: Path) -> None:
    model = name.removeprefix("infer/")
    (tmp_path / "bare.yaml").write_text(f"model:\n  name: {model}\n")
    assert resolved(find_config(name, "infer")).cfg == resolved(tmp_path / "bare.yaml").cfg


@pytest.mark.parametrize("name", FOR_A_MODEL)
def test_a_models_file_leaves_another_model_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text("model:\n  name: cartoon-i2v\n")
    other = resolved(find_config(name, "infer"), "model.name=cartoon-i2v")
    assert other.cfg == resolved(tmp_path / "bare.yaml").cfg


def test_cards_of_every_size_have_their_mode() -> None:
    modes = {name: resolved(find_config(name, "infer")).cfg.memory.mode for name in FOR_A_CARD}
    sizes = {"80": "full", "48": "model", "24": "group", "8": "sequential"}
    assert modes == {f"infer/omniavatar-14b-{size}gb": mode for size, mode in sizes.items()}


@pytest.mark.parametrize("name", FOR_A_CARD)
def test_a_cards_file_is_its_models_but_for_memory(name: str, tmp_path: Path) -> None:
    """The mode is what a card asks for: another model takes it over, and nothing else."""
    own = resolved(find_config(name, "infer")).cfg
    model = resolved(find_config(name.rpartition("-")[0], "infer")).cfg
    assert own == replace(model, memory=own.memory)
    (tmp_path / "bare.yaml").write_text("model:\n  name: cartoon-i2v\n")
    bare = resolved(tmp_path / "bare.yaml").cfg
    other = resolved(find_config(name, "infer"), "model.name=cartoon-i2v").cfg
    assert other == replace(bare, memory=replace(bare.memory, mode=own.memory.mode))


@pytest.mark.parametrize("model", ["omniavatar-14b", "omniavatar-1.3b"])
def test_reference_does_what_the_published_script_does(model: str, material: tuple[str, ...]) -> None:
    """Numbers of its configuration file; the audio waits 0.3 s of silence and one frame of 0.04 s."""
    cfg = resolved(preset_folder() / "compat/reference.yaml", f"model.name={model}").cfg
    assert (cfg.model.name, cfg.model.compat, cfg.model.audio_offset) == (model, "reference", 1)
    assert (cfg.sampling.steps, cfg.sampling.guidance_scale, cfg.sampling.shift) == (50, 4.5, 5.0)
    assert cfg.sampling.audio_guidance_scale is None
    assert (cfg.long_video.max_tokens, cfg.long_video.max_size, cfg.long_video.overlap_frames) == (
        30_000,
        720,
        13,
    )
    assert (cfg.output.lead_silence, cfg.output.fps, cfg.runtime.seed) == (0.3, 25, 42)
    assert cfg.runtime.dtype == "bfloat16"
    result = run("--config", "compat/reference", "--model", model, *material, "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert (plan["width"], plan["height"], plan["latent_frames_per_span"]) == (720, 400, 27)
    assert plan["audio_delay_seconds"] == pytest.approx(0.34)


# No published script runs on a video, so that `reference` means nothing there and is refused.
@pytest.mark.parametrize("model", [name for name in RUNNABLE if name != "cartoon-v2v"])
def test_reference_is_for_every_model(model: str, material: tuple[str, ...], tmp_path: Path) -> None:
    """Of the file only the wish is kept: what a model's own script does stands in its row."""
    (tmp_path / "bare.yaml").write_text(f"model:\n  name: {model}\n  compat: reference\n")
    words = ("--config", "compat/reference", "--model", model, *material, "--dry-run", "--json")
    cfg = resolved(find_config("compat/reference", "infer"), f"model.name={model}").cfg
    assert cfg == resolved(tmp_path / "bare.yaml").cfg
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["model"] == model


def test_options_win(material: tuple[str, ...]) -> None:
    arguments = ("--config", "omniavatar-14b", "--steps", "7", "-o", "sampling.guidance_scale=1")
    plan = json.loads(run(*arguments, *material, "--dry-run", "--json").stdout)
    assert (plan["steps"], len(plan["branches"])) == (7, 1)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("compat/referense", "compat/reference"),
        ("omniavatar-14", "infer/omniavatar-14b"),
        ("infer/omniavatar-1.3", "infer/omniavatar-1.3b"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    result = run("--config", typed, "--dry-run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"did you mean {meant}?" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_name_like_none_is_answered_with_all() -> None:
    with pytest.raises(PathNotFound) as refused:
        find_config("zzzz", "infer")
    assert all(name in str(refused.value) for name in NAMES)


def built(kind: str, tree: Path) -> Path:
    """What setuptools makes of a source tree: `kind` is "sdist" or "wheel"; nothing is downloaded."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tree / "dist").iterdir()
    return file


FROM_THE_WHEEL = """
import sys
import avatarctl
from avatarctl.cli import main
from avatarctl.config import find_config, read_config, resolve
from avatarctl.registry import COMPAT, find_model

path = find_config("compat/only-shipped", "infer")
found = resolve(lambda name: find_model(name).for_config, COMPAT, read_config(path, command="infer"), {}).cfg
print(avatarctl.__file__, path, found.model.name, found.output.lead_silence, sep="\\n")
sys.argv[1:] = ["infer", "--config", "compat/only-shipped", "--audio", "absent.wav", "--dry-run"]
main()
"""


def test_they_ship_in_the_wheel_and_are_found_there(tmp_path: Path) -> None:
    """Checkout to source archive to wheel; unpacked, it is whole and runs from another folder.

    One more configuration goes along: the checkout does not have it, so that it cannot help out.
    """
    tree, target = tmp_path / "tree", tmp_path / "target"
    tree.mkdir()
    files = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "constraints.txt", "LICENSE", "NOTICE")
    for name in files:
        shutil.copyfile(ROOT / name, tree / name)
    for name in ("avatarctl", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(tree / "configs/compat/reference.yaml", tree / "configs/compat/only-shipped.yaml")
    shutil.unpack_archive(built("sdist", tree), tmp_path / "source")
    (source,) = (tmp_path / "source").iterdir()
    shutil.unpack_archive(built("wheel", source), target, "zip")
    package = target / "avatarctl"
    inside = {path.relative_to(package / "configs").as_posix() for path in target.rglob("*.yaml")}
    others = ("compat/only-shipped", "accelerate/ddp", "accelerate/fsdp2")
    assert inside == {f"{name}.yaml" for name in (*NAMES, *others)}
    modules = {path.relative_to(tree) for path in (tree / "avatarctl").rglob("*.py")}
    assert {path.relative_to(target) for path in package.rglob("*.py")} == modules

    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", FROM_THE_WHEEL], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        str(package / "__init__.py"), str(package / "configs/compat/only-shipped.yaml"), "omniavatar-14b",
        "0.3",
    ]  # fmt: skip
    assert done.returncode == 2 and "absent.wav: no such file" in done.stderr, done.stderr
