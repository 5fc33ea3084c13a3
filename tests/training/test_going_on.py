"""Runs that go on: from other runs, longer than they were, after a sample broke, after a power cut."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from avatarctl.atomic import flush_file
from avatarctl.cli.options import KeyOption, config_options
from avatarctl.config import read_text
from avatarctl.data.training_set import TrainingSample
from avatarctl.errors import UnusableFile
from avatarctl.events import Notice, silent
from avatarctl.files.tensors import read_whole, to_float32
from avatarctl.loading.assemble import assemble
from avatarctl.loading.model_row import row_named
from avatarctl.loading.sources import find_sources
from avatarctl.media.files import file_sha256
from avatarctl.media.video_reader import open_video
from avatarctl.registry import ROWS, configure
from avatarctl.training.run_folder import RunFolder, length_so_far
from avatarctl.training.trainer import Trainer
from tests.pipelines import tiny_release as tiny
from tests.training.running import COMPARED, QUICK, bits, typed

WEIGHTS = COMPARED[0]
SHORT = ("--size", "32x32", "--frames", "9", "--batch-size", "1")
LORA = ("--mode", "lora", "--lora-rank", "2", "--learning-rate", "1e-6", "--max-steps", "1")


@pytest.fixture(scope="module")
def full(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full model that is far from the built-in one after two steps; nobody changes it."""
    run = tmp_path_factory.mktemp("full") / "full"
    words = ("--data", prepared, "--learning-rate", "1e-2", "--max-steps", "2", "--out", run)
    made = typed("train", "i2v", *SHORT, *words)
    assert made.exit_code == 0, made.output
    return run


