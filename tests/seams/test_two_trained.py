"""Two families of a test are trained by the product's own trainer; no file of the product knows them.

One is like those with masks for every frame (spec/stableavatar.md i.3): a mask is chosen once for a step,
timesteps are spread over all samples of a step by their slots, audio is dropped for a whole clip. The other
has no channels, no text, a sigma for every latent frame, and is given its first frame.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from avatarctl import families, registry
from avatarctl.cli import app
from avatarctl.config import RunConfig
from avatarctl.demo.samples import write_samples
from avatarctl.family import Artifact, Clip, Condition, Draw, Modules, Timesteps
from avatarctl.loading import assemble, parts
from avatarctl.profiling import training
from avatarctl.profiling.training import profile_training
from avatarctl.training import start
from avatarctl.weights.key_map import KeyMap
from avatarctl.weights.layout import WeightLayout
from tests.families.toy_family import FRAMES, ToyFamily
from tests.families.toy_family import ROW as TOY_ROW

SAMPLES = 4


class ToyNetwork(nn.Module):
    """A linear map of every latent vector; what it is given beside them is added."""

    def __init__(self, num_attention_heads: int, attention_head_dim: int, in_channels: int) -> None:
        super().__init__()
        self.config = {"num_attention_heads": num_attention_heads, "attention_head_dim": attention_head_dim}
        self.body = nn.Linear(in_channels, 16)
        self.of_audio = nn.Linear(48, 16)
        self.of_time = nn.Linear(1, 16)

    def enable_gradient_checkpointing(self) -> None:
        pass

    def forward(self, x: Tensor, t: Tensor, audio: Tensor) -> Tensor:
        made: Tensor = self.body(x.movedim(1, -1)) + self.of_audio(audio.mean(1))[:, None, None, None]
        times = self.of_time((t / 1000).reshape(len(x), -1, 1))  # [B, 1 or T, 16]
        return (made + times[:, :, None, None]).movedim(-1, 1)


class _Trained(ToyFamily):
    """What both do alike."""

    def condition(self, samples: Sequence[Mapping[str, Tensor]]) -> Condition:
        shortest = min(len(sample["clip_tokens"]) for sample in samples)
        audio = torch.stack([sample["clip_tokens"][:shortest] for sample in samples])
        clean = torch.stack([sample["stills"] for sample in samples])
        return Condition(None, clean, None, {"tokens": audio}, {})

    def training_forward(self, dit: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        inputs = x if condition.channels is None else torch.cat([x, condition.channels], dim=1)
        made: Tensor = dit(inputs, t, condition.audio["tokens"])
        return made


class MaskedFamily(_Trained):
    name = "masked"
    chosen: ClassVar[list[tuple[int, float]]] = []  # of each step; a family holds nothing, its test does
    drawn: ClassVar[list[tuple[int, int, int]]] = []

    def takes(self, cfg: RunConfig) -> Literal["image", "video"]:
        return "video"

    def artifacts(self, cfg: RunConfig) -> tuple[Artifact, ...]:
        made = super().artifacts(cfg)
        plane = made[0].shape[2:]
        return (*made, Artifact("weights", "vae", "sample", ("masks",), made[0].keys, (2, FRAMES, *plane)))

    def encode_clip(
        self, modules: Modules, clip: Clip, wanted: Collection[str], cfg: RunConfig
    ) -> dict[str, Tensor]:
        made = super().encode_clip(modules, clip, wanted, cfg)
        if "weights" in wanted:
            assert cfg.data.height is not None and cfg.data.width is not None
            size = (2, FRAMES, cfg.data.height, cfg.data.width)
            masks = torch.ones(size)
            for place, name in enumerate(self.clip_masks):
                if name in clip.masks:
                    masks[place] = torch.from_numpy(clip.masks[name]) / 255
            made["weights"] = nn.functional.avg_pool2d(masks, 8)
        return made

    def training_condition(
        self,
        samples: Sequence[Mapping[str, Tensor]],
        constants: Mapping[str, Tensor],
        draws: Sequence[Draw],
        cfg: RunConfig,
    ) -> Condition:
        made = self.condition(samples)
        audio = made.audio["tokens"].clone()
        for place, draw in enumerate(draws):
            if draw.uniform("audio of the clip") < 0.5:
                audio[place] = constants["hush"].mean(0)  # of silence all tokens are alike
        # One choice for the whole step, whatever passes it is cut into: the draw of its first slot.
        step = replace(draws[0], slot=0).uniform("which mask")
        self.chosen.append((draws[0].step, step))
        weights = torch.stack([sample["weights"] for sample in samples])
        return replace(
            made,
            channels=torch.stack([sample["face_stills"] for sample in samples]),
            audio={"tokens": audio},
            extra={"weights": weights, "choice": torch.tensor(step)},
        )

    def sample_timesteps(self, draws: Sequence[Draw], frames: int, cfg: RunConfig) -> Timesteps:
        """Each slot has its own share of the ids (spec/stableavatar.md i.3)."""
        ids = [int((draw.slot + draw.uniform("timestep")) / draw.slots * 1000) for draw in draws]
        self.drawn.extend((draw.step, draw.slot, each) for draw, each in zip(draws, ids, strict=True))
        sigma = 1 - torch.tensor(ids) / 1000
        return Timesteps(torch.tensor(ids), 1000 * sigma, sigma, torch.ones(len(ids)))

    def loss(
        self, velocity: Tensor, target: Tensor, condition: Condition, timesteps: Timesteps, cfg: RunConfig
    ) -> tuple[Tensor, dict[str, Tensor]]:
        squared = (velocity.float() - target).square()
        face, lip = condition.extra["weights"][:, :, None].unbind(1)  # [B, 1, F, h, w]
        choice = float(condition.extra["choice"])
        weight = 1 + face + lip if choice < 0.4 else face if choice < 0.5 else lip
        loss = (squared * weight).mean((1, 2, 3, 4))
        return loss, {"plain": squared.mean((1, 2, 3, 4)).detach()}


class FramesFamily(_Trained):
    name = "frames"

    def takes(self, cfg: RunConfig) -> Literal["image", "video"]:
        return "image"

    def artifacts(self, cfg: RunConfig) -> tuple[Artifact, ...]:
        return tuple(each for each in super().artifacts(cfg) if each.name in ("stills", "clip_tokens"))

    def training_condition(
        self,
        samples: Sequence[Mapping[str, Tensor]],
        constants: Mapping[str, Tensor],
        draws: Sequence[Draw],
        cfg: RunConfig,
    ) -> Condition:
        made = self.condition(samples)
        given = (torch.arange(FRAMES) == 0).view(1, 1, FRAMES, 1, 1).expand(len(samples), -1, -1, -1, -1)
        return replace(made, fixed_mask=given)

    def sample_timesteps(self, draws: Sequence[Draw], frames: int, cfg: RunConfig) -> Timesteps:
        ids = torch.tensor([[draw.integer(f"frame {f}", 1000) for f in range(frames)] for draw in draws])
        sigma = 1 - ids / 1000
        sigma[:, 0] = 0
        return Timesteps(ids, 1000 * sigma, sigma, torch.ones_like(sigma))

    def loss(
        self, velocity: Tensor, target: Tensor, condition: Condition, timesteps: Timesteps, cfg: RunConfig
    ) -> tuple[Tensor, dict[str, Tensor]]:
        squared = (velocity.float() - target)[:, :, 1:].square()
        return squared.mean((1, 2, 3, 4)), {}


def layout_of(family: str) -> WeightLayout:
    names = ("body", "of_audio", "of_time")
    return WeightLayout(
        family=family,
        title=family,
        key_map=KeyMap(tuple((f"published.{name}.{{rest}}", f"{name}.{{rest}}") for name in names)),
        own=(r"published\..+",),
        replaced=(),
        channels=(33, 49),
        shapes=lambda sizes: {},
        class_name="ToyNetwork",
    )


def row_of(family: str, channels: int, given: int) -> registry.Row:
    network = {**TOY_ROW.network, "dit": {"num_attention_heads": 1, "attention_head_dim": given}}
    defaults = {**TOY_ROW.defaults, "model.channels": channels, "train.init": "random", "train.mode": "full"}
    return replace(TOY_ROW, name=f"{family}-tiny", family=family, network=network, defaults=defaults)


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    """Four tables are all that a family is written into."""
    with pytest.MonkeyPatch.context() as patch:
        for family, channels, given in ((MaskedFamily(), 49, 32), (FramesFamily(), 33, 16)):
            row = row_of(family.name, channels, given)

            def network(*, in_channels: int, given: int = given, **sizes: int) -> ToyNetwork:
                return ToyNetwork(in_channels=given, **sizes)

            patch.setitem(families.FAMILIES, family.name, family)
            patch.setitem(registry.ROWS, row.name, row)
            patch.setitem(parts.TRANSFORMERS, family.name, network)
        known = (layout_of("masked"), layout_of("frames"), *start.LAYOUTS)
        for module in (start, assemble, training):
            patch.setattr(module, "LAYOUTS", known)
        yield


@pytest.fixture(scope="module")
def samples(known: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four prepared samples, two with masks of their own; nobody changes them."""
    folder = tmp_path_factory.mktemp("seam") / "samples"
    write_samples(folder, range(SAMPLES), 8, "audio.wav")
    for number in (1, 2):
        lower = np.zeros((16, 32), np.uint8)
        lower[8:] = 255
        masks = folder / f"00000{number}/lip_masks"
        masks.mkdir()
        for frame in range(8):
            Image.fromarray(lower).save(masks / f"frame_{frame}.png")
    prepare(folder)
    return folder


