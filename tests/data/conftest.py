"""Folders of talking videos, and the two commands as they are typed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from avatarctl.cli import app
from avatarctl.demo.clips import clip
from avatarctl.media import write_clip

SMALL = ("--size", "32x32", "--frames", "9")
"""Samples that cost little to encode."""

Run = Callable[..., Result]


def talking(path: Path, seed: int, frames: int, *, audio: bool = True) -> Path:
    """A clip of the cartoon world as a file, 64x64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = clip(seed, frames)
    write_clip(path, iter([drawn.frames]), audio=drawn.speech.audio if audio else None)
    return path


def joined(path: Path, *parts: np.ndarray) -> Path:
    """Scenes one after another, with a hum."""
    frames = np.concatenate(parts)
    hum = 0.1 * np.sin(np.arange(len(frames) * 640) / 20).astype(np.float32)
    write_clip(path, iter([frames]), audio=hum)
    return path


def contents(folder: Path, *without: str) -> dict[str, str]:
    """Hash of every file, by its path; without what tells of times, or names places."""
    told = (".report.jsonl", ".report.txt", ".run.yaml", *without)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(told) and path.parent.name != "known"
    }


def run(command: str, *words: object) -> Result:
    """A command, typed."""
    return CliRunner().invoke(app, [command, *map(str, words)], prog_name="avatarctl")


@pytest.fixture(scope="session")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of one name in two folders, one with a prompt of its own, and a third."""
    folder = tmp_path_factory.mktemp("talks")
    talking(folder / "a/talk.mp4", 1, 30)
    talking(folder / "b/talk.mp4", 2, 20)
    talking(folder / "last.mp4", 3, 11)
    (folder / "a/talk.txt").write_text("a woman is talking", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def prepared(talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both commands make of `talks`, undisturbed, in float32. Nobody changes it."""
    out = tmp_path_factory.mktemp("prepared") / "samples"
    for command, words in (("precompute-latents", ("--from-videos", talks)), ("precompute-audio", ())):
        made = run(command, "--data", out, *words, *SMALL, "--artifact-dtype", "float32")
        assert made.exit_code == 0, made.output
    return out


@pytest.fixture
def out(prepared: Path, tmp_path: Path) -> Path:
    """Finished samples that may be spoiled."""
    return Path(shutil.copytree(prepared, tmp_path / "out"))


@pytest.fixture
def few(out: Path) -> Path:
    """Two of them, where everything is made again."""
    shutil.rmtree(out / "a")
    shutil.rmtree(out / "last.mp4")
    index = out / "_dataset/index.jsonl"
    lines = index.read_text(encoding="utf-8").splitlines(keepends=True)
    index.write_text("".join(line for line in lines if '"b/talk.mp4/' in line), encoding="utf-8")
    return out
