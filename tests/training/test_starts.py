"""Starts from published weights: a plain base, a released adapter, a run of our own; small files of the
published layouts, written without the product (tests/pipelines/tiny_release.py)."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from avatarctl.cli import app
from avatarctl.config import RunConfig
from avatarctl.data.artifacts import made_by
from avatarctl.errors import UnusableWeights, UsageError
from avatarctl.events import Event
from avatarctl.families import family_named
from avatarctl.loading.model_row import row_named
from avatarctl.loading.sources import find_sources
from avatarctl.registry import Row, based_on, configure
from avatarctl.training.start import Start, StartPlan, plan_start, start_network
from avatarctl.training.trainables import make_trainable
from avatarctl.weights.layouts import OMNIAVATAR
from tests.pipelines import assembled_by_hand as by_hand
from tests.pipelines import tiny_release as tiny
from tests.training.running import QUICK

RANK = ("--lora-rank", "4", "-o", "train.lora_alpha=2")
ONE = ("--size", "32x32", "--frames", "9", "--max-steps", "1", "--batch-size", "1")
BASE, ADAPTED = "wan2.1-t2v-1.3b", "omniavatar-1.3b"


class Published:
    """A release of the smaller model on the disk, and the tensors in it."""

    def __init__(self, root: Path) -> None:
        self.root, self.release = root, tiny.tiny_release()
        self.release.write(root, "1.3B")

    def configured(self, model: str, *settings: str) -> tuple[Row, RunConfig]:
        row = based_on(model) or row_named(model)
        if not row.path:  # as wide as the tensors here
            network = {"audio_input_dim": tiny.TINY.audio_width, "audio_hidden_size": tiny.TINY.audio_hidden}
            row = replace(row, network={"dit": {**row.network["dit"], **network}})
        cfg = configure(
            f"model.name={model}", f"model.weights_root={self.root}", "train.lora_rank=4",
            "train.lora_alpha=2", *settings, row_named=lambda name: row,
        )  # fmt: skip
        return row, cfg

    def plan(self, model: str, *settings: str) -> StartPlan:
        events: list[Event] = []
        row, cfg = self.configured(model, *settings)
        return plan_start(row, find_sources(row, cfg.model), cfg, events.append)

    def start(self, model: str, *settings: str) -> tuple[Start, RunConfig]:
        _, cfg = self.configured(model, *settings)
        plan = self.plan(model, *settings)
        return start_network(plan, cfg, torch.float32, torch.device("cpu"), lambda event: None), cfg


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return Published(tmp_path_factory.mktemp("release") / "weights")


def original(start: Start) -> dict[str, torch.Tensor]:
    return OMNIAVATAR.key_map.rename_to_original(start.dit.state_dict())


def ran(*words: object) -> Result:
    return CliRunner().invoke(app, list(map(str, words)), prog_name="avatarctl")


def test_a_plain_base_keeps_its_tensors_and_gets_small_audio_layers(published: Published) -> None:
    """spec/omniavatar.md g.4: Xavier's uniform distribution with gain 0.05; new input channels zero."""
    start, _ = published.start(BASE, "model.channels=49")
    state, base = original(start), published.release.base
    for name in base.keys() - {"patch_embedding.weight"}:
        assert torch.equal(state[name], base[name]), name
    patch = state["patch_embedding.weight"]
    assert patch.shape == (48, 49, 1, 2, 2) and not patch[:, 16:].any()
    assert torch.equal(patch[:, :16], base["patch_embedding.weight"])
    audio = state["audio_proj.proj.weight"]
    inputs, outputs = 4 * tiny.TINY.audio_width, tiny.TINY.audio_hidden
    bound = 0.05 * math.sqrt(6 / (inputs + outputs))
    assert audio.shape == (outputs, inputs) and bound * 0.95 < audio.abs().max() <= bound
    assert audio.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert state["audio_proj.norm_out.weight"].eq(1).all() and not state["audio_proj.proj.bias"].any()
    assert start.base["model"] == ADAPTED and not start.pairs


def test_it_is_drawn_from_the_seed(published: Published) -> None:
    states = [original(published.start(BASE, f"runtime.seed={seed}")[0]) for seed in (1, 1, 2)]
    name = "audio_cond_projs.1.weight"
    assert torch.equal(states[0][name], states[1][name]) and not torch.equal(states[0][name], states[2][name])


def test_published_is_what_the_public_trainer_does(published: Published) -> None:
    """Every vector zero, norms included, so that audio starts as nothing; new channels of the base drawn."""
    start, _ = published.start(BASE, "model.channels=49", "train.init=published")
    state = original(start)
    assert not state["audio_proj.norm_out.weight"].any() and not state["audio_proj.norm_out.bias"].any()
    new = state["patch_embedding.weight"][:, 16:]
    bound = 0.05 * math.sqrt(6 / (49 * 4 + 48 * 4))
    assert bound * 0.95 < new.abs().max() <= bound
    old = state["patch_embedding.weight"][:, :16]
    assert torch.equal(old, published.release.base["patch_embedding.weight"])