def prepare(folder: Path) -> None:
    for command in ("precompute-latents", "precompute-audio"):
        made = CliRunner().invoke(app, [command, "--model", "masked-tiny", "--data", str(folder)])
        assert made.exit_code == 0, made.output


@pytest.fixture(autouse=True)
def forgotten() -> None:
    MaskedFamily.chosen.clear()
    MaskedFamily.drawn.clear()


def train(which: str, samples: Path, out: Path, *words: object) -> list[dict[str, Any]]:
    """Trains, typed; the log."""
    model = {"v2v": "masked-tiny", "i2v": "frames-tiny"}[which]
    line = ["train", which, "--model", model, "--data", samples, "--out", out]
    made = CliRunner().invoke(app, list(map(str, [*line, *words])), prog_name="avatarctl")
    assert made.exit_code == 0, made.output
    return [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]


def test_both_are_trained_saved_and_resumed(samples: Path, tmp_path: Path) -> None:
    for which, part in (("v2v", "plain"), ("i2v", "loss")):
        words = ("--max-steps", 3, "--batch-size", 2, "-o", "checkpoint.every=2")
        whole = train(which, samples, tmp_path / which, *words)
        assert len(whole) == 3 and all(entry[part] > 0 for entry in whole)
        other = Path(shutil.copytree(tmp_path / which, tmp_path / f"{which}-2"))
        shutil.rmtree(other / "checkpoint-3")
        assert train(which, samples, other, *words, "--resume", "auto") == whole
        runs = (tmp_path / which, other)
        ours, theirs = (run / "checkpoint-3/trainable_weights.safetensors" for run in runs)
        assert ours.read_bytes() == theirs.read_bytes()
        names = ("body", "of_audio", "of_time")
        assert set(load_file(ours)) == {f"published.{n}.{kind}" for n in names for kind in ("weight", "bias")}


