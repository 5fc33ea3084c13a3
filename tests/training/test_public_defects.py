"""What is wrong with the one public trainer, row by row (spec/omniavatar.md j), and where ours is tried.

`TESTS` is the list: every row that concerns training, and where it is tried. The tests in this file go from
files through the data set and a step of the trainer itself.
"""

from __future__ import annotations

import ast
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Wav2Vec2Config

import avatarctl.data.training_set as training_set
from avatarctl.conditioning.masking import keep_map, mask_tensor, mouth_mask
from avatarctl.config import read_config
from avatarctl.data.training_set import TrainingSample
from avatarctl.loading.judges import LossName
from avatarctl.media import open_video
from avatarctl.models.encode import frames_tensor
from avatarctl.models.vae import WanVae
from avatarctl.models.wav2vec import FrameWav2Vec2
from avatarctl.training.aux_losses import AuxLosses
from avatarctl.training.aux_step import AuxBatch, AuxResult, AuxStep
from avatarctl.training.objective import flow_step, noisy_latents
from avatarctl.training.trainer import Trainer
from tests.training.running import ADAPTED, QUICK, bits, made_trainer, typed

ROOT = Path(__file__).parents[2]
HERE, STEPS, OBJECTIVE = "test_public_defects.py", "test_steps.py", "test_objective.py"
AUX, RUNS, WEIGHTS = "test_aux_losses.py", "test_runs.py", "test_trainables.py"
TURNS, SAME = "test_order_and_rate.py", "test_same_channels.py"

TESTS: dict[int, tuple[str, ...]] = {
    1: (f"{STEPS}::test_micro_batches_are_one_batch",),
    2: (f"{HERE}::test_row_2_the_sync_loss_knows_right_from_shifted_and_silent_audio",
        f"{HERE}::test_row_2_silent_audio_is_refused_before_the_first_step"),
    3: (f"{AUX}::test_the_mean_cosine_stands_beside_the_sync_loss",
        f"{HERE}::test_row_3_a_judge_that_fails_ends_the_run"),
    4: (f"{HERE}::test_row_4_a_prefix_is_clean_marked_and_costs_nothing",
        f"{SAME}::test_a_clip_of_a_video"),
    5: (f"{HERE}::test_row_5_the_hole_is_grey", f"{RUNS}::test_prepared_and_live_samples_train_alike"),
    6: (f"{HERE}::test_row_6_adapters_move_at_1e_4",
        f"{WEIGHTS}::test_a_bfloat16_base_is_trained_in_float32_and_adapters_move_at_1e_4"),
    7: (f"{HERE}::test_row_7_noise_loss_and_clean_estimate_have_one_sigma",
        f"{OBJECTIVE}::test_timestep_keeps_its_exact_value_and_id"),
    8: (f"{HERE}::test_rows_8_and_9_a_batch_is_its_samples",),
    9: (f"{HERE}::test_rows_8_and_9_a_batch_is_its_samples",),
    19: ("test_starts.py::test_a_plain_base_keeps_its_tensors_and_gets_small_audio_layers",),
    18: ("test_starts.py::test_row_18_nothing_is_drawn_that_a_file_holds",
         "../loading/test_fill.py::test_live_bytes_stay_at_the_size_of_the_network"),
    23: (f"{RUNS}::test_a_run_leaves_what_a_person_looks_for",),
    25: (f"{HERE}::test_rows_25_and_26_what_was_asked_for_is_trained",),
    26: (f"{HERE}::test_rows_25_and_26_what_was_asked_for_is_trained",),
    29: (f"{STEPS}::test_a_sample_that_goes_bad_is_replaced_by_the_next",
         f"{RUNS}::test_bad_samples_are_named_and_the_others_train"),
    30: (f"{HERE}::test_row_30_nothing_is_read_that_no_loss_needs",),
    31: (f"{HERE}::test_row_31_features_of_another_recording_are_not_taken",),
    34: (f"{RUNS}::test_killed_at_any_moment_it_goes_on_to_the_same_bits",
         "../data/test_killed.py::test_killed_in_the_middle_and_typed_again"),
    37: (f"{HERE}::test_row_37_the_error_is_logged_before_any_weight",
         f"{RUNS}::test_a_run_that_was_resumed_twice_ends_as_one_that_was_not"),
    38: (f"{HERE}::test_row_38_an_image_model_resumes_to_the_bit",
         f"{RUNS}::test_the_newest_are_kept_by_number"),
    39: (f"{SAME}::test_a_clip_of_a_video",),
    40: (f"{TURNS}::test_order_needs_no_memory", f"{HERE}::test_row_40_no_number_is_drawn_in_secret"),
    42: (f"{AUX}::test_a_batch_is_its_samples",
         f"{AUX}::test_a_window_has_the_frames_and_the_audio_of_its_place",
         "../models/test_vae_gradient.py::test_checkpointing_keeps_less"),
}  # fmt: skip
"""Row -> tests. The others are of inference, of preparation (tests/data) and of several processes."""