@pytest.fixture(scope="module")
def adapter(full: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on it that has hardly moved; nobody changes it."""
    run = tmp_path_factory.mktemp("adapter") / "adapter"
    made = typed("train", "i2v", *SHORT, *LORA, "--data", prepared, "--model", full, "--out", run)
    assert made.exit_code == 0, made.output
    return run


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def rewritten(file: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    save_file(tensors, file, {**header(file), **metadata})


def resealed(checkpoint: Path, **changes: object) -> None:
    """What somebody changed in a checkpoint becomes what its state file says, with `changes`."""
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"] = {name: file_sha256(checkpoint / name) for name in state["files"]}
    (checkpoint / "state.json").write_text(json.dumps({**state, **changes}))


# --- runs that start from runs -------------------------------------------------------------------


def test_an_adapter_on_a_full_run_is_used_on_that_run(full: Path, adapter: Path) -> None:
    """Not on the model that the full run began with, which it has left far behind."""
    row = row_named(str(adapter))
    cfg = configure(f"model.name={adapter}", row_named=lambda name: row)
    sources = find_sources(row, cfg.model)
    held = assemble(row, sources, cfg.model, silent)
    trained = load_file(full / "checkpoint-2" / WEIGHTS)
    assert held.tensors.keys() == trained.keys()
    for name, tensor in trained.items():
        stored = held.tensors[name]
        ours = torch.from_numpy(to_float32(read_whole(stored), stored.info.dtype).copy())
        torch.testing.assert_close(ours, tensor, atol=1e-4, rtol=0)
    packaged = row_named("cartoon-i2v")
    began = load_file(find_sources(packaged, cfg.model).dit[0])
    assert max(float((began[name].float() - trained[name]).abs().max()) for name in trained) > 1e-2


def test_the_full_model_below_an_adapter_is_the_one_it_was_trained_on(
    full: Path, adapter: Path, prepared: Path, tmp_path: Path
) -> None:
    """Moved it is named; other bytes are refused, by who uses the adapter and who trains it on."""
    mine = Path(shutil.copytree(adapter, tmp_path / "mine"))
    file = mine / "checkpoint-1" / WEIGHTS
    base = json.loads(header(file)["avatarctl.base"])
    there = full / "checkpoint-2" / WEIGHTS
    assert (base["model"], base["path"]) == ("cartoon-i2v", str(there))
    assert base["sha256"] == {WEIGHTS: file_sha256(there)}

    elsewhere = json.dumps({**base, "path": str(tmp_path / "gone.safetensors")})
    rewritten(file, load_file(file), **{"avatarctl.base": elsewhere})
    resealed(mine / "checkpoint-1")
    gone = typed("infer", "--model", mine, "--dry-run")
    assert gone.exit_code == 2 and "gone.safetensors, which is not there" in gone.output, gone.output
    named = typed("infer", "--model", mine, "--weights", f"dit={there}", "--dry-run")
    assert named.exit_code == 0, named.output

    other = tmp_path / "gone.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(there).items()}, other)
    for words in (("infer", "--dry-run"), ("train", "i2v", *SHORT, *LORA, "--data", prepared, "--dry-run")):
        refused = typed(*words, "--model", mine)
        assert refused.exit_code == 3, refused.output
        assert "is not the model that" in refused.output and "its SHA-256 is another one" in refused.output


def test_an_adapter_on_a_full_model_in_the_published_layout(samples: Path, tmp_path: Path) -> None:
    """That model in place of the published base, which is here as well; told by its header alone, also where
    the file is named without its run."""
    root, run, last = tmp_path / "weights", tmp_path / "run", tmp_path / "last"
    tiny.tiny_release().write(root, "1.3B")
    line = ("train", "v2v", *SHORT, "--data", samples, "--weights-root", root, "--max-steps", 1)
    made = typed(*line, "--model", "omniavatar-1.3b", "--channels", 49, "--mode", "full", "--out", run)
    assert made.exit_code == 0, made.output
    made = typed(*line, *LORA[:4], "--model", run, "--out", last)
    assert made.exit_code == 0, made.output
    below = run / "checkpoint-1" / WEIGHTS
    for model in (last, last / "checkpoint-1" / WEIGHTS):
        row = row_named(str(model))
        cfg = configure(
            f"model.name={model}", f"model.weights_root={root}", row_named=lambda name, row=row: row
        )
        sources = find_sources(row, cfg.model)
        assert sources.dit == (below, last / "checkpoint-1" / WEIGHTS) and not sources.missing
        used = typed("infer", "--model", model, "--weights-root", root, "--dry-run")
        assert used.exit_code == 0 and "already" not in used.output, used.output
    (below.parent / "moved.safetensors").write_bytes(below.read_bytes())
    below.write_bytes(below.read_bytes()[:-1] + b"?")
    words = ("infer", "--model", last, "--weights-root", root, "--dry-run")
    refused = typed(*words)
    assert refused.exit_code == 3 and "its SHA-256 is another one" in refused.output, refused.output
    assert typed(*words, "--weights", f"dit={below.parent / 'moved.safetensors'}").exit_code == 0


def test_a_run_keeps_the_checkpoint_that_it_started_from(full: Path, prepared: Path, tmp_path: Path) -> None:
    """Whatever the other run has made since; and no other bytes at its place."""
    start, run = Path(shutil.copytree(full, tmp_path / "start")), tmp_path / "run"
    words = ("train", "i2v", *SHORT, *LORA[:-2], "--data", prepared, "--model", start, "--out", run)
    made = typed(*words, "--max-steps", 1)
    assert made.exit_code == 0, made.output
    assert f'name: "{start}/checkpoint-2"' in (run / "run.yaml").read_text()

    newer = Path(shutil.copytree(start / "checkpoint-2", start / "checkpoint-3"))
    rewritten(newer / WEIGHTS, {name: tensor * 2 for name, tensor in load_file(newer / WEIGHTS).items()})
    resealed(newer, step=3)
    resumed = typed(*words, "--resume", "auto", "--max-steps", 2)
    assert resumed.exit_code == 0, resumed.output

    shutil.copyfile(newer / WEIGHTS, start / "checkpoint-2" / WEIGHTS)
    resealed(start / "checkpoint-2")
    refused = typed("train", "i2v", "--resume", run, "--max-steps", 3)
    assert refused.exit_code == 3, refused.output
    assert "is not what this run started from: its SHA-256 is another one" in refused.output


def test_auto_says_why_it_begins_anew_and_passes_over_a_broken_run(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ("train", "v2v", *SHORT, "--data", prepared, "--max-steps", 1, "--resume", "auto")
    assert typed(*line).exit_code == 0
    (first,) = (tmp_path / "runs" / "train-v2v-cartoon-v2v").iterdir()
    broken = first.with_name("99999999-000000")
    broken.mkdir()
    (broken / "run.yaml").write_text("command: [")
    again = typed(*line)
    assert again.exit_code == 0 and "nothing to do" in again.output, again.output
    assert f"{broken.relative_to(tmp_path)} is passed over: " in again.output
    other = typed(*line, "--learning-rate", "1e-5", "--dry-run")
    assert other.exit_code == 0, other.output
    newest = first.relative_to(tmp_path)
    assert (
        f"no run of this configuration; the newest, {newest}, differs in train.learning_rate" in other.output
    )


# --- settings that say more than one thing -------------------------------------------------------


@pytest.mark.parametrize("command", ["train i2v", "train v2v", "precompute-latents", "infer"])
def test_defaults_are_shown_as_they_are_typed(command: str) -> None:
    shown = 0
    for option in config_options(command):
        if isinstance(option, KeyOption) and option.help and isinstance(option.spec.default, tuple):
            text = option.help.partition("[default: ")[2].removesuffix("]")
            if text and not option.spec.key.from_row:
                shown += 1
                assert read_text(option.spec, text, "--it").value == option.spec.default
    assert shown >= 3 or not command.startswith("train")


def test_what_a_run_starts_from_is_said(full: Path, prepared: Path) -> None:
    line = ("train", "i2v", *SHORT, "--data", prepared, "--dry-run")
    there = full / "checkpoint-2" / WEIGHTS
    for words, said in (
        ((), "start: the weights of cartoon-i2v\n"),
        (("--model", full), f"start: the weights of {there}\n"),
        (
            ("--model", full, *LORA),
            f"start: the weights of {there}, which stay as they are, and a new adapter\n",
        ),
    ):
        made = typed(*line, *words)
        assert made.exit_code == 0 and said in made.stderr, made.output


def test_a_reference_sequence_brings_its_channels(prepared: Path, tmp_path: Path) -> None:
    line = ("train", "v2v", *SHORT, "--data", prepared, "--reference-sequence", "--dry-run", "--json")
    made = typed(*line)
    assert made.exit_code == 0, made.output
    plan = json.loads(made.stdout)
    assert plan["channels"] == 65 and "reference_sequence" in plan["encoded_while_training"]
    for words in (("v2v", *line[2:], "--channels", "49"), ("i2v", *line[2:])):
        refused = typed("train", *words)
        assert refused.exit_code == 2, refused.output
        assert "data.reference_sequence: a reference sequence needs 65 input channels" in refused.output


# --- samples that go bad, and come back ----------------------------------------------------------


def test_a_run_goes_on_though_a_sample_broke_and_though_it_was_mended(prepared: Path, tmp_path: Path) -> None:
    """Which sample has which turn does not depend on who is well: a folder that is gone is another set."""
    data, run = Path(shutil.copytree(prepared, tmp_path / "data")), tmp_path / "run"
    audio = data / "000001" / "audio.wav"
    whole = audio.read_bytes()
    line = ("train", "v2v", *SHORT, "--data", data, "--out", run, "--resume", "auto", "--max-steps")
    for steps, held, code in ((1, whole, 0), (2, b"no audio", 7), (3, whole, 0)):
        audio.write_bytes(held)
        made = typed(*line, steps)
        assert made.exit_code == code, made.output
        state = json.loads((run / f"checkpoint-{steps}" / "state.json").read_text())
        assert state["samples"] == ["000000", "000001", "000002", "000003"]
    shutil.rmtree(data / "000001")
    gone = typed(*line, 4)
    assert gone.exit_code == 3 and "000001 is gone" in gone.output, gone.output


def test_the_turns_of_a_bad_sample_go_to_the_next(prepared: Path, tmp_path: Path) -> None:
    """Found bad before the first step or at its turn: the steps are the same, and so are resumed ones."""
    data = Path(shutil.copytree(prepared, tmp_path / "data"))
    (data / "000001" / "audio.wav").write_bytes(b"no audio")
    line = ("train", "v2v", *SHORT, "--data", data, "--resume", "auto", "--json")
    for run, lengths in (("whole", (2,)), ("resumed", (1, 2))):
        for steps in lengths:
            made = typed(*line, "--out", tmp_path / run, "--max-steps", steps)
            assert made.exit_code == 7, made.output
            assert made.output.count("data/000001/audio.wav: ") == 2  # when it is looked at, and at the end
            assert f"to use it: avatarctl infer --model {tmp_path / run}" in made.stderr
            assert json.loads(made.stdout)["steps"] == steps
    assert bits(tmp_path / "whole", 2) == bits(tmp_path / "resumed", 2)


def test_samples_whose_own_loss_is_not_finite_are_named_and_the_way_on(
    trainer_of: Callable[..., Trainer],
) -> None:
    """One of a batch of three; a resumed run would refuse another learning rate."""
    trainer = trainer_of("train.batch_size=3", "checkpoint.every=1")
    good, spoilt = trainer.data.read, [False]

    def read(places: Iterable[int]) -> Iterator[TrainingSample]:
        for sample in good(places):
            assert isinstance(sample, TrainingSample)
            latents = sample.tensors["latents"]
            if spoilt[0] and sample.name == "000002":
                latents = latents * torch.nan
            yield replace(sample, tensors={**sample.tensors, "latents": latents})

    trainer.accumulate(list(read([2, 0, 1])))
    assert trainer._odd == []
    spoilt[0] = True
    trainer._one_step(list(read([2, 0, 1])), 0.0, 0.0)
    events: list[Any] = trainer.events  # type: ignore[attr-defined]
    told = [event.text for event in events if isinstance(event, Notice)]
    assert "step 1 is skipped: its numbers are not finite (000002)" in told
    checkpoint = trainer.save()
    with pytest.raises(UnusableFile, match="5 steps in a row were not finite; the last: 000002") as raised:
        for _ in range(4):
            trainer._one_step(list(read([2, 0, 1])), 0.0, 0.0)
    assert f"--model {checkpoint} --learning-rate 1e-05 and another --out" in str(raised.value.fix)


# --- runs that were lengthened -------------------------------------------------------------------


def test_a_lengthened_run_goes_on_as_long_as_it_was_made(prepared: Path, tmp_path: Path) -> None:
    """By its name alone, and under `auto` without the option; also a cosine that was accepted once."""
    run = tmp_path / "run"
    line = ("train", "v2v", *SHORT, "--data", prepared, "--schedule", "cosine", "--out", run)
    assert typed(*line, "--max-steps", 1).exit_code == 0
    longer = (*line, "--resume", "auto", "--max-steps", 2)
    assert "would jump" in typed(*longer).output
    assert typed(*longer, "--accept-schedule").exit_code == 0
    assert length_so_far(run) == length_so_far(run, 2) == 2 and length_so_far(run, 1) == 1
    for words in (("train", "v2v", "--resume", run), longer, longer[:-2]):
        again = typed(*words, "--dry-run", "--json")
        assert again.exit_code == 0 and json.loads(again.stdout)["steps"] == 2, again.output
    back = typed("train", "v2v", "--resume", run / "checkpoint-1", "--dry-run", "--max-steps", 2)
    assert back.exit_code == 2 and "the cosine was made for 1 steps" in back.output, back.output


def test_weights_that_nobody_has_are_no_start(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ROWS["cartoon-v2v"]
    bare = replace(row, files=tuple(name for name in row.files if "/dit_" not in name), trained=False)
    monkeypatch.setitem(ROWS, row.name, bare)  # type: ignore[index]
    words = ("--mode", "lora", "--init", "zero_channels", "--data", prepared, "--out", tmp_path / "run")
    made = typed("train", "v2v", *SHORT, *words)
    assert made.exit_code == 2, made.output
    assert "cartoon-v2v: has no weights that training could start from" in made.output
    assert "--init random --mode full, or --model RUN" in made.output


@pytest.mark.parametrize("given", ["drawn", "empty", "short"])
def test_what_is_refused_leaves_nothing(given: str, prepared: Path, tmp_path: Path) -> None:
    """Whether clips had been drawn for it or not; what was there before stays."""
    (tmp_path / "empty").mkdir()
    data = {"drawn": (), "empty": ("--data", tmp_path / "empty"), "short": ("--data", prepared)}[given]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    for out in (tmp_path / "new" / "run", tmp_path / "kept")[: 1 if given == "drawn" else 2]:
        words = (*SHORT[:4], "--batch-size", 9, "--max-steps", 1, *data, "--out", out)
        made = typed("train", "v2v", *words)
        assert made.exit_code in (2, 3) and "Traceback" not in made.output, made.output
    assert not (tmp_path / "new").exists() and (tmp_path / "kept" / "notes.txt").read_text() == "mine"


# --- damaged checkpoints, cut logs ---------------------------------------------------------------


def test_infer_says_which_checkpoint_it_takes(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And which it passes over. Moments are twice as large as the weights and are not read for it."""
    run = Path(shutil.copytree(full, tmp_path / "run"))
    newer = Path(shutil.copytree(run / "checkpoint-2", run / "checkpoint-3"))
    (newer / WEIGHTS).write_bytes((newer / WEIGHTS).read_bytes()[:-1] + b"?")
    hashed: list[str] = []

    def watched(path: Path) -> str:
        hashed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr("avatarctl.loading.trained.file_sha256", watched)
    for words in (("infer",), ("train", "i2v", *SHORT)):
        made = typed(*words, "--model", run, "--dry-run", "--quiet")
        assert made.exit_code == 0, made.output
        assert f"checkpoint-3 is passed over: {WEIGHTS} is damaged" in made.output, made.output
        assert f"of this run: checkpoint-2/{WEIGHTS}" in typed(*words, "--model", run, "--dry-run").output
    assert set(hashed) == {WEIGHTS, "run.yaml"}


@pytest.mark.parametrize("tail", [b"\0" * 700 + b"\n", b"\0" * 700, b'{"step": 4, "lo', b"\xff\xfe\n[1]\n"])
def test_what_a_power_cut_left_of_a_log_is_cut(tail: bytes, tmp_path: Path) -> None:
    """Lines that were written are there as bytes of zero where only the length had reached the disk."""
    folder = RunFolder(tmp_path)
    whole = b"".join(b'{"step": %d, "loss": 0.1234567890123456}\n' % step for step in (1, 2, 3))
    for name in ("log.jsonl", "timing.jsonl"):
        (tmp_path / name).write_bytes(whole + tail)
    assert [entry["step"] for entry in folder.entries()] == [1, 2, 3]
    folder.cut_log(3)
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "timing.jsonl").read_bytes() == whole


