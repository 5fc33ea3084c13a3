"""Complete published releases, in tiny: found, loaded, run, and the same frames by every road."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from avatarctl.cli import app
from avatarctl.demo.sample import sample_audio, sample_image
from avatarctl.errors import UnusableWeights
from avatarctl.events import Event, Notice, Stage
from avatarctl.family import Modules
from avatarctl.loading.model_row import row_named
from avatarctl.loading.modules import PARTS
from avatarctl.media import load_image, open_audio
from avatarctl.pipelines.infer import generate, load
from avatarctl.pipelines.job import Job, JobPlan, check_job
from avatarctl.registry import ROWS, configure
from avatarctl.weights import recognise
from tests.helpers_video import count_frames
from tests.pipelines import assembled_by_hand as by_hand
from tests.pipelines import tiny_release as tiny
from tests.pipelines import tiny_stable_release as stable

SETTINGS = ("output.width=32", "output.height=32", "sampling.steps=2", "runtime.dtype=float32")


class Place:
    """A release on the disk, and what a run of it needs.

    published: the file or folder that a person converts; frames_made: of the voice here; conversions: words
    of `convert-ckpt` by what they write.
    """

    model = "omniavatar-14b"
    overlapping: tuple[str, ...] = ("long_video.num_frames=5", "long_video.overlap_frames=1")
    samples, frames_made = 3_200, 6  # 3200 / 640, and one of silence: audio offset 1
    loaded: tuple[str, ...] = ("text encoder", "VAE", "audio encoder", "transformer")
    said: tuple[str, ...] = (
        "published with width 5120; these weights have 48", "targets at scale", "from config.json",
    )  # fmt: skip
    stated = ("omniavatar", 33, 1)

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "weights"
        self.face, self.voice = folder / "face.png", folder / "voice.wav"
        random = np.random.default_rng(0)
        Image.fromarray(random.integers(0, 255, (48, 40, 3), np.uint8)).save(self.face)
        soundfile.write(self.voice, random.standard_normal(self.samples).astype(np.float32) * 0.1, 16_000)
        self.write()

    def write(self) -> None:
        self.release = tiny.tiny_release()
        self.release.write(self.root)
        self.base, self.adapter = self.root / "Wan2.1-T2V-14B", self.root / "OmniAvatar-14B"
        self.published = self.adapter

    def by_hand(self) -> Modules:
        """Its networks, put together without the product."""
        return by_hand.modules(self.release, self.root)

    def plan(self, model: str, *assignments: str) -> tuple[JobPlan, list[Event]]:
        events: list[Event] = []
        cfg = configure(
            f"model.name={model}", f"model.weights_root={self.root}", *SETTINGS, *self.overlapping,
            *assignments, row_named=row_named,
        )  # fmt: skip
        job = Job(load_image(str(self.face)), open_audio(str(self.voice)), "a person.", "")
        return check_job(cfg, row_named(model), job, events.append), events

    def modules(self, model: str = "omniavatar-14b", *assignments: str) -> Modules:
        return load(self.plan(model, *assignments)[0])

    def frames(self, model: str, *assignments: str, modules: Modules | None = None) -> Tensor:
        """[3, n, 32, 32] of a whole run."""
        plan, _ = self.plan(model, *assignments)
        return torch.cat([block.pixels for block in generate(plan, modules=modules)], dim=1)

    def cli(self, *words: str | Path) -> Result:
        return CliRunner().invoke(app, list(map(str, words)), prog_name="avatarctl")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("release"))


class StablePlace(Place):
    """A full model with an encoder for the image, in windows that are blended."""

    model = "stableavatar-1.3b"
    overlapping = ("long_video.num_frames=9", "long_video.overlap_frames=5")
    samples, frames_made = 7_680, 12
    loaded = (*Place.loaded, "image encoder")
    said = (
        "published with width 1536; these weights have 128",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth: its text tower is not read",
        "transformer3d-square.pt is used, of several, as the video is 64x64",
    )
    stated = ("stableavatar", 36, 0)

    def write(self) -> None:
        self.stable = stable.tiny_stable_release()
        self.stable.write(self.root)
        self.published = self.root / stable.TRANSFORMERS / "transformer3d-square.pt"

    def by_hand(self) -> Modules:
        return by_hand.stable_modules(self.stable, self.root)


@pytest.fixture(scope="module")
def stable_place(tmp_path_factory: pytest.TempPathFactory) -> StablePlace:
    return StablePlace(tmp_path_factory.mktemp("stable"))


@pytest.fixture(scope="module")
def published(place: Place) -> Tensor:
    return place.frames("omniavatar-14b")


@pytest.fixture(scope="module")
def frames_of(place: Place, stable_place: Place, published: Tensor) -> Mapping[str, Tensor]:
    """What the published files of each release give."""
    return {place.model: published, stable_place.model: stable_place.frames(stable_place.model)}


@pytest.fixture(params=["omniavatar-14b", "stableavatar-1.3b"])
def either(request: pytest.FixtureRequest, place: Place, stable_place: Place) -> Place:
    return place if request.param == place.model else stable_place


def state(modules: Modules) -> dict[str, Tensor]:
    assert isinstance(modules.dit, nn.Module)
    return modules.dit.state_dict()


def test_the_names_of_the_vae_are_those_of_the_recorded_one() -> None:
    from safetensors import safe_open

    with safe_open(Path(__file__).parents[1] / "golden/omniavatar/vae.safetensors", "pt") as file:
        recorded = {
            name.removeprefix("state."): tuple(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118
            if name.startswith("state.")
        }
    assert tiny.vae_shapes(base=4) == recorded


def test_a_release_runs_to_a_video(either: Place, tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    asked = [word for text in either.overlapping for word in ("-o", text)]
    result = either.cli(
        "infer", "--model", either.model, "--weights-root", either.root, "--image", either.face, "--audio",
        either.voice, "--size", "64x64", "--steps", "2", *asked, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert count_frames(out) == either.frames_made
    for part in either.loaded:
        assert f"loading the {part}" in result.stderr
    for line in either.said:
        assert line in result.stderr


def test_what_a_bare_adapter_leaves_to_be_guessed_is_said(place: Place, tmp_path: Path) -> None:
    (tmp_path / "bare.pt").write_bytes((place.root / "OmniAvatar-14B" / "pytorch_model.pt").read_bytes())
    result = place.cli(
        "infer", "--model", tmp_path / "bare.pt", "--weights-root", place.root, "--weights",
        f"dit={place.root / 'Wan2.1-T2V-14B'}", "--size", "64x64", "--dry-run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "no alpha is stated: 0.5, the published ratio" in result.stderr
    assert "audio offset 1: taken as published image-to-video weights" in result.stderr


def test_frames_are_those_of_networks_put_together_by_hand(
    either: Place, frames_of: Mapping[str, Tensor]
) -> None:
    frames = frames_of[either.model]
    expected = either.frames(either.model, modules=either.by_hand())
    assert frames.shape == (3, either.frames_made, 32, 32)
    assert frames.std() > 0.01 and (frames[:, 1:] - frames[:, :-1]).abs().max() > 1e-3
    torch.testing.assert_close(frames, expected, atol=1e-4, rtol=0)


def test_parts_are_loaded_alone(either: Place) -> None:
    plan, _ = either.plan(either.model)
    whole = load(plan)
    names = [name for name in PARTS if getattr(whole, name) is not None]
    assert len(names) == len(either.loaded)
    for name in names:
        said: list[Event] = []
        alone = load(plan, (name,), emit=said.append)
        for other in set(PARTS) - {name}:
            with pytest.raises(AttributeError, match=f"{other} is no part that was asked for"):
                getattr(alone, other)
        assert sum("loading the" in event.name for event in said if isinstance(event, Stage)) == 2
        expected = getattr(whole, name).state_dict()
        assert expected and all(
            torch.equal(tensor, expected[key]) for key, tensor in getattr(alone, name).state_dict().items()
        )
    with pytest.raises(ValueError, match="no parts of a run: ears"):
        load(plan, ("text", "ears"))  # type: ignore[arg-type]


def test_parts_of_a_built_in_model_are_those_of_the_whole() -> None:
    for name in ("cartoon-i2v", "stableavatar-tiny"):
        job = Job(sample_image(), sample_audio(seconds=0.2), "", "")
        plan = check_job(configure(f"model.name={name}"), ROWS[name], job, lambda event: None)
        whole, some = load(plan), load(plan, ("image", "dit"))
        assert (some.image is None) == (whole.image is None)
        with pytest.raises(AttributeError, match="vae is no part"):
            some.vae  # noqa: B018
        expected = state(whole)
        assert all(torch.equal(held, expected[key]) for key, held in some.dit.state_dict().items())


def test_files_are_found_and_opened_once(either: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real = recognise.open_weights
    monkeypatch.setattr(recognise, "open_weights", lambda path: (opened.append(path), real(path))[1])
    plan, _ = either.plan(either.model)
    planned = list(opened)
    assert planned == list(plan.sources.dit)
    load(plan)
    assert len(opened) == len(set(opened)) > len(planned)
    assert not set(opened[len(planned) :]) & set(planned)


def test_the_adapter_matters(place: Place, published: Tensor) -> None:
    """So that equal frames mean something: without the LoRA pairs they are others."""
    parts = by_hand.modules(place.release, place.root)
    bare = by_hand.merged(place.release) | {
        name: tensor for name, tensor in place.release.base.items() if name.startswith("blocks.")
    }
    parts.dit = by_hand.transformer(bare)
    assert (place.frames("omniavatar-14b", modules=parts) - published).abs().max() > 1e-2


CONVERSIONS = {
    "original model": ("--merge-lora", "--base"),
    "diffusers model": ("--merge-lora", "--to", "diffusers", "--base"),
    "comfyui model": ("--merge-lora", "--to", "comfyui", "--base"),
    "original adapter": ("--to", "original"),
    "diffusers adapter": ("--to", "diffusers"),
    "peft adapter": ("--to", "peft"),
    "comfyui adapter": ("--to", "comfyui"),
}


FULL_CONVERSIONS = {
    "original": ("--to", "original"),
    "diffusers": ("--to", "diffusers"),
    "comfyui": ("--to", "comfyui"),
    "shards": ("--to", "original", "--shard-size", "1MB"),
    "one file": ("--to", "original"),
}


@pytest.mark.parametrize(
    ("model", "kind"),
    [("omniavatar-14b", kind) for kind in CONVERSIONS]
    + [("stableavatar-1.3b", kind) for kind in FULL_CONVERSIONS],
)
def test_the_same_frames_after_conversion(
    model: str,
    kind: str,
    place: Place,
    stable_place: Place,
    frames_of: Mapping[str, Tensor],
    tmp_path: Path,
) -> None:
    here, words = (place, CONVERSIONS) if model == place.model else (stable_place, FULL_CONVERSIONS)
    flags, out = words[kind], tmp_path / ("x.safetensors" if kind in ("comfyui adapter", "one file") else "x")
    converted = here.cli(
        "convert-ckpt", here.published, "--out", out, *flags, *((here.base,) if "--base" in flags else ())
    )
    assert converted.exit_code == 0, converted.stderr
    base = (f"model.weights.dit={place.base}",) if here is place and "--base" not in flags else ()
    row = row_named(str(out))
    stated = (row.family, row.defaults["model.channels"], row.defaults["model.audio_offset"])
    assert stated == here.stated
    assert torch.equal(here.frames(str(out), *base), frames_of[model])


def test_parts_named_one_by_one(place: Place, published: Tensor, tmp_path: Path) -> None:
    """The whole release under other names and in other folders, with no root that holds it."""
    full = tmp_path / "mine"
    full.mkdir()
    save_file(by_hand.merged(place.release), full / "any-name.safetensors")
    tiny.write_json(full / "config.json", {"num_heads": 2})
    for name, source in (("t5.pth", "models_t5_umt5-xxl-enc-bf16.pth"), ("v.pth", "Wan2.1_VAE.pth")):
        (tmp_path / name).write_bytes((place.base / source).read_bytes())
    tiny.write_tokenizer(tmp_path / "google" / "umt5-xxl")
    words = [
        f"model.weights.{part}={path}"
        for part, path in (
            ("text", tmp_path / "t5.pth"), ("vae", tmp_path / "v.pth"),
            ("audio", place.root / "wav2vec2-base-960h"),
        )
    ]  # fmt: skip
    elsewhere = f"model.weights_root={tmp_path / 'nothing'}"
    frames = place.frames(str(full), elsewhere, *words)
    torch.testing.assert_close(frames, published, atol=1e-4, rtol=0)
    words.append(f"model.weights.dit={full}")
    assert torch.equal(place.frames("omniavatar-14b", elsewhere, *words), frames)
    _, events = place.plan("omniavatar-14b", elsewhere, *words)
    assert any(
        "the adapter of omniavatar-14b is not added" in e.text for e in events if isinstance(e, Notice)
    )
    with pytest.raises(UnusableWeights, match="--model names an adapter of one"):
        place.plan(str(place.adapter), f"model.weights.dit={full}")


def test_bfloat16_with_float32_islands(place: Place) -> None:
    loaded = state(place.modules("omniavatar-14b", "runtime.dtype=bfloat16"))
    expected = by_hand.transformer(by_hand.merged(place.release)).state_dict()
    islands = {name for name, tensor in loaded.items() if tensor.dtype == torch.float32}
    for name, tensor in loaded.items():
        words = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
        assert (name in islands) == any(word in name.split(".") for word in words), name
        # Merged in float32 and rounded once; the sum may fall on the other side of a rounding boundary.
        torch.testing.assert_close(
            tensor.float(), expected[name].to(tensor.dtype).float(), rtol=1e-2, atol=1e-6
        )
        if tensor.dtype == torch.bfloat16:
            assert (tensor == expected[name].bfloat16()).float().mean() > 0.999
    assert len(islands) == 2 * 2 + 1 + tiny.TINY.layers * 3


def lora_file(path: Path, scale: float, seed: int) -> Path:
    """A LoRA of one projection in ComfyUI's names; the update is scale * B @ A of `lora_update`."""
    a, b = lora_update(seed)
    module = "diffusion_model.blocks.1.self_attn.q"
    alpha = torch.tensor(scale * a.shape[0])
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b, f"{module}.alpha": alpha}, path)
    return path