@pytest.mark.parametrize("init", ["zero_channels", "published"])
def test_a_released_adapter_is_trained_on_and_widened(init: str, published: Published) -> None:
    """The network before its first step is the released one; channels that are new have no effect yet."""
    settings = ("model.channels=49", f"train.init={init}", "train.lora_alpha=8")  # its own is 2
    start, cfg = published.start(ADAPTED, *settings)
    trainables = make_trainable(start.dit, start.layout, cfg.train, 0)
    trainables.load({**trainables.state(), **start.pairs})
    torch.manual_seed(0)
    x, text = torch.randn(1, 33, 2, 4, 4), torch.randn(1, 512, tiny.TINY.text_width)
    audio, t = torch.randn(1, 5, tiny.TINY.audio_width), torch.tensor([700.0])
    wide = torch.cat([x, torch.randn(1, 16, 2, 4, 4)], dim=1)
    expected = by_hand.transformer(by_hand.merged(published.release))(x, t, text, audio)
    made = start.dit(wide, t, text, audio)
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=1e-4)
    assert trainables.count == published.plan(ADAPTED, *settings).trained(cfg.train)


def test_in_full_mode_it_is_merged(published: Published) -> None:
    start, cfg = published.start(ADAPTED, "train.mode=full")
    expected = by_hand.merged(published.release)
    state = original(start)
    assert state.keys() == expected.keys() and not start.pairs
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-5)
    count = published.plan(ADAPTED, "train.mode=full").trained(cfg.train)
    assert count == sum(tensor.numel() for tensor in expected.values())


