"""Runs as they are typed: their folders, resuming, refusals, and what becomes of the weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors import safe_open

from avatarctl.data.checking import Checker
from avatarctl.data.encoders import Encoders
from avatarctl.data.training_set import ToFace
from avatarctl.demo.samples import write_samples
from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.media.files import file_sha256
from avatarctl.perception.face_file import Clip, FaceFileWriter
from avatarctl.perception.smooth import TrackedFace
from avatarctl.placement.units import Unit
from avatarctl.training import building, checkpoints, trainer
from tests.training.running import COMPARED, QUICK, SMALL, bits, forked, typed

Train = Callable[..., Result]
EVERY = ("-o", "checkpoint.every=1")


@pytest.fixture(scope="module")
def finished(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of three steps; nobody changes it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    line = ["train", "v2v", "--data", prepared, "--size", "32x32", "--frames", "9", "--max-steps", "3"]
    made = typed(*line, "--batch-size", "2", *EVERY, "--out", run)
    assert made.exit_code == 0, made.output
    return run


def test_a_run_leaves_what_a_person_looks_for(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    wanted = {"run.yaml", "log.jsonl", "timing.jsonl", "curves.png", "checkpoint-3", "checkpoint-1"}
    assert wanted <= names
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3]
    assert all(entry["loss"] > 0 and entry["mse"] > 0 and entry["gradient_norm"] > 0 for entry in log)
    with safe_open(finished / "checkpoint-3" / COMPARED[0], "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["avatarctl.base"]) == {
        "model": "cartoon-v2v",
        "files": ["dit_v2v.safetensors"],
    }
    assert json.loads(metadata["avatarctl.conventions"])["audio_offset"] == 0
    assert metadata["avatarctl.channels"] == "49"


def test_prepared_and_live_samples_train_alike(
    finished: Path, samples: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is prepared in the other folder: all is encoded when its turn comes, by a reading process. What
    encodes waits on the host meanwhile, as it does beside a card."""
    monkeypatch.setattr(Encoders, "_wait_on_host", lambda *_: True)
    left: list[str] = []
    leave = Unit.leave
    monkeypatch.setattr(Unit, "leave", lambda unit: (left.append(unit.name), leave(unit)))
    made = train("v2v", "--data", samples, *EVERY, "--workers", "1", "--out", tmp_path / "run")
    assert made.exit_code == 0, made.output
    assert bits(tmp_path / "run", 3) == bits(finished, 3)
    assert any("decoder" in name or "encoder" in name for name in left), "they came and left"