def lora_update(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 48, generator=generator), torch.randn(48, 2, generator=generator)


def test_loras_add_up_with_their_scales(place: Place, tmp_path: Path) -> None:
    one = lora_file(tmp_path / "one.safetensors", 1.0, 1)
    two = lora_file(tmp_path / "two.safetensors", 0.5, 2)
    plan, events = place.plan("omniavatar-14b")
    before = state(load(plan))
    model = replace(plan.cfg.model, lora=(f"{one}:0.8", f"{two}:-1e-1"))
    after = state(load(check_job(replace(plan.cfg, model=model), plan.row, plan.job, events.append)))
    target = "blocks.1.attn1.to_q.weight"
    assert {name for name in after if not torch.equal(after[name], before[name])} == {target}
    (a1, b1), (a2, b2) = lora_update(1), lora_update(2)
    expected = before[target] + 0.8 * 1.0 * (b1 @ a1) - 0.1 * 0.5 * (b2 @ a2)
    torch.testing.assert_close(after[target], expected)
    notices = [event.text for event in events if isinstance(event, Notice)]
    lines = [text for text in notices if text.startswith("lora ")]
    assert [line.partition(" (")[0] for line in lines] == [
        f"lora {one}: 1 target at scale 0.8 x 1",
        f"lora {two}: 1 target at scale -0.1 x 0.5",
    ]
    assert all("alpha" in line for line in lines), "the rule that gave the scale"


