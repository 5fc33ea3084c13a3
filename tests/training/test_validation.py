"""Validation: what is held out, what is measured, what a run leaves, and that training does not notice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image

from avatarctl.conditioning.masking import mask_tensor, mouth_mask
from avatarctl.data.holdout import held_out, trained_on
from avatarctl.data.samples import Sample
from avatarctl.errors import Interrupted, UnusableAudio, UsageError
from avatarctl.events import Notice
from avatarctl.training import validation as of_validation
from avatarctl.training.best import keep_best
from avatarctl.training.checkpoints import set_aside
from avatarctl.training.validation_scores import best_offset, mouth_box, psnr, sync_curve
from tests.training.running import COMPARED, QUICK, SMALL, bits, typed

Train = Callable[..., Result]
SETTINGS = ("-o", "validation.every=2", "-o", "validation.steps=1", "-o", "validation.samples=2")


def sample(name: str, folder: Path = Path("nowhere")) -> Sample:
    return Sample(name, folder / name, folder / name / "sub_clip.mp4", None, None)


@pytest.fixture(scope="module")
def validated(prepared: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, validated after the second and the last on another folder, with an average; nobody changes
    it."""
    run = tmp_path_factory.mktemp("validated") / "run"
    words = ("train", "v2v", "--data", prepared, *SMALL, *SETTINGS, *QUICK, "--ema", "0.5", "--out", run)
    made = typed(*words, "-o", f"validation.sets={samples}", "-o", "checkpoint.every=1")
    assert made.exit_code == 0, made.output
    assert "validation of step 2: flow" in made.stderr and "validation of step 3: flow" in made.stderr
    return run


