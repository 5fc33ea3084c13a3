"""Two small sets of samples of the cartoon world, and runs as they are typed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from avatarctl.cli import app
from avatarctl.demo.samples import write_samples
from avatarctl.events import Event
from avatarctl.families import family_named
from avatarctl.registry import configure, find_model
from avatarctl.training.run import TrainingRun
from avatarctl.training.trainer import Trainer
from tests.training.running import SMALL

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
    folder = tmp_path_factory.mktemp("prepared") / "samples"
    write_samples(folder, range(4), 17, "audio.wav")
    for command in ("precompute-latents", "precompute-audio"):
        words = [command, "--data", str(folder), "--size", "32x32", "--frames", "9"]
        made = CliRunner().invoke(app, words, prog_name="avatarctl")
        assert made.exit_code == 0, made.output
    return folder


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
        events: list[Event] = []
        settings = {
            "model.name": model, "data.path": str(data or prepared), "data.width": "32",
            "data.height": "32", "data.num_frames": "9", "train.max_steps": "9",
            **dict(word.split("=", 1) for word in words),
        }  # fmt: skip
        cfg = configure(*(f"{name}={value}" for name, value in settings.items()))
        row, folder = find_model(model), tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        command = "train i2v" if cfg.model.channels == 33 else "train v2v"
        run = TrainingRun(command, cfg, row, family_named(row.family), folder, events.append)  # type: ignore[arg-type]
        folder.mkdir()
        (folder / "run.yaml").write_text(f"command: {command}\nasked: {{}}\n", encoding="utf-8")
        trainer = run._trainer(run.open_data())
        trainer.events = events  # type: ignore[attr-defined]
        return trainer

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of floats are those of one thread, whatever ran before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