Trainers = Callable[..., Trainer]
NO_DROPOUT = ("train.text_dropout=0", "train.audio_dropout=0", "train.prefix_dropout=0")
SYNC = ("data.num_frames=17", "aux.losses=sync", "train.batch_size=1")


@functools.cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("row", "test"), [(row, test) for row, tests in TESTS.items() for test in tests])
def test_every_row_has_its_test(row: int, test: str) -> None:
    file, name = test.split("::")
    assert name in functions_of(file)
    page = ROOT.joinpath("docs", "spec", "omniavatar.md").read_text(encoding="utf-8")
    assert f"\n| {row} | " in page.partition("\n## j ")[2]
    assert f"\n| {row} | " in ROOT.joinpath("docs", "training.md").read_text(encoding="utf-8")


@pytest.fixture
def spoken(samples: Path, tmp_path: Path) -> Path:
    """One of the samples, of 17 frames, to be changed."""
    return Path(shutil.copytree(samples / "000001", tmp_path / "spoken/000001")).parent


def batch_of(trainer: Trainer, places: Any = None) -> list[TrainingSample]:
    read = list(trainer.data.read(range(len(trainer.data.names)) if places is None else places))
    assert all(isinstance(sample, TrainingSample) for sample in read)
    return read  # type: ignore[return-value]


def gradients(trainer: Trainer) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in trainer.network.trainables.parameters.items()}


# --- rows 2 and 3: losses that judge frames ------------------------------------------------------


@pytest.fixture(scope="module")
def judged(
    samples: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trainer, AuxStep, list[TrainingSample]]:
    """A trainer whose loss is that of all judges alone, those, and one sample of 17 frames; no test steps."""
    place = tmp_path_factory.mktemp("judged")
    data = Path(shutil.copytree(samples / "000001", place / "data/000001")).parent
    words = ("data.num_frames=17", "aux.losses=sync,lpips,trepa", "train.batch_size=1", "aux.recon_weight=0")
    trainer = made_trainer(place / "run", data, *words)
    assert trainer.aux is not None
    return trainer, trainer.aux, batch_of(trainer)


def alone(name: LossName, aux: AuxStep) -> AuxStep:
    return AuxStep(AuxLosses((name,), aux.losses.judges, aux.losses.settings), aux._vae)