def test_a_run_file_repeats_the_run_from_another_folder(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, base, encoders and LoRA given by relative paths; the file holds what finds them again."""
    monkeypatch.chdir(place.folder)
    lora_file(Path("one.safetensors"), 1.0, 1)
    words = ("infer", "--model", "weights/OmniAvatar-14B", "--weights-root", "weights", "--weights",
             "dit=weights/Wan2.1-T2V-14B", "--weights", "vae=weights/Wan2.1-T2V-14B/Wan2.1_VAE.pth", "--lora",
             "one.safetensors:0.8", "--image", "face.png", "--audio", "voice.wav", "--size", "32x32",
             "--steps", "1", "--guidance", "1", "--num-frames", "5", "--overlap", "1")  # fmt: skip
    planned = place.cli(*words, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert "lora one.safetensors: 1 target" in planned.stderr
    assert json.loads(planned.stdout)["missing_weights"] == []
    first = place.cli(*words, "--out", tmp_path / "first.mp4")
    assert first.exit_code == 0, first.stderr
    assert "model: OmniAvatar-14B (adapter of OmniAvatar of width 48" in first.stderr
    monkeypatch.chdir(tmp_path)
    again = place.cli("infer", "--config", "first.run.yaml", "--out", "again.mp4")
    assert again.exit_code == 0, again.stderr
    assert f"lora {place.folder}/one.safetensors: 1 target at scale 0.8 x 1" in again.stderr
    assert Path("first.mp4").read_bytes() == Path("again.mp4").read_bytes()


def test_a_lora_on_the_hub_is_never_fetched(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = place.cli("infer", "--lora", "org/repo/x.safetensors:0.5", "--dry-run")
    assert result.exit_code == 4
    assert "avatarctl models pull org/repo/x.safetensors`" in result.stderr


def test_a_lora_on_the_built_in_model(place: Place, tmp_path: Path) -> None:
    """The same road as files: only its target changes, by exactly the scaled product."""
    path = tmp_path / "cartoon.safetensors"
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 96, generator=generator), torch.randn(96, 2, generator=generator)
    save_file({"blocks.0.self_attn.q.lora_A.weight": a, "blocks.0.self_attn.q.lora_B.weight": b}, path)
    plain, changed = (
        state(place.modules("cartoon-i2v")),
        state(place.modules("cartoon-i2v", f"model.lora={path}")),
    )
    assert plain.keys() == changed.keys()
    different = [name for name in plain if not torch.equal(plain[name], changed[name])]
    assert different == ["blocks.0.attn1.to_q.weight"]
    # No alpha, and no tensor that only an avatar has: scale 1.
    expected = plain[different[0]] + b @ a
    torch.testing.assert_close(changed[different[0]], expected)