def test_logs_are_on_the_disk_before_their_checkpoint(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    flush, rename = flush_file, Path.rename

    def flushed(path: Path) -> None:
        order.append(path.name)
        flush(path)

    def renamed(self: Path, target: Path) -> Path:
        order.append(Path(target).name)
        return rename(self, target)

    monkeypatch.setattr("avatarctl.training.run_folder.flush_file", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    made = typed("train", "v2v", *SHORT, "--data", prepared, "--max-steps", 1, "--out", tmp_path / "run")
    assert made.exit_code == 0, made.output
    assert order[order.index("log.jsonl") :] == ["log.jsonl", "timing.jsonl", "checkpoint-1"]


# --- the whole way -------------------------------------------------------------------------------


def test_the_command_of_the_documentation_prints_one_that_makes_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/training.md, its first line, on the clips that it draws, fewer and smaller; then what it says, to
    the letter, and a voice that is shorter than the built-in one. Resumed, it has its clips."""
    monkeypatch.chdir(tmp_path)
    small = ("--size", "32x32", "--frames", 17, "--batch-size", 1, "--max-steps", 1, *QUICK)
    made = typed("train", "v2v", "--aux", "sync,lpips", *small)
    assert made.exit_code == 0, made.output
    (run,) = (tmp_path / "runs" / "train-v2v-cartoon-v2v").iterdir()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1]
    assert all(entry["sync"] > 0 and entry["lpips"] > 0 for entry in log)
    assert len(list((run / "samples").glob("*/prompt.txt"))) == 8
    (line,) = (line for line in made.stderr.splitlines() if "to use it: " in line)
    program, *words = shlex.split(line.partition("to use it: ")[2])
    assert program == "avatarctl"
    used = typed(*words, "--audio", run / "samples" / "000000" / "audio.wav")
    assert used.exit_code == 0, used.output
    with open_video(Path(used.stdout.strip())) as reader:
        assert (reader.width, reader.height) == (32, 32) and reader.frames == 17
    again = typed("train", "v2v", "--resume", run)
    assert again.exit_code == 0 and "nothing to do: all 1 steps are done" in again.output, again.output
