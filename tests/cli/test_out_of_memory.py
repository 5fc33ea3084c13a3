"""Memory that is used up in a real run: one line with the phase, and the plan that fits."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from avatarctl.live_bytes import LiveBytes
from avatarctl.loading.modules import PARTS
from avatarctl.pipelines import infer
from avatarctl.profiling import inference, training
from avatarctl.profiling.fit import Room
from avatarctl.registry import configure, find_model
from avatarctl.training.run import TrainingResult, TrainingRun
from avatarctl.training.trainer import Trainer
from tests.placement.test_failures import fails
from tests.training.running import typed

SIZE = ("output.width=16", "output.height=16", "long_video.num_frames=5", "long_video.overlap_frames=1")
WORDS = (
    "--size",
    "16x16",
    "-o",
    "long_video.num_frames=5",
    "--overlap",
    "1",
    "--steps",
    "1",
    "--device",
    "cpu",
)


@pytest.fixture(autouse=True)
def counted_on_real_tensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The planner's own accounts, to the byte, in a fifth of the time that fakes take."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module, name in ((inference, "profile_inference"), (training, "profile_training")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), mode="real"))


def voice(folder: Path) -> str:
    """As short as what is counted where nothing is said of audio: two chunks."""
    soundfile.write(folder / "voice.wav", np.full(5_120, 0.1), 16_000)
    return str(folder / "voice.wav")


def refusal(*words: str) -> str:
    ended = typed(*words)
    assert ended.exit_code == 5, ended.output
    assert "Traceback" not in ended.output and ended.stdout == ""
    return ended.stderr.splitlines()[-1]


def test_infer_names_the_phase_and_the_mode_that_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A card that mode model just fits, and full does not."""
    row = find_model("cartoon-i2v")
    model = inference.profile_inference(
        row, configure("model.name=cartoon-i2v", *SIZE, "runtime.device=cpu", "memory.mode=model")
    )
    generate = infer.generate

    def limited(plan: Any, *, modules: Any, **rest: Any) -> Iterator[Any]:
        with LiveBytes(limit=model.live_bytes) as live:
            live.track(
                [part for name in PARTS if isinstance(part := getattr(modules, name, None), nn.Module)]
            )
            yield from generate(plan, modules=modules, **rest)

    monkeypatch.setattr(infer, "generate", limited)
    out = tmp_path / "new" / "v.mp4"
    line = refusal("infer", *WORDS, "--audio", voice(tmp_path), "--out", str(out))
    told, _, fix = line.partition(" (")
    assert re.fullmatch(
        r"error: infer of cartoon-i2v, phase decode: out of memory: aten\.\S+ needs [\d,]+ bytes of the devic"
        rf"e, and the limit is {model.live_bytes:,}",
        told,
    ), line
    assert fix.startswith("with -o memory.mode=model it takes 18.1 MiB, as counted; networks are read"), line
    assert not out.parent.exists()


def test_torchs_own_error_is_answered_from_what_is_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was counted of the mode that failed bounds what is tried. On a CPU what waits counts as well."""
    asked = ("infer", *WORDS, "--audio", voice(tmp_path), "--out", str(tmp_path / "v.mp4"), "--memory")
    fails(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"))
    line = refusal(*asked, "group")
    assert line.startswith(
        "error: infer of cartoon-i2v, phase condition: out of memory: CUDA out of memory. Tried to allocate "
        "20 GiB. (with -o memory.mode=sequential it takes 17.3 MiB, as counted; "
    ), line
    assert not list(tmp_path.glob("v.*"))
    fails(monkeypatch, 1, torch.OutOfMemoryError("CUDA out of memory."))
    line = refusal(*asked, "sequential")
    assert "; infer of cartoon-i2v needs 17.3 MiB at least (as it is), and 17.3 MiB are free" in line


def test_training_names_the_phase_and_the_plan_that_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A card that takes one sample at a time; what may wait on the host was asked to stay."""
    monkeypatch.setattr("avatarctl.models.omniavatar.without_padding", lambda text: (text, None))
    sizes = ("data.width=32", "data.height=32", "data.num_frames=9")
    one = training.profile_training(
        find_model("cartoon-v2v"),
        configure("model.name=cartoon-v2v", *sizes, "train.batch_size=1", "train.gradient_accumulation=2"),
    )
    train = Trainer.train

    def limited(self: Trainer, should_stop: Any) -> None:
        with LiveBytes(limit=one.live_bytes) as live:
            live.track(self.network.dit)
            train(self, should_stop)

    monkeypatch.setattr(Trainer, "train", limited)
    out = tmp_path / "run"
    words = ("--size", "32x32", "--frames", "9", "--max-steps", "2", "--device", "cpu",
             "-o", "memory.optimizer_device=auto", "-o", "memory.activation_checkpointing=block")  # fmt: skip
    line = refusal("train", "v2v", *words, "--out", str(out))
    assert re.match(r"error: train v2v of cartoon-v2v, phase backward: out of memory: aten\.", line), line
    assert "with -o train.batch_size=1 -o train.gradient_accumulation=2 it takes " in line
    assert line.endswith("as counted; the same samples in more passes; last digits differ)")


@pytest.mark.parametrize(("free", "code"), [(1 << 20, 5), (1 << 40, 0)])
def test_weights_that_a_card_has_no_room_for_are_not_loaded(
    free: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train` looks before it loads, and not for a dry run."""
    loaded, result = list[int](), TrainingResult(tmp_path, 1, None)
    monkeypatch.setattr("avatarctl.models.device.resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("avatarctl.cli.train.free_room", lambda device: Room(free, where=str(device)))
    monkeypatch.setattr(TrainingRun, "run", lambda *rest: loaded.append(1) or result)
    words = ("train", "v2v", "--out", tmp_path / "run")
    told = typed(*words)
    assert told.exit_code == code and bool(loaded) == (code == 0), told.output
    assert ("the weights alone take 4.0 MiB, and 1.0 MiB are free" in told.stderr) == (code == 5)
    assert ("vram-profile train v2v ... --fit 1MiB" in told.stderr) == (code == 5)
    assert not (tmp_path / "run").exists()
    assert typed(*words, "--dry-run").exit_code == 0