def test_row_2_the_sync_loss_knows_right_from_shifted_and_silent_audio(
    judged: tuple[Trainer, AuxStep, list[TrainingSample]], samples: Path
) -> None:
    """The trainer's own step; the public one slices a list, and all of its windows are silent."""
    trainer, every, (sample,) = judged
    wave, _ = soundfile.read(samples / "000001/audio.wav", dtype="float32")
    assert sample.waveform is not None
    assert torch.equal(sample.waveform, torch.from_numpy(wave[: 17 * 640]))
    aux, given = alone("sync", every), list[AuxBatch]()

    def noting(batch: AuxBatch) -> AuxResult:
        given.append(batch)
        return aux(batch)

    trainer.aux = noting  # type: ignore[assignment]
    found = [trainer.accumulate([sample])["sync"]]
    for audio in (torch.roll(sample.waveform, 4 * 640), torch.zeros_like(sample.waveform)):
        with torch.no_grad():
            found.append(float(aux(replace(given[0], waveform=audio[None])).losses["sync"]))
    assert min(abs(a - b) for a in found for b in found if a is not b) > 1e-4, found


def test_row_2_silent_audio_is_refused_before_the_first_step(spoken: Path, tmp_path: Path) -> None:
    soundfile.write(spoken / "000001/audio.wav", np.zeros(17 * 640, np.float32), 16_000)
    line = ("train", "v2v", "--data", spoken, "--size", "32x32", "--frames", "17", "--batch-size", "1")
    made = typed(*line, "--max-steps", "1", "--aux", "sync", "--out", tmp_path / "run")
    assert made.exit_code == 3 and "is silent, and the sync loss needs speech" in made.output, made.output
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_row_3_a_judge_that_fails_ends_the_run(
    judged: tuple[Trainer, AuxStep, list[TrainingSample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, aux, _ = judged
    trainer.aux = alone("sync", aux)

    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("judge")

    monkeypatch.setattr(type(aux.losses.judges.sync), "forward", broken)
    with pytest.raises(RuntimeError, match="judge"):
        trainer.train(lambda: False)
    assert not (trainer.folder.path / "log.jsonl").exists()


def test_each_auxiliary_loss_alone_moves_what_is_trained_and_nothing_else(
    judged: tuple[Trainer, AuxStep, list[TrainingSample]],
) -> None:
    trainer, aux, batch = judged
    judges = aux.losses.judges
    assert not any(judge is None or judge.training for judge in (judges.sync, judges.lpips, judges.trepa))
    frozen = (judges.sync, judges.lpips, judges.trepa, aux._vae)
    for name in aux.losses.names:
        trainer._optimizer.drop_gradients()
        trainer.aux = alone(name, aux)
        totals = trainer.accumulate(batch)
        assert {name, "flow", "mse", "loss", "clipped"} <= totals.keys()
        weight = getattr(trainer.cfg.aux, f"{name}_weight")
        assert totals["loss"] == pytest.approx(weight * totals[name], rel=1e-5)
        moved = [gradient for gradient in gradients(trainer).values() if gradient is not None]
        assert len(moved) == len(trainer.network.trainables.parameters)
        assert sum(float(gradient.abs().sum()) for gradient in moved) > 0
        for network in frozen:
            assert network is not None
            assert all(each.grad is None and not each.requires_grad for each in network.parameters())


def test_a_loss_without_weight_is_not_even_loaded(trainer_of: Trainers, spoken: Path) -> None:
    trainer = trainer_of(*SYNC, "aux.losses=sync,lpips", "aux.sync_weight=0", data=spoken)
    assert trainer.aux is not None and trainer.aux.losses.names == ("lpips",)
    assert trainer.aux.losses.judges.sync is None
    (sample,) = batch_of(trainer)
    assert sample.waveform is None


# --- rows 4 to 9: the step -----------------------------------------------------------------------


def prepared_step(trainer: Trainer, samples: list[TrainingSample]) -> tuple[Any, Any, Tensor, Tensor]:
    draws = trainer._order.draws(0)[: len(samples)]
    condition, timesteps, noise = trainer._prepared(samples, draws)
    return condition, timesteps, noise, noisy_latents(condition, noise, timesteps)


def test_row_4_a_prefix_is_clean_marked_and_costs_nothing(
    trainer_of: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train.prefix_frames=5", "data.mask_rule=first_keep", "train.timestep_weight=none")
    trainer = trainer_of(*NO_DROPOUT, *words, "train.batch_size=4")
    samples = batch_of(trainer)
    condition, _, noise, noisy = prepared_step(trainer, samples)
    clean = torch.stack([sample.tensors["latents"] for sample in samples])
    assert torch.equal(noisy[:, :, :2], clean[:, :, :2]) and not torch.equal(noisy[:, :, 2:], clean[:, :, 2:])
    assert condition.channels[:, 16, :2].abs().max() == 0 < condition.channels[:, 16, 2].abs().max()
    # A network that is right but for the prefix has no error.
    target = noise - clean
    target[:, :, :2] += 100

    class Right(nn.Module):
        def forward(self, *_: Any, **__: Any) -> Tensor:
            return target + 0 * next(iter(trainer.network.trainables.parameters.values())).sum()

    trainer.network.dit = Right()
    assert trainer.accumulate(samples)["loss"] == pytest.approx(0, abs=1e-10)


def test_row_5_the_hole_is_grey(
    trainer_of: Trainers, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the VAE is given while training encodes: 0, the middle of [-1, 1], as inference erases."""
    seen: list[Tensor] = []
    encode = WanVae.encode

    def noting(self: WanVae, video: Tensor) -> Tensor:
        seen.append(video.clone())
        return encode(self, video)

    monkeypatch.setattr(WanVae, "encode", noting)
    data = Path(shutil.copytree(samples / "000000", tmp_path / "data/000000")).parent
    trainer = trainer_of("train.batch_size=1", "data.width=64", "data.height=64", data=data)
    batch_of(trainer)
    with open_video(data / "000000/sub_clip.mp4") as reader:
        video = frames_tensor(reader.read(0, 9))
    keep = keep_map(mask_tensor(mouth_mask()), (64, 64)).bool().expand_as(video[:, :, 0])
    (masked,) = (each for each in seen if each.shape == video.shape and not torch.equal(each, video))
    for frame in range(9):
        assert (masked[:, :, frame][~keep] == 0).all()
        assert torch.equal(masked[:, :, frame][keep], video[:, :, frame][keep])


def test_row_6_adapters_move_at_1e_4(
    trainer_of: Trainers, spoken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a base that computes in bfloat16, whose frozen weights get no gradient."""
    lora = ("train.mode=lora", "train.lora_rank=4", "runtime.dtype=bfloat16", "train.learning_rate=1e-4")
    trainer = trainer_of(*lora, "train.batch_size=1", "train.max_steps=4", model="cartoon-i2v", data=spoken)
    trained = trainer.network.trainables
    assert {parameter.dtype for parameter in trained.parameters.values()} == {torch.float32}
    own = {id(parameter) for parameter in trained.parameters.values()}
    before = {name: tensor.clone() for name, tensor in trained.state().items()}
    trainer.accumulate(batch_of(trainer, [0]))
    for name, parameter in trainer.network.dit.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in own), name
    frozen = trainer.network.dit.blocks[0].attn1.to_q.base_layer.weight
    assert frozen.dtype == torch.bfloat16
    trainer._optimizer.drop_gradients()
    draws = trainer._order.draws(0)  # the same in every step, so that what moves moves on
    monkeypatch.setattr(trainer._order, "draws", lambda step: draws)
    trainer.train(lambda: False)
    for name in ("blocks.1.self_attn.v.lora_A.weight", "audio_proj.proj.weight"):
        large = before[name].abs() > 0.05
        moved = (trained.state()[name] - before[name]).abs()[large]
        assert len(moved) > 10 and float((moved > 2e-4).float().mean()) > 0.5, name


def test_row_7_noise_loss_and_clean_estimate_have_one_sigma(trainer_of: Trainers) -> None:
    """Of the drawn id, in float32, for 40 steps of four samples; the public step has two that disagree."""
    trainer = trainer_of("train.batch_size=4", *NO_DROPOUT)
    samples = batch_of(trainer)
    ids = set()
    for step in range(40):
        draws = trainer._order.draws(step)
        condition, timesteps, noise = trainer._prepared(samples, draws)
        noisy = noisy_latents(condition, noise, timesteps)
        s = 1 - timesteps.id.double() / 1000
        sigma = 5 * s / (1 + 4 * s)  # spec/omniavatar.md e
        torch.testing.assert_close(timesteps.sigma.double(), sigma, atol=1e-6, rtol=0)
        torch.testing.assert_close(timesteps.t.double(), 1000 * sigma, atol=1e-3, rtol=0)
        velocity = (noise - condition.clean).double()
        implied = noisy.double() - sigma.view(-1, 1, 1, 1, 1) * velocity
        free = ~condition.fixed_mask.expand_as(implied)
        torch.testing.assert_close(implied[free], condition.clean.double()[free], atol=2e-5, rtol=0)
        ids |= set(timesteps.id.tolist())
    assert len(ids) > 140  # of 160: bfloat16 would leave 294 of 1000 at most, and collapse neighbours


def test_rows_8_and_9_a_batch_is_its_samples(trainer_of: Trainers, prepared: Path, tmp_path: Path) -> None:
    """Four clips with prompts of four lengths in one batch and alone: the public network mixes the samples
    of a batch (66 % error at two), and cuts all prompts at the shortest."""
    data = Path(shutil.copytree(prepared, tmp_path / "data"))
    for number, prompt in enumerate(("a", "a person", "a person is talking", "someone talks and talks")):
        (data / f"00000{number}/prompt.txt").write_text(prompt)
    whole = trainer_of("train.batch_size=4", *NO_DROPOUT, data=data)
    samples = batch_of(whole)
    assert len({len(sample.tensors["text"]) for sample in samples}) == 4
    condition, *_ = prepared_step(whole, samples)
    for sample, row in zip(samples, condition.text["prompt"], strict=True):
        assert torch.equal(row[: len(sample.tensors["text"])], sample.tensors["text"])
    together = whole.accumulate(samples)["loss"]
    draws = whole._order.draws(0)
    alone = []
    for sample, draw in zip(samples, draws, strict=True):
        condition, timesteps, noise = whole._prepared([sample], [draw])
        step = flow_step(whole.family, whole.network.dit, condition, timesteps, noise, whole.cfg)
        alone.append(float(step.loss.detach()))
    assert together == pytest.approx(sum(alone) / 4, rel=1e-5)
    assert max(alone) > 1.2 * min(alone)  # or they would say nothing


# --- rows 26 to 42: files, logs, turns -----------------------------------------------------------


def test_rows_25_and_26_what_was_asked_for_is_trained(prepared: Path, tmp_path: Path) -> None:
    """The public trainer takes a value of its file only where it has no default of its own; typed, 1e-4 is 0
    to it, and a comma ends a value."""
    (tmp_path / "c.yaml").write_text("train:\n  learning_rate: 3.0e-5\n")
    line = ("train", "v2v", "--config", tmp_path / "c.yaml", "--data", prepared, "--size", "32x32", *QUICK)
    line += ("-o", "train.weight_decay=1e-4", "-o", "train.prefix_frames=1,5", "--out", tmp_path / "run")
    made = typed(*line, "--frames", "9", "--max-steps", "1", "--batch-size", "1")
    assert made.exit_code == 0, made.output
    assert json.loads((tmp_path / "run/log.jsonl").read_text())["learning_rate"] == 3e-5
    settings = read_config(tmp_path / "run/run.yaml").settings
    assert settings["train.weight_decay"].value == 1e-4 and settings["train.prefix_frames"].value == (1, 5)


def test_row_30_nothing_is_read_that_no_loss_needs(
    trainer_of: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a sync loss no audio is opened, and one text is read once."""
    trainer = trainer_of("train.batch_size=4", "train.max_steps=1")
    read: list[str] = []
    real = training_set._read
    monkeypatch.setattr(training_set, "open_audio", lambda path: pytest.fail(f"{path} was opened"))
    monkeypatch.setattr(training_set, "_read", lambda path, entry: read.append(entry) or real(path, entry))
    trainer.train(lambda: False)
    assert sorted(set(read)) == ["audio_features", "latents", "masked_latents"] and len(read) == 12


def test_row_31_features_of_another_recording_are_not_taken(
    trainer_of: Trainers, prepared: Path, tmp_path: Path
) -> None:
    """Artifacts belong to the contents of a file, not to its name."""
    data = Path(shutil.copytree(prepared, tmp_path / "data"))
    shutil.copyfile(data / "000002/audio.wav", data / "000001/audio.wav")
    trainer = trainer_of("train.batch_size=1", data=data)
    assert trainer.data.lacking == {"audio_features": 1}
    samples = batch_of(trainer)
    assert torch.equal(samples[1].tensors["audio_features"], samples[2].tensors["audio_features"])
    assert not torch.equal(samples[0].tensors["audio_features"], samples[1].tensors["audio_features"])


def test_row_37_the_error_is_logged_before_any_weight(trainer_of: Trainers) -> None:
    words = ("train.mouth_weight=3", "train.batch_size=4", "train.prefix_frames=0", *NO_DROPOUT)
    weighted = trainer_of(*words)
    samples = batch_of(weighted)
    plain = trainer_of(*words, "train.mouth_weight=1", "train.timestep_weight=none").accumulate(samples)
    totals = weighted.accumulate(samples)
    assert totals["mse"] == pytest.approx(plain["loss"], rel=1e-6) and plain["mse"] == plain["loss"]
    assert totals["loss"] != pytest.approx(totals["mse"], rel=1e-2)


def test_row_38_an_image_model_resumes_to_the_bit(adapted: Path, samples: Path, tmp_path: Path) -> None:
    """An adapter with an average, its samples encoded on the way; the public image trainer cannot resume."""
    resumed = Path(shutil.copytree(adapted, tmp_path / "resumed"))
    shutil.rmtree(resumed / "checkpoint-2")
    made = typed("train", "i2v", *ADAPTED, "--data", samples, "--out", resumed, "--resume", "auto")
    assert made.exit_code == 0 and "resumed behind step 1" in made.output, made.output
    assert bits(adapted, 2) == bits(resumed, 2)
    averages = [run / "checkpoint-2/ema_weights.safetensors" for run in (adapted, resumed)]
    assert averages[0].read_bytes() == averages[1].read_bytes()
    held = load_file(averages[0])
    assert held.keys() == load_file(averages[0].parent / "trainable_weights.safetensors").keys()


def test_row_40_no_number_is_drawn_in_secret(trainer_of: Trainers) -> None:
    """Of a generator that all share: another number of readers or a resumed run would shift it."""
    trainer = trainer_of("train.batch_size=2", "train.max_steps=2")
    torch.manual_seed(17)
    np.random.seed(17)
    import random

    random.seed(17)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    trainer.train(lambda: False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_the_audio_encoder_is_float32_under_autocast() -> None:
    """spec/omniavatar.md b; a step computes in bfloat16 around it where samples are encoded on the way."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=[8] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    encoder = FrameWav2Vec2(config).eval()
    wave = torch.randn(1, 9 * 640)

    def made() -> list[Tensor]:
        moments = encoder.recording_moments(lambda start, stop: wave[:, start:stop], 9 * 640, 2000)
        return [encoder.features(wave, 9), encoder.features(wave, 9, moments), encoder.tokens(wave)]

    plain = made()
    with torch.autocast("cpu", torch.bfloat16):
        under = made()
    assert all(torch.equal(*pair) for pair in zip(plain, under, strict=True))
