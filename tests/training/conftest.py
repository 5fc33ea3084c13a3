"""Two small sets of samples of the cartoon world, and runs as they are typed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from avatarctl.cli import app
from avatarctl.demo.samples import write_samples
from avatarctl.training.trainer import Trainer
from tests.training.running import ADAPTED, SMALL, made_trainer

Train = Callable[..., Result]


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four samples of 17 frames without artifacts; nobody changes them."""
    folder = tmp_path_factory.mktemp("drawn") / "samples"
    write_samples(folder, range(4), 17, "audio.wav")
    return folder


@pytest.fixture(scope="session")
def prepared(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the artifacts of both families of commands, for 49 channels; nobody changes them."""
    folder = Path(shutil.copytree(samples, tmp_path_factory.mktemp("prepared") / "samples"))
    for command in ("precompute-latents", "precompute-audio"):
        words = [command, "--data", str(folder), "--size", "32x32", "--frames", "9"]
        made = CliRunner().invoke(app, words, prog_name="avatarctl")
        assert made.exit_code == 0, made.output
    return folder


@pytest.fixture(scope="session")
def adapted(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a LoRA of a built-in image model, each saved, with an average, from samples that are
    encoded on the way; nobody changes it."""
    run = tmp_path_factory.mktemp("adapted") / "run"
    made = CliRunner().invoke(app, [*map(str, ("train", "i2v", *ADAPTED, "--data", samples, "--out", run))])
    assert made.exit_code == 0, made.output
    return run


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """`avatarctl train`, typed; `which` is i2v or v2v."""

    def run(which: str, *words: object, small: bool = True) -> Result:
        line = ["train", which, *(SMALL if small else ()), *map(str, words)]
        return CliRunner().invoke(app, line, prog_name="avatarctl")

    return run


@pytest.fixture
def trainer_of(prepared: Path, tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer as `train` makes it, on four prepared samples or on `data`; words: settings. Its `events`
    are what the run said."""

    def make(*words: str, model: str = "cartoon-v2v", data: Path | None = None) -> Trainer:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        return made_trainer(folder, data or prepared, *words, model=model)

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of floats are those of one thread, whatever ran before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