def test_draws_of_a_step_do_not_depend_on_how_it_is_cut(samples: Path, tmp_path: Path) -> None:
    """Slots spread the timesteps of a step, and one choice of a mask holds for all of its passes."""
    logs = []
    for size, passes in ((4, 1), (1, 4)):
        words = ("--max-steps", 6, "--batch-size", size, "-o", f"train.gradient_accumulation={passes}")
        logs.append(train("v2v", samples, tmp_path / f"of-{size}", *words))
        drawn = MaskedFamily.drawn[-24:]
        assert all(250 * slot <= each < 250 * (slot + 1) for _, slot, each in drawn)
        assert len({each for *_, each in drawn}) > 20
        choices = {step: {each for at, each in MaskedFamily.chosen if at == step} for step in range(6)}
        assert all(len(each) == 1 for each in choices.values())
    for whole, cut in zip(*logs, strict=True):
        assert whole["loss"] == pytest.approx(cut["loss"], rel=1e-5)
        assert whole["gradient_norm"] == pytest.approx(cut["gradient_norm"], rel=1e-5)
    assert len({min(each) < 0.4 for each in choices.values()}) == 2  # both kinds of loss were met


def test_masks_reach_the_loss(samples: Path, tmp_path: Path) -> None:
    """Masks of a sample's own, against none: all white."""
    bare = Path(shutil.copytree(samples, tmp_path / "bare"))
    for masks in bare.glob("*/lip_masks"):
        shutil.rmtree(masks)
    prepare(bare)
    words = ("--max-steps", 3, "--batch-size", 4)
    masked, white = (train("v2v", data, tmp_path / f"of-{data.name}", *words) for data in (samples, bare))
    chosen = dict(MaskedFamily.chosen)
    assert masked[0]["plain"] == white[0]["plain"]
    shares = [entry["loss"] / other["loss"] for entry, other in zip(masked, white, strict=True)]
    assert (shares[0] == 1) == (0.4 <= chosen[0] < 0.5)  # a step that sees faces alone
    assert min(shares) < 0.95, (shares, chosen)


@pytest.mark.parametrize(("family", "channels", "given"), [("masked", 49, 32), ("frames", 33, 16)])
def test_its_training_is_counted_like_any_other(family: str, channels: int, given: int) -> None:
    """On fakes as on real tensors, to the byte; the profiler has no line for it."""
    row = registry.ROWS[f"{family}-tiny"]
    words = ("data.width=32", "data.height=16", "train.batch_size=2")
    cfg = registry.configure(f"model.name={row.name}", *words, "data.num_frames=5")
    counted, measured = (profile_training(row, cfg, mode) for mode in ("fake", "real"))
    assert counted.stages == measured.stages
    numbers = 16 * (given + 1) + 16 * (48 + 1) + 16 * (1 + 1)
    assert counted.trained == numbers and counted.components["moments"] == 8 * numbers
    assert counted.stages["backward"] > counted.stages["load"] == 4 * numbers