def entries(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


def test_clips_are_held_out_whole_and_by_name_alone(tmp_path: Path) -> None:
    """Samples of one source stay together; another order and more samples change no choice."""
    cut = []
    for source in ("a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4", "f.mp4"):
        for start in (0, 8):
            each = sample(f"{source}/{start}", tmp_path)
            each.folder.mkdir(parents=True)
            made = {"source": source, "start": start, "frames": 17, "made": {}}
            (each.folder / "sample.json").write_text(json.dumps(made))
            cut.append(each)
    held = {each.name for each in held_out(cut, 0.4)}
    sources = {name.split("/")[0] for name in held}
    assert held and held == {each.name for each in cut if each.name.split("/")[0] in sources}
    assert {each.name for each in trained_on(cut, 0.4)} == {each.name for each in cut} - held
    more = [*reversed(cut), *(sample(f"other {number}") for number in range(9))]
    assert {each.name for each in held_out(more, 0.4)} & {each.name for each in cut} == held
    assert held_out(cut, 0.0) == () and len(held_out(cut[:4], 1e-9)) == 2
    with pytest.raises(UsageError, match="leave nothing to train on"):
        held_out(cut[:2], 0.5)


def test_training_does_not_notice(validated: Path, prepared: Path, tmp_path: Path) -> None:
    """Weights, moments, average and log of a run without any validation, bit for bit."""
    words = ("--data", prepared, *SMALL, *QUICK, "--ema", "0.5", "-o", "checkpoint.every=1")
    made = typed("train", "v2v", *words, "--out", tmp_path / "run")
    assert made.exit_code == 0, made.output
    assert bits(validated, 3) == bits(tmp_path / "run", 3)
    average = "checkpoint-3/ema_weights.safetensors"
    assert (validated / average).read_bytes() == (tmp_path / "run" / average).read_bytes()
    assert not (tmp_path / "run" / "validation").exists()


def test_a_validation_leaves_what_a_person_looks_at(validated: Path) -> None:
    first, last = entries(validated)
    assert (first["step"], last["step"]) == (2, 3)
    for entry in (first, last):
        assert entry["flow"] > 0 and 0 < entry["psnr"] < 100 and entry["lpips"] > 0
        groups = [clip["group"] for clip in entry["clips"]]
        assert groups == ["recon", "recon", "mixed", "mixed"]
        own = [clip["flow"] for clip in entry["clips"][:2]]
        assert entry["flow"] == pytest.approx(sum(own) / 2) and "flow" not in entry["clips"][2]
    assert first["measured_on"] == last["measured_on"] and first["flow"] != last["flow"]
    folder = validated / "validation" / "step-3"
    assert {path.suffix for path in folder.iterdir()} == {".mp4", ".png"}
    assert len(list(folder.glob("*.mp4"))) == 4
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 800 and sheet.height > 600 and len(sheet.convert("RGB").getcolors(1 << 20)) > 99
    shown = typed("infer", "--model", next(validated.glob("best-flow-*")), "--dry-run", "--json")
    assert shown.exit_code == 0, shown.output


def test_the_best_are_kept_and_are_the_weights_of_their_step(validated: Path) -> None:
    for metric, choose in (("flow", min), ("psnr", max)):
        best = choose(entries(validated), key=lambda entry: entry[metric])
        (folder,) = validated.glob(f"best-{metric}-*")
        state = json.loads((folder / "state.json").read_text())
        assert (state["step"], state["value"]) == (best["step"], best[metric])
        for name in (COMPARED[0], "ema_weights.safetensors"):
            weights = validated / f"checkpoint-{best['step']}" / name
            assert (folder / name).read_bytes() == weights.read_bytes()


def test_only_what_is_better_on_the_same_clips_replaces_the_best(validated: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(validated, tmp_path / "run"))

    def offered(step: int, flow: float, measured_on: str = "these") -> list[str]:
        return keep_best(run, step, {"flow": flow}, measured_on, lambda: pytest.fail("a checkpoint has them"))

    assert offered(2, 5.0) == ["flow"]  # on other clips than the run's own: not compared
    assert offered(3, 6.0) == [] and offered(3, 4.0) == ["flow"] and offered(1, 4.0) == []
    assert [path.name for path in run.glob("best-flow-*")] == ["best-flow-3"]
    resumed = typed("train", "v2v", "--resume", run / "best-flow-3")
    assert resumed.exit_code == 2 and "no state of training" in resumed.output


def test_what_was_best_behind_the_step_that_is_gone_back_to_is_set_aside(
    validated: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(validated, tmp_path / "run"))

    def offered(step: int, flow: float) -> list[str]:
        return keep_best(run, step, {"flow": flow}, "these", lambda: pytest.fail("a checkpoint has them"))

    assert offered(3, -1.0) == ["flow"] and (run / "best-flow-3").is_dir()
    before = {path.name for path in run.glob("best-*")}
    moved = set_aside(run, 2)
    aside = run / "aside-1"
    assert {"checkpoint-3", "best-flow-3"} <= {path.name for path in moved}
    assert (aside / "validation/step-3/sheet.png").is_file() and (run / "validation/step-2").is_dir()
    assert not (run / "validation/step-3").exists() and not list(run.glob("*-3"))
    assert before == {path.name for path in (*run.glob("best-*"), *aside.glob("best-*"))}
    assert offered(2, 5.0) == ["flow"], "nothing is compared with what was set aside"


def test_a_stopped_validation_is_made_when_the_run_goes_on(
    trainer_of: Any, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal within it: nothing of it is left, its step is saved, and going on begins with it."""
    trainer = trainer_of(
        "validation.every=1", f"validation.sets={samples}", "validation.samples=1", "validation.steps=1",
        "validation.metrics=psnr", "train.max_steps=2",
    )  # fmt: skip

    def stopped(*rest: Any, **named: Any) -> None:
        raise Interrupted("stopped by a signal")

    run = trainer.folder.path
    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="after step 1, which is saved"):
        patched.setattr(of_validation, "write_video", stopped)
        trainer.train(lambda: False)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not list((run / "validation").iterdir()) and not (run / "validation.jsonl").exists()
    trainer.train(lambda: False)
    assert [entry["step"] for entry in entries(run)] == [1, 2]
    assert not trainer.validation.is_due(2)  # nothing is validated twice


@pytest.mark.parametrize("where", ["in the last step", "in its validation"])
def test_a_stop_before_the_last_validation_is_said(
    where: str, trainer_of: Any, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(
        "validation.every=1", f"validation.sets={samples}", "validation.samples=1", "train.max_steps=1",
        "validation.metrics=flow",
    )  # fmt: skip
    stopped: list[int] = []

    def in_validation(*rest: Any) -> None:
        stopped.append(1)
        raise Interrupted("stopped by a signal")

    with (
        monkeypatch.context() as patched,
        pytest.raises(Interrupted, match="not the last validation") as told,
    ):
        patched.setattr(trainer.validation, "run", in_validation)
        trainer.train(lambda: where == "in the last step" and trainer.step == 1)
    assert told.value.exit_code == 6 and "--resume auto makes it" in str(told.value)
    assert (trainer.folder.path / "checkpoint-1").is_dir() and bool(stopped) == (where == "in its validation")
    seen: list[int] = []
    monkeypatch.setattr(trainer.validation, "run", lambda step, should_stop: seen.append(step))
    trainer.train(lambda: False)
    assert seen == [1]


def test_it_stops_within_a_sampling_step_and_puts_everything_back(trainer_of: Any, samples: Path) -> None:
    trainer = trainer_of(
        "validation.every=1", f"validation.sets={samples}", "validation.samples=1", "validation.steps=9",
        "validation.metrics=psnr", "train.ema=0.9",
    )  # fmt: skip
    network = trainer.network
    for weight in network._mean.values():
        weight.add_(1)  # an average that differs
    network.dit.train()
    next(network.dit.children()).eval()  # a mixture of modes
    modes = [module.training for module in network.dit.modules()]
    before = {name: tensor.clone() for name, tensor in network.trainables.state().items()}
    means = {name: tensor.clone() for name, tensor in network._mean.items()}
    random = torch.random.get_rng_state()
    calls: list[int] = []
    seen: list[tuple[bool, torch.Tensor]] = []
    forward = network.dit.forward

    def stop() -> bool:
        calls.append(0)
        return len(calls) > 2

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.append((network.dit.training, next(iter(network.trainables.state().values())).clone()))
        return forward(*arguments, **named)

    network.dit.forward = watched
    with pytest.raises(Interrupted):
        trainer.validation.run(1, stop)
    network.dit.forward = forward
    assert len(calls) == 3  # two of the nine steps were made
    name = next(iter(before))
    assert all(not training and torch.equal(weight, means[name]) for training, weight in seen)
    assert [module.training for module in network.dit.modules()] == modes
    assert all(torch.equal(before[name], weight) for name, weight in network.trainables.state().items())
    assert all(torch.equal(means[name], weight) for name, weight in network._mean.items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not list((trainer.folder.path / "validation").iterdir())


def test_judges_of_the_losses_are_not_read_a_second_time(trainer_of: Any, samples: Path) -> None:
    """One that no loss has is, and is gone afterwards."""
    trainer = trainer_of(
        "validation.every=1",
        f"validation.sets={samples}",
        "validation.metrics=sync,lpips",
        "aux.losses=lpips",
    )
    with trainer.validation._aside() as judges:
        assert judges.lpips is trainer.aux.losses.judges.lpips is not None
        assert judges.sync is not None and judges.trepa is None
    assert trainer.aux.losses.judges.lpips is judges.lpips and trainer.aux.losses.judges.sync is None


def test_a_clip_that_fails_is_named_and_ends_nothing(
    trainer_of: Any, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(
        "validation.every=1", f"validation.sets={samples}", "validation.samples=2", "validation.steps=1",
        "validation.metrics=psnr,sync", "data.num_frames=17", data=samples,
    )  # fmt: skip
    survey = of_validation.survey

    def broken(audio: Any) -> Any:
        if "000001" in audio.name:
            raise UnusableAudio("is damaged", where=audio.name)
        return survey(audio)

    monkeypatch.setattr(of_validation, "survey", broken)
    trainer.folder.begin("command: train v2v\nasked: {}\n")
    trainer.validation.run(1, lambda: False)
    (entry,) = entries(trainer.folder.path)
    assert set(entry["failed"]) == {"000001", "000000 with 000001"}
    assert [clip["name"] for clip in entry["clips"]] == ["000000", "000001 with 000000"]
    # Of the two that were made: one window each, and the source's own lips for the one with its own audio.
    own, other = entry["clips"]
    assert entry["sync"] == pytest.approx((own["sync"] + other["sync"]) / 2)
    assert (entry["sync_recon"], entry["sync_mixed"]) == (own["sync"], other["sync"])
    assert 0 < own["sync_truth"] < 1 and own["sync_truth"] != own["sync"] and "sync_truth" not in other
    curves = entry["sync_curves"]
    assert {name: len(curve) for name, curve in curves.items()} == {"recon": 31, "mixed": 31}
    assert curves["mixed"][15] == pytest.approx(other["sync"], abs=1e-6)
    assert abs(entry["sync_offset"]) <= 15
    told = [event.text for event in trainer.events if isinstance(event, Notice) and event.level == "warning"]
    assert any("validation: 000001: " in text and "is damaged" in text for text in told)


def test_the_loss_does_not_depend_on_the_step_and_sees_all_of_the_audio(
    trainer_of: Any, samples: Path
) -> None:
    """An independent sum: the family's own step, with the drops switched off."""
    from avatarctl.family import Draw
    from avatarctl.rng import stable_hash

    words = ("validation.every=1", f"validation.sets={samples}", "validation.samples=1")
    trainer = trainer_of(*words, "train.audio_dropout=1", "train.text_dropout=1")
    plain = trainer_of(*words, "train.audio_dropout=0", "train.text_dropout=0")
    (item, *_) = trainer.validation.items
    trainer.step = 7
    told = trainer.validation.flow(item)
    seed = stable_hash("validation", 42, item.name)
    losses = []
    for turn in range(4):
        condition, timesteps, noise = plain._prepared([item.learnt], [Draw(seed, turn, 0, 1)])
        sigma = timesteps.sigma.view(1, 1, 1, 1, 1)
        noisy = (1 - sigma) * condition.clean + sigma * noise
        noisy = torch.where(condition.fixed_mask, condition.clean, noisy)
        with torch.no_grad():
            velocity = plain.family.training_forward(plain.network.dit, noisy, timesteps.t, condition)
        free = (~condition.fixed_mask).expand_as(noisy)
        error = (velocity - (noise - condition.clean))[free].square().mean()
        losses.append(float(error * timesteps.weight))
    assert told == pytest.approx(sum(losses) / 4, rel=1e-5)


class LoudnessJudge:
    """Embeds a window by the loudness of each frame: of its audio, or painted into its faces."""

    frames = 16

    def lower_faces(self, frames: torch.Tensor) -> torch.Tensor:
        return frames

    def embed_faces(self, faces: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(faces[:, 0, :, 0, 0] - faces[:, 0, :, 0, 0].mean(1, True), dim=1)

    def embed_audio(self, mel: torch.Tensor) -> torch.Tensor:
        columns = mel[:, 0].mean(1)
        frames = torch.stack([columns[:, int(3.2 * k) : int(3.2 * k) + 4].mean(1) for k in range(16)], 1)
        return torch.nn.functional.normalize(frames - frames.mean(1, True), dim=1)


@pytest.mark.parametrize("lag", [-4, 0, 3])
def test_audio_that_lags_by_three_frames_has_offset_minus_three(lag: int) -> None:
    """spec/losses-and-eval.md 6.1. The judge is written here; 40 frames, each as loud as it is bright."""
    made = torch.Generator().manual_seed(3)
    loud = torch.rand(40, generator=made)
    audio = torch.zeros(40 * 640 + 20 * 640)
    for frame, level in enumerate(loud):
        start = (frame + lag) * 640
        if start >= 0:
            audio[start : start + 640] = level * torch.randn(640, generator=made)

    def read(start: int, stop: int) -> torch.Tensor:
        found = torch.zeros(stop - start)
        inside = slice(max(start, 0), min(stop, len(audio)))
        found[inside.start - start : inside.stop - start] = audio[inside]
        return found

    faces = (loud.log()[None, None, :, None, None]).expand(1, 3, 40, 2, 2)
    curve = sync_curve(LoudnessJudge(), faces, read, 8)  # type: ignore[arg-type]
    assert curve.shape == (31,) and best_offset(curve) == -lag


def test_psnr_and_the_box_of_the_mouth() -> None:
    flat = np.full((2, 4, 4, 3), 100, np.uint8)
    other = flat.copy()
    other[1] += 10
    assert psnr(flat, flat) == pytest.approx(100)
    assert psnr(flat, other) == pytest.approx((100 + 10 * np.log10(255**2 / 100)) / 2)
    rows, columns = mouth_box(mask_tensor(mouth_mask()), (512, 512))
    hole = mouth_mask() < 128
    scale = 512 / hole.shape[0]
    assert rows.start == pytest.approx(np.flatnonzero(hole.any(1))[0] * scale, abs=2)
    assert columns.stop == pytest.approx((np.flatnonzero(hole.any(0))[-1] + 1) * scale, abs=2)
    small = mouth_box(mask_tensor(mouth_mask()), (48, 48))
    assert all(side.stop - side.start >= 32 and side.start >= 0 and side.stop <= 48 for side in small)


def test_an_image_model_is_validated_on_a_list_of_pairs(samples: Path, tmp_path: Path) -> None:
    """image@@audio and video@@audio: made, and without a truth; its average is what makes them."""
    Image.new("RGB", (64, 64), (200, 120, 90)).save(tmp_path / "face.png")
    first = samples / "000000"
    (tmp_path / "pairs.txt").write_text(
        f"face.png@@{first / 'audio.wav'}\n{first / 'sub_clip.mp4'}@@{samples / '000001' / 'audio.wav'}\n"
    )
    words = ("--data", samples, *SMALL[:4], *QUICK, "--batch-size", "1", "--max-steps", "1", *SETTINGS)
    made = typed("train", "i2v", *words, "-o", f"validation.sets={tmp_path / 'pairs.txt'}",
                 "-o", "validation.metrics=flow,psnr", "--out", tmp_path / "run")  # fmt: skip
    assert made.exit_code == 0, made.output
    (entry,) = entries(tmp_path / "run")
    assert [clip["group"] for clip in entry["clips"]] == ["mixed", "mixed"]
    assert "flow" not in entry and "failed" not in entry
    assert len(list((tmp_path / "run/validation/step-1").glob("*.mp4"))) == 2


def test_the_held_out_share_is_never_trained_on(prepared: Path, tmp_path: Path) -> None:
    words = ("--data", prepared, *SMALL[:4], *QUICK, "--batch-size", "1", "--max-steps", "1", *SETTINGS)
    made = typed("train", "v2v", *words, "--holdout", "0.3", "--metrics", "flow", "--out", tmp_path / "run")
    assert made.exit_code == 0, made.output
    state = json.loads((tmp_path / "run/checkpoint-1/state.json").read_text())
    (entry,) = entries(tmp_path / "run")
    seen = {clip["name"].split(" with ")[0] for clip in entry["clips"]}
    assert seen and not seen & set(state["samples"]) and len(state["samples"]) < 4


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("validation.every=1",), 2, "there is nothing to validate on"),
        (("validation.every=1", "validation.sets=TMP/EMPTY"), 3, "holds no samples"),
        (("validation.every=1", "validation.sets=nowhere"), 2, "nowhere"),
        (("validation.every=1", "validation.sets=TMP/MUTE"), 3, "no sample could be used"),
        (("validation.every=1", "validation.sets=TMP/BOTH"), 3, "has lines of video@@audio beside others"),
    ],
)
def test_what_cannot_be_validated_on_is_refused_before_a_step(
    words: tuple[str, ...], code: int, said: str, samples: Path, tmp_path: Path
) -> None:
    (tmp_path / "EMPTY").mkdir()
    mute = Path(shutil.copytree(samples / "000000", tmp_path / "MUTE" / "0"))
    (mute / "audio.wav").unlink()
    (tmp_path / "BOTH").write_text("a.mp4@@b.wav\nfolder\n")
    named = [word.replace("TMP", str(tmp_path)) for word in words]
    asked = [each for word in named for each in ("-o", word)]
    made = typed("train", "v2v", "--data", samples, *SMALL, *asked, "--out", tmp_path / "run", "--dry-run")
    assert made.exit_code == code and said in made.output, made.output
    assert "Traceback" not in made.output and not (tmp_path / "run").exists()


def test_a_judge_that_is_not_here_costs_its_number_and_a_line(tmp_path: Path) -> None:
    from avatarctl.registry import configure, find_model

    events: list[Any] = []
    cfg = configure("model.name=omniavatar-1.3b", f"model.weights_root={tmp_path}")
    row = find_model("omniavatar-1.3b")
    assert of_validation._judges_here(cfg, row, events.append) == ()
    told = [event.text for event in events if event.level == "warning"]
    assert [text.split(":")[0] for text in told] == [
        "validation goes without sync",
        "validation goes without lpips",
    ]
    cfg = configure("model.name=omniavatar-1.3b", "validation.metrics=flow,psnr")
    assert of_validation._judges_here(cfg, row, events.append) == () and len(events) == 2