def test_a_run_that_was_resumed_twice_ends_as_one_that_was_not(
    finished: Path, prepared: Path, train: Train, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for steps in (1, 2, 3):
        words = ("--data", prepared, *EVERY, *QUICK, "--out", run, "--resume", "auto", "--max-steps", steps)
        made = typed("train", "v2v", "--size", "32x32", "--frames", "9", "--batch-size", "2", *words)
        assert made.exit_code == 0, made.output
    assert bits(run, 3) == bits(finished, 3)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_between_steps() -> None:
    """Before the second step."""
    step = trainer.Trainer._one_step

    def killed(self: trainer.Trainer, *rest: Any) -> None:
        if self.step == 1:
            _die()
        step(self, *rest)

    trainer.Trainer._one_step = killed  # type: ignore[method-assign]


def _killed_while_saving() -> None:
    """When the next checkpoint is whole and not yet renamed."""
    flush = checkpoints.flush_folder

    def killed(folder: Path) -> None:
        if folder.name.startswith(".tmp-"):
            _die()
        flush(folder)

    checkpoints.flush_folder = killed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(
    finished: Path, prepared: Path, train: Train, tmp_path: Path
) -> None:
    """Killed, resumed, killed again, resumed; with two reading processes, then without. Nothing is unlocked
    by hand: what a dead run had locked is free, though its reading processes may outlive it."""
    run, said = tmp_path / "run", tmp_path / "said.txt"
    line = ["train", "v2v", *SMALL, "--data", prepared, *EVERY, *QUICK, "--out", run, "--resume", "auto"]
    for kill, workers in ((_killed_between_steps, 2), (_killed_while_saving, 0)):
        code = forked(kill, *line, "--workers", workers, said=said)
        assert code == -signal.SIGKILL, said.read_text()
        assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-1"}
    assert "resumed behind step 1" in said.read_text()
    assert list(run.glob(".tmp-*"))
    resumed = train("v2v", "--data", prepared, *EVERY, "--out", run, "--resume", "auto")
    assert resumed.exit_code == 0, resumed.output
    assert not list(run.glob(".tmp-*"))
    assert bits(run, 3) == bits(finished, 3)


def test_a_stopped_run_saves_its_step(finished: Path, prepared: Path, train: Train, tmp_path: Path) -> None:
    """SIGTERM in the middle of the second step."""
    run = tmp_path / "run"
    step = trainer.Trainer.accumulate
    with pytest.MonkeyPatch.context() as patch:

        def stopping(self: trainer.Trainer, batch: list[trainer.TrainingSample]) -> dict[str, float]:
            if self.step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, batch)

        patch.setattr(trainer.Trainer, "accumulate", stopping)
        stopped = train("v2v", "--data", prepared, *QUICK, "--out", run)
    assert stopped.exit_code == 6, stopped.output
    assert "stopped after step 2, which is saved" in stopped.output
    resumed = train("v2v", "--data", prepared, *QUICK, "--out", run, "--resume", "auto")
    assert resumed.exit_code == 0 and "resumed behind step 2" in resumed.output
    assert bits(run, 3) == bits(finished, 3)