def test_row_18_nothing_is_drawn_that_a_file_holds(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The public trainer draws 14 billion numbers, which its files then replace (spec/omniavatar.md j 18)."""
    drawn: list[tuple[int, ...]] = []
    for name in ("uniform_", "normal_"):
        real = getattr(torch.Tensor, name)

        def noting(self: torch.Tensor, *words: Any, real: Any = real, **more: Any) -> torch.Tensor:
            if self.device.type != "meta":
                drawn.append(tuple(self.shape))
            return real(self, *words, **more)  # type: ignore[no-any-return]

        monkeypatch.setattr(torch.Tensor, name, noting)
    start, _ = published.start(BASE)
    state, base = original(start), published.release.base
    lacking = [name for name in state if name not in base and state[name].dim() > 1]
    assert lacking and sorted(drawn) == sorted(tuple(state[name].shape) for name in lacking)


def test_what_no_start_comes_of(published: Published, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the adapter has rank 4, and rank 8 was asked for.*--lora-rank 4"):
        published.plan(ADAPTED, "train.lora_rank=8")
    with pytest.raises(UsageError, match=r"changes blocks.0.\w+.k, which train.lora_targets does not name"):
        published.plan(ADAPTED, "train.lora_targets=q,v")
    with pytest.raises(UsageError, match="nothing that an adapter could change"):
        published.plan(ADAPTED, "train.init=random")
    image = tmp_path / "image"
    image.mkdir()
    save_file(published.release.base, image / "diffusion_pytorch_model.safetensors")
    tiny.write_json(image / "config.json", {**tiny.base_config(tiny.TINY), "model_type": "i2v"})
    with pytest.raises(UnusableWeights, match="starts from no text-to-video model like it"):
        published.plan(BASE, f"model.weights.dit={image}")


def test_a_released_adapter_dubs_after_a_step(published: Published, samples: Path, tmp_path: Path) -> None:
    """v2v has offset 0 whatever it starts from; the folder says what `infer` needs, and is a start itself."""
    root, run = ("--weights-root", published.root), tmp_path / "run"
    words = ("train", "v2v", "--channels", "49", "--data", samples, *ONE, *QUICK, *RANK, *root)
    made = ran(*words, "--model", ADAPTED, "--out", run)
    assert made.exit_code == 0, made.output
    assert "audio offset 0: audio frame k drives frame k of a video; the weights had 1" in made.output
    assert "its 60 LoRA targets are trained on" in made.output
    assert "16 new input channels beside 33, zero" in made.output
    file = run / "checkpoint-1" / "trainable_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["avatarctl.base"])["model"] == ADAPTED
    assert json.loads(metadata["avatarctl.conventions"])["audio_offset"] == 0
    assert json.loads(metadata["avatarctl.data"])["mask_rule"] == "all"
    planned = ran("infer", "--model", run, *root, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert (plan["audio_offset"], plan["missing_weights"], plan["width"]) == (0, [], 32)
    assert "was not trained for size" not in planned.stderr
    few = ("--steps", "1", "--guidance", "1", "-o", "long_video.num_frames=9", "-o",
           "long_video.overlap_frames=1")  # fmt: skip
    clip = ("--video", samples / "000000" / "sub_clip.mp4", "--audio", samples / "000000" / "audio.wav")
    shown = ran("infer", "--model", run, *root, *few, *clip, "--out", tmp_path / "dubbed.mp4")
    assert shown.exit_code == 0, shown.output
    assert "60 targets at scale 0.5" in shown.output

    again = ran(*words, "--model", run, "--out", tmp_path / "again", "-o", "train.learning_rate=1e-9")
    assert again.exit_code == 0, again.output
    other = tmp_path / "again" / "checkpoint-1" / file.name
    before, after = load_file(file), load_file(other)
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], before[name], atol=1e-7) for name in before)
    with safe_open(other, "pt") as opened:
        assert json.loads(opened.metadata()["avatarctl.base"])["model"] == ADAPTED


def test_a_run_of_a_built_in_model_is_a_start(adapted: Path, samples: Path, tmp_path: Path) -> None:
    """The average of its adapter is trained on, and widened. The run goes on by its name alone, wherever it
    was moved."""
    words = ("--data", samples, *ONE, *QUICK, "-o", "train.learning_rate=1e-9", "--mode", "lora")
    wider = ("--lora-rank", "2", "--model", adapted, "--channels", "49")
    second = ran("train", "v2v", *words, *wider, "--out", tmp_path / "two")
    assert second.exit_code == 0, second.output
    one = load_file(adapted / "checkpoint-2" / "ema_weights.safetensors")
    two = load_file(tmp_path / "two" / "checkpoint-1" / "trainable_weights.safetensors")
    patch = "patch_embedding.weight"
    assert two[patch].shape[1] == 49 and torch.allclose(two[patch][:, :33], one[patch], atol=1e-7)
    assert all(torch.allclose(two[name], one[name], atol=1e-7) for name in one.keys() - {patch})
    clip = ("--video", samples / "000000" / "sub_clip.mp4", "--audio", samples / "000000" / "audio.wav")
    talks = ran("infer", "--model", tmp_path / "two", *clip, "--dry-run")
    assert talks.exit_code == 0 and "60 targets" in talks.stderr, talks.output
    (tmp_path / "two").rename(tmp_path / "moved")
    plan = ran("train", "v2v", "--resume", tmp_path / "moved", "--dry-run", "--json")
    assert plan.exit_code == 0, plan.output
    told = json.loads(plan.stdout)
    assert (told["channels"], told["steps"], told["folder"]) == (49, 1, str(tmp_path / "moved"))


def test_a_run_that_began_from_nothing_is_gone_on_from(prepared: Path, tmp_path: Path) -> None:
    """It drew random weights; what starts from it takes those that it came to."""
    run = tmp_path / "run"
    made = ran("train", "v2v", "--data", prepared, *ONE, *QUICK, "--out", run, "-o", "train.init=random")
    assert made.exit_code == 0 and "random weights from seed 42" in made.output, made.output
    row = row_named(str(run))
    cfg = configure(f"model.name={run}", row_named=row_named)
    plan = plan_start(row, find_sources(row, cfg.model), cfg, lambda event: None)
    start = start_network(plan, cfg, torch.float32, torch.device("cpu"), lambda event: None)
    state, stored = original(start), load_file(run / "checkpoint-1" / "trainable_weights.safetensors")
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert start.base == {"model": "cartoon-v2v"}


def test_a_dry_run_as_typed_counts_the_clips_that_will_be_drawn() -> None:
    made = ran("train", "v2v", "--dry-run", "--json")
    assert made.exit_code == 0, made.output
    plan = json.loads(made.stdout)
    assert (plan["samples"], plan["start"], plan["missing_weights"]) == (8, "zero_channels", [])
    assert not Path(plan["folder"]).exists()


def test_prepared_audio_serves_either_offset(published: Published) -> None:
    """Features are prepared with the row's offset, and a video is trained with 0 whatever that is."""
    family, made = family_named("omniavatar"), []
    for offset in (0, 1):
        _, cfg = published.configured(ADAPTED, "model.channels=49", f"model.audio_offset={offset}")
        artifacts = [each for each in family.artifacts(cfg) if each.part == "audio"]  # type: ignore[attr-defined]
        conventions = family.conventions(cfg)
        made.append(
            [made_by(each, family.name, conventions, "encoder", {}, cfg).fingerprint for each in artifacts]
        )
    assert len(made[0]) == 2 and made[0] == made[1]


def test_an_image_model_keeps_the_offset_of_its_weights(
    published: Published, samples: Path, tmp_path: Path
) -> None:
    words = ("train", "i2v", "--data", samples, *ONE, *RANK, "--weights-root", published.root, "--dry-run",
             "--json")  # fmt: skip

    def offset(*more: object) -> int:
        made = ran(*words, *more)
        assert made.exit_code == 0, made.output
        return int(json.loads(made.stdout)["audio_offset"])

    assert offset("--model", ADAPTED) == 1
    assert offset("--model", BASE) == 0
    told = ran(*words, "--model", ADAPTED, "--audio-offset", "0")
    assert "audio offset 0, as asked; the weights have 1 (a published release" in told.stderr
    bare = tmp_path / "mine.pt"
    bare.write_bytes((published.root / "OmniAvatar-1.3B" / "pytorch_model.pt").read_bytes())
    unknown = ran(*words, "--model", bare)
    assert unknown.exit_code == 2 and "nothing tells whether these weights" in unknown.output, unknown.output
    assert offset("--model", bare, "--audio-offset", "1") == 1
