"""The command line in this process, from an empty folder, with small inputs made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result
from PIL import Image

from avatarctl.cli import app

Run = Callable[..., Result]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, outside of which no configuration of this machine is seen."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("AVATARCTL_WEIGHTS", raising=False)
    monkeypatch.setenv("AVATARCTL_CANARY", str(tmp_path / "canary"))
    return folder


@pytest.fixture
def run(here: Path) -> Run:
    """`run("infer", "--help")`: exit code, stdout and stderr; never a bug's traceback, never a canary."""

    def invoke(*args: str) -> Result:
        result = CliRunner().invoke(app, list(args), prog_name="avatarctl")
        assert result.exit_code != 1, result.stderr
        assert "Traceback" not in result.output
        assert not (here.parent / "canary").exists() and not list(here.parent.rglob("PWNED"))
        return result

    return invoke


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """`refused(2, "infer", ...)`: the one line of the error, after checking code and form."""

    def invoke(code: int, *args: str) -> str:
        result = run(*args)
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert errors == lines[-1:], "one line, and the last"
        assert result.stderr.replace("\n", "").isprintable()
        return errors[0].removeprefix("error: ")

    return invoke


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    """0.5 s of noise: 13 frames."""
    path = tmp_path / "voice.wav"
    samples = np.random.default_rng(0).standard_normal(8_000).astype(np.float32) * 0.1
    soundfile.write(path, samples, 16_000)
    return path


@pytest.fixture
def face(tmp_path: Path) -> Path:
    path = tmp_path / "face.png"
    pixels = np.random.default_rng(1).integers(0, 255, (48, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path