@pytest.mark.parametrize("where", ["a sample", "a text", "a clip to validate on", "the network", "a clip"])
def test_a_stop_before_the_first_step_is_obeyed_at_once(
    where: str, samples: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the first of what is looked at, encoded or loaded: there is no second, and no step."""
    encoded = {"a text": "text", "a clip to validate on": "latents", "a clip": "latents"}
    at: dict[str, tuple[Any, str]] = {
        "a sample": (Checker, "check"), "the network": (building, "build_network")
    }  # fmt: skip
    place, name = at.get(where, (OmniAvatar, "encode_clip"))
    seen: list[int] = []
    original = getattr(place, name)

    def stopping(*given: Any, **named: Any) -> Any:
        if where not in encoded or encoded[where] in given[3]:
            seen.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*given, **named)

    monkeypatch.setattr(place, name, stopping)
    monkeypatch.setattr(trainer.Trainer, "accumulate", lambda *rest: pytest.fail("a step is made"))
    (samples_here := tmp_path / "samples").mkdir()
    for each in ("000000", "000001"):
        shutil.copytree(samples / each, samples_here / each)
        (samples_here / each / "prompt.txt").write_text(f"somebody speaks {each}")
    words = ("--sets", samples, "-o", "validation.every=9") if where == "a clip to validate on" else ()
    run = tmp_path / "run"
    stopped = train("v2v", "--data", samples_here, *QUICK, *words, "--out", run)
    assert stopped.exit_code == 6 and "stopped before" in stopped.output, stopped.output
    assert len(seen) == 1 and (where == "a clip" or not run.exists())


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def test_a_damaged_newest_falls_back_and_says_so(
    finished: Path, copied: Path, prepared: Path, train: Train
) -> None:
    file = copied / "checkpoint-3" / COMPARED[0]
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    resumed = train("v2v", "--data", prepared, *EVERY, "--out", copied, "--resume", "auto")
    assert resumed.exit_code == 0, resumed.output
    assert "checkpoint-3 is passed over: trainable_weights.safetensors is damaged" in resumed.output
    assert "resumed behind step 2" in resumed.output
    assert bits(copied, 3) == bits(finished, 3)


def test_going_on_from_an_older_one_sets_the_newer_aside(
    finished: Path, copied: Path, prepared: Path, train: Train
) -> None:
    resumed = train("v2v", "--data", prepared, *EVERY, *QUICK, "--resume", copied / "checkpoint-1")
    assert resumed.exit_code == 0, resumed.output
    assert {path.name for path in (copied / "aside-1").iterdir()} == {"checkpoint-2", "checkpoint-3"}
    assert bits(copied, 3) == bits(finished, 3)


def test_the_newest_are_kept_by_number(copied: Path, prepared: Path, train: Train) -> None:
    words = ("--data", prepared, *EVERY, *QUICK, "--out", copied, "--resume", "auto", "--keep-last", "2")
    made = train("v2v", *SMALL[:4], "--batch-size", "2", *words, "--max-steps", "4", small=False)
    assert made.exit_code == 0, made.output
    assert {path.name for path in copied.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    (copied / "checkpoint-4").rename(copied / "checkpoint-10")  # as text behind "checkpoint-3"
    assert [path.name for path in checkpoints.rotate(copied, 1)] == ["checkpoint-3"]
    assert [path.name for path in copied.glob("checkpoint-*")] == ["checkpoint-10"]


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path, **_: object) -> None:
        next(folder.rglob("*.safetensors")).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        list(checkpoints.rotate(copied, 1))
    left = checkpoints.checkpoints(copied)
    assert [number for number, _ in left] == [2, 3]
    assert not any(checkpoints.damage(path) for _, path in left)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("-o", "train.learning_rate=2e-4"), 2, "train.learning_rate was 0.0001 and is 0.0002"),
        (("--max-steps", "2"), 2, "2 steps were asked for, and 3 are done"),
        (("--batch-size", "1"), 2, "train.batch_size was 2 and is 1"),
    ],
)
def test_what_cannot_be_gone_on_with(
    words: tuple[str, ...], code: int, said: str, copied: Path, prepared: Path
) -> None:
    line = {"--max-steps": "3", "--batch-size": "2", **dict([words[-2:]])}
    asked = [word for pair in line.items() for word in pair]
    common = ("--data", prepared, "--size", "32x32", "--frames", "9", *EVERY, "--out", copied)
    made = typed("train", "v2v", *common, *asked, "--resume", "auto")
    assert made.exit_code == code and said in made.output, made.output
    assert "Traceback" not in made.output


def test_a_longer_cosine_is_no_usual_wish(prepared: Path, tmp_path: Path) -> None:
    """A longer run at a constant rate is: `test_a_run_that_was_resumed_twice_ends_as_one_that_was_not`."""
    run = tmp_path / "cosine"
    cosine = ("--data", prepared, "--size", "32x32", "--frames", "9", "--batch-size", "1", *EVERY, *QUICK,
              "--schedule", "cosine", "--out", run, "--max-steps")  # fmt: skip
    assert typed("train", "v2v", *cosine, "1").exit_code == 0
    refused = typed("train", "v2v", *cosine, "2", "--resume", "auto")
    assert refused.exit_code == 2
    assert "at step 1 the learning rate would jump from 0 to 5e-05" in refused.output
    assert typed("train", "v2v", *cosine, "2", "--resume", "auto", "--accept-schedule").exit_code == 0


def test_another_data_set_is_not_gone_on_with(copied: Path, train: Train, tmp_path: Path) -> None:
    write_samples(tmp_path / "fewer", range(3), 17, "audio.wav")
    made = train("v2v", "--data", tmp_path / "fewer", *EVERY, "--out", copied, "--resume", "auto")
    assert made.exit_code == 3, made.output
    assert "is not the data set of this run: 4 samples then, 3 now; 000003 is gone" in made.output


def test_two_runs_do_not_share_a_folder(copied: Path, prepared: Path, train: Train) -> None:
    from avatarctl.training.run_folder import RunFolder

    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    with RunFolder(copied).held():
        for data in (("--data", prepared), ()):  # clips are not drawn either
            made = train("v2v", *data, *EVERY, "--out", copied, "--resume", "auto")
            assert made.exit_code == 2 and "another run is training in it" in made.output
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


def test_an_existing_run_is_not_begun_again(copied: Path, prepared: Path, train: Train) -> None:
    for data in (("--data", prepared), ()):
        made = train("v2v", *data, "--out", copied)
        assert made.exit_code == 2 and "holds a run already (add --resume auto" in made.output
    assert not (copied / "samples").exists()


def test_bad_samples_are_named_and_the_others_train(train: Train, samples: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(samples, tmp_path / "data"))
    (data / "000001" / "audio.wav").write_bytes(b"no audio")
    words = ("--data", data, "--batch-size", "2", "--max-steps", "1", "--out", tmp_path / "run", *QUICK)
    made = train("v2v", *SMALL[:4], *words, small=False)
    assert made.exit_code == 7, made.output
    first = data / "000001" / "audio.wav"
    assert f"trained to step 1; 1 of 4 samples could not be used; the first: {first}: " in made.output
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


@pytest.mark.parametrize(
    ("which", "words", "code", "said"),
    [
        ("i2v", ("--model", "cartoon-v2v"), 2, "learns from a video"),
        ("v2v", ("--model", "cartoon-i2v"), 2, "learns from an image"),
        ("v2v", ("--mode", "lora", "--init", "random"), 2, "nothing that an adapter could change"),
        ("i2v", ("--mouth-weight", "2"), 2, "only with a mask"),
        ("v2v", ("--batch-size", "64"), 2, "a step takes 64 samples, and the data set has 4"),
        ("v2v", ("--audio-offset", "1"), 2, "a video's frames and audio belong together"),
        ("i2v", ("--model", "omniavatar-1.3b"), 4, "weights are missing"),
        ("i2v", ("--model", "stableavatar-tiny"), 2, "is not trained yet"),
        ("v2v", ("--data", "nowhere"), 2, "nowhere"),
        ("v2v", ("--optimizer", "adamw8bit"), 4, "adamw8bit needs bitsandbytes"),
    ],
)
def test_refused_before_anything_is_made(
    which: str, words: tuple[str, ...], code: int, said: str, samples: Path, tmp_path: Path
) -> None:
    line = {
        "--data": str(samples),
        "--frames": "9",
        "--out": str(tmp_path / "run"),
        **dict(zip(words[::2], words[1::2], strict=True)),
    }
    made = typed("train", which, *(word for pair in line.items() for word in pair))
    assert made.exit_code == code and said in made.output, made.output
    assert "Traceback" not in made.output and not list(tmp_path.glob("run/checkpoint-*"))


def test_dry_run_counts_and_makes_nothing(samples: Path, train: Train, tmp_path: Path) -> None:
    made = train("v2v", "--data", samples, "--out", tmp_path / "run", "--dry-run", "--json")
    assert made.exit_code == 0, made.output
    plan = json.loads(made.stdout)
    assert plan["samples"] == 4 and plan["samples_per_step"] == 2 and plan["epochs"] == 1.5
    assert plan["encoded_while_training"]["latents"] == 4
    assert not (tmp_path / "run").exists()


def test_the_plan_of_what_is_typed_says_each_thing_once(train: Train) -> None:
    told = train("v2v", "--dry-run", small=False)
    names = [line.partition(":")[0] for line in (told.stdout + told.stderr).splitlines()]
    assert told.exit_code == 0 and len(set(names)) == len(names) and "start" in names, told.output
    assert told.stdout.startswith("model: cartoon-v2v (built in; --model names another)\n")


def test_a_plan_without_weights_is_shown_and_the_files_are_named_once(
    train: Train, samples: Path, tmp_path: Path
) -> None:
    words = ("--model", "omniavatar-1.3b", "--channels", "49", "--weights-root", tmp_path, "--data", samples)
    told = train("v2v", *words, "--out", tmp_path / "run", "--dry-run")
    assert told.exit_code == 4 and not (tmp_path / "run").exists(), told.output
    assert "samples: 4" in told.stdout and "encoded while training: " in told.stdout
    assert "missing weights: " in told.stdout
    assert told.output.count("Wan2.1_VAE.pth") == 1 and "models pull omniavatar-1.3b" in told.stderr


def test_a_trained_model_is_used_by_the_command_that_is_printed(finished: Path, tmp_path: Path) -> None:
    """Of a run folder and of a checkpoint; a full model on a built-in row."""
    for place in (finished, finished / "checkpoint-2"):
        made = typed("infer", "--model", place, "--dry-run", "--json")
        assert made.exit_code == 0, made.output
    plan = json.loads(made.stdout)
    assert plan["audio_offset"] == 0


def test_an_adapter_of_a_built_in_model_talks_and_converts(
    adapted: Path, samples: Path, tmp_path: Path
) -> None:
    shown = typed("convert-ckpt", adapted / "checkpoint-2", "--inspect")
    assert shown.exit_code == 0 and "adapter of OmniAvatar" in shown.output, shown.output
    words = ("infer", "--size", "32x32", "-o", "long_video.num_frames=9", "--steps", "1", "--audio",
             samples / "000000" / "audio.wav")  # fmt: skip
    talks = typed(*words, "--model", adapted, "--out", tmp_path / "talks.mp4")
    assert talks.exit_code == 0, talks.output
    assert "60 targets at scale 32" in talks.output


def test_a_run_is_a_lora_by_its_newest_good_checkpoint(adapted: Path, finished: Path, tmp_path: Path) -> None:
    """As with --model; a run that trained every weight is none."""
    damaged = Path(shutil.copytree(adapted, tmp_path / "damaged"))
    (damaged / "checkpoint-2" / "ema_weights.safetensors").write_bytes(b"")
    for place, taken, scale in (
        (adapted, "run/checkpoint-2/ema_weights.safetensors", "scale 32"),
        (adapted / "checkpoint-1", "checkpoint-1/ema_weights.safetensors", "scale 32"),
        (f"{damaged}:0.5", "damaged/checkpoint-1/ema_weights.safetensors", "scale 0.5 x 32"),
    ):
        made = typed("infer", "--lora", place, "--dry-run")
        assert made.exit_code == 0 and f"{taken}: 60 targets at {scale}" in made.stderr, made.output
    assert "checkpoint-2 is passed over: ema_weights.safetensors is damaged" in made.stderr
    refused = typed("infer", "--lora", finished, "--dry-run")
    assert refused.exit_code == 3 and "is no adapter" in refused.output, refused.output


def test_the_sync_loss_of_whole_frames_looks_at_the_face(
    train: Train, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the judge is shown is warped by each sample's own map; without one there is exit 3."""
    words = ("--frames", 17, "--size", "32x32", "--batch-size", 1, "--max-steps", 1, "--aux", "sync", *QUICK)
    common = ("--out", tmp_path / "run", "--faces", "auto", *words)
    refused = train("i2v", "--data", samples, *common, small=False)
    assert refused.exit_code == 3 and "has no face.safetensors" in refused.stderr, refused.output
    assert not (tmp_path / "run/log.jsonl").exists()

    mapped = tmp_path / "samples"
    shutil.copytree(samples, mapped)
    for folder in mapped.iterdir():
        clip = Clip(file_sha256(folder / "sub_clip.mp4"), 17, 64, 64)
        points = np.array([(24.0, 20), (40, 20), (32, 30)])
        with FaceFileWriter(folder / "face.safetensors", clip, 256, "drawn here") as writer:
            for _ in range(17):
                writer.add(TrackedFace(0, np.array([16.0, 8, 48, 56]), points, None, 1.0, True))
            writer.close()
    seen: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    real = ToFace.__call__

    def watch(self: ToFace, frames: torch.Tensor, first: int) -> torch.Tensor:
        faces = real(self, frames, first)
        seen.append((first, tuple(frames.shape), tuple(faces.shape)))
        return faces

    monkeypatch.setattr(ToFace, "__call__", watch)
    made = train("i2v", "--data", mapped, *common, small=False)
    assert made.exit_code == 0, made.output
    assert seen == [(0, (1, 3, 17, 32, 32), (1, 3, 17, 256, 256))] * 2  # what was made, and the clip itself
