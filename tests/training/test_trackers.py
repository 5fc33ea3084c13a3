"""Trackers, through stand-ins of their packages: what they are told, and what becomes of training without."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from PIL import Image

from avatarctl.events import Event, Notice
from avatarctl.training.run_folder import RunFolder
from avatarctl.training.trackers import Trackers
from tests.training.running import QUICK, SMALL, bits, typed

ALL = ("jsonl", "tensorboard", "wandb", "trackio")


class Told:
    """What a package was told, whichever it is."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.lines, self.closed = settings, [], False  # type: ignore[var-annotated]
        Told.made.append(self)

    made: ClassVar[list[Told]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.lines.append((step, values))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.log({name: value}, step)

    def add_image(self, name: str, pixels: Any, step: int, dataformats: str) -> None:
        assert dataformats == "HWC" and pixels.shape == (2, 3, 3)
        self.log({name: "image"}, step)

    def finish(self) -> None:
        self.closed = True

    close = finish

    def merged(self) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for step, values in self.lines:
            found.setdefault(step, {}).update(values)
        return found


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    Told.made = []
    for name in ("torch.utils.tensorboard", "wandb", "trackio"):
        module = ModuleType(name)
        module.SummaryWriter = module.init = Told  # type: ignore[attr-defined]
        module.Image = lambda path: "image"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("packages")
def test_each_gets_the_lines_of_the_logs_and_the_sheet(tmp_path: Path) -> None:
    sheet = tmp_path / "validation" / "step-2" / "sheet.png"
    sheet.parent.mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(sheet)
    said: list[Event] = []
    for step in (0, 2):  # a run and its resume
        folder = RunFolder(tmp_path)
        trackers = Trackers(ALL, folder, step, said.append)
        folder.write("log.jsonl", {"step": step + 1, "loss": 0.5, "learning_rate": 1e-4, "skipped": "a"})
        folder.write("timing.jsonl", {"step": step + 1, "seconds": 1.0})
        if step == 0:
            folder.write("validation.jsonl", {"step": 2, "flow": 0.25, "clips": [], "measured_on": "x"})
        trackers.finish()
    assert said == [] and all(each.closed for each in Told.made)
    for each in Told.made[:3]:
        validated = {"validation/flow": 0.25, "validation/sheet": "image"}
        assert each.merged() == {1: {"train/loss": 0.5, "train/lr": 1e-4}, 2: validated}
    first, second = Told.made[:3], Told.made[3:]
    assert [each.settings["purge_step"] for each in (first[0], second[0])] == [1, 3]
    assert first[1].settings == second[1].settings and first[2].settings == second[2].settings
    assert first[1].settings["resume"] == "allow" and len(first[1].settings["id"]) == 12
    assert "secret" not in "".join(path.read_text() for path in tmp_path.glob("*.json*"))


@pytest.mark.usefixtures("packages")
def test_without_key_or_network_one_line_and_training_goes_on(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb has no key, trackio's network goes away in the first step; bits are those of a run without."""
    monkeypatch.delenv("WANDB_API_KEY")

    def gone(self: Told, values: dict[str, Any], step: int) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(sys.modules["trackio"], "init", type("Gone", (Told,), {"log": gone}))
    words = ("train", "v2v", "--data", prepared, *SMALL[:4], "--batch-size", "1", "--max-steps", "2", *QUICK)
    made = typed(*words, "--out", tmp_path / "run", "-o", "runtime.trackers=tensorboard,wandb,trackio")
    assert made.exit_code == 0, made.output
    assert made.stderr.count("training goes on without it") == 2
    assert "tracker wandb: WANDB_API_KEY is not set" in made.stderr
    assert "tracker trackio: no route to host; training" in made.stderr
    board = next(each for each in Told.made if "log_dir" in each.settings)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [board.merged()[entry["step"]]["train/loss"] for entry in log] == [entry["loss"] for entry in log]
    plain = typed(*words, "--out", tmp_path / "plain")
    assert plain.exit_code == 0 and bits(tmp_path / "plain", 2) == bits(tmp_path / "run", 2)


def test_a_package_that_is_not_here_is_refused_before_a_step(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    words = ("--data", samples, *SMALL, "-o", "runtime.trackers=wandb", "--out", tmp_path / "run")
    made = typed("train", "v2v", *words)
    assert made.exit_code == 4 and "install avatarctl[track]" in made.output, made.output
    assert not (tmp_path / "run").exists() and "Traceback" not in made.output


def test_a_tracker_that_fails_says_so_once(tmp_path: Path, packages: None) -> None:
    said: list[Event] = []
    folder = RunFolder(tmp_path)
    Trackers(("wandb",), folder, 0, said.append)
    Told.made[0].log = lambda *rest, **named: 1 / 0  # type: ignore[method-assign]
    for step in (1, 2):
        folder.write("log.jsonl", {"step": step, "loss": 1.0})
    assert [type(event) for event in said] == [Notice] and len(folder.entries()) == 2
