"""What only a release has that is published for several shapes of video and is one full model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from avatarctl.errors import UnusableWeights, WeightsMissing
from avatarctl.events import Notice
from avatarctl.loading.model_row import row_named
from avatarctl.loading.parts import image_encoder
from avatarctl.pipelines.infer import load
from avatarctl.registry import configure
from tests.pipelines import tiny_stable_release as stable
from tests.pipelines.test_release import StablePlace, state
from tests.weights import release

NAME = "blocks.0.attn2.vocal_k.weight"
OBLONG = ("output.width=64", "output.height=32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> StablePlace:
    return StablePlace(tmp_path_factory.mktemp("stable"))


def loaded(place: StablePlace, model: str, *assignments: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors of the transformer and what was said."""
    plan, events = place.plan(model, *assignments)
    held = state(load(plan, emit=events.append))
    return held, [event.text for event in events if isinstance(event, Notice)]


def test_the_size_of_the_video_chooses_the_file(place: StablePlace) -> None:
    original = "blocks.0.cross_attn.k_vocal.weight"
    held, said = loaded(place, place.model)
    assert torch.equal(held[NAME], place.stable.square[original])
    assert "transformer3d-square.pt is used, of several, as the video is 32x32" in said
    held, said = loaded(place, place.model, *OBLONG)
    assert torch.equal(held[NAME], place.stable.rec_vec[original])
    assert "transformer3d-rec-vec.pt is used, of several, as the video is 64x32" in said
    assert not any("was trained for" in line for line in said)


def test_weights_of_the_other_shape_run_with_one_line(place: StablePlace, tmp_path: Path) -> None:
    """Alone on the disk, named by a path, and converted under another name."""
    root = tmp_path / "weights"
    shutil.copytree(place.root, root)
    (root / stable.TRANSFORMERS / "transformer3d-rec-vec.pt").unlink()
    converted = tmp_path / "mine.safetensors"
    result = place.cli("convert-ckpt", place.published, "--out", converted)
    assert result.exit_code == 0, result.stderr
    for model in (place.model, str(place.published), str(converted)):
        _, said = loaded(place, model, f"model.weights_root={root}", *OBLONG)
        (line,) = [line for line in said if "was trained for" in line]
        assert line.endswith(
            "was trained for square videos, and this one is 64x32; stableavatar-1.3b-rec-vec is made for such"
        )
        _, said = loaded(place, model, f"model.weights_root={root}")
        assert not any("was trained for" in line or "of several" in line for line in said)
        words = ("--dry-run", "--model", model, "--weights-root", root, "--size", "64x32")
        dry = place.cli("infer", *words)
        assert dry.exit_code == 0, dry.stderr
        assert dry.stderr.count("trained for square videos, and this one is 64x32") == 1


def test_a_file_of_ones_own_brings_the_size_that_it_was_trained_for(
    place: StablePlace, tmp_path: Path
) -> None:
    """By its name; after a conversion by that of its source."""
    oblong = place.root / stable.TRANSFORMERS / "transformer3d-rec-vec.pt"
    converted = tmp_path / "mine.safetensors"
    assert place.cli("convert-ckpt", oblong, "--out", converted).exit_code == 0
    renamed = shutil.copy(oblong, tmp_path / "unknown.pt")
    image = (None, None)  # it decides between landscape and portrait
    sizes = {oblong: image, converted: image, renamed: (512, 512), place.published: (512, 512)}
    for path, size in sizes.items():
        cfg = configure(f"model.name={path}", row_named=row_named)
        assert (cfg.output.width, cfg.output.height) == size, path


@pytest.mark.parametrize(
    ("size", "file", "other"),
    [((), "transformer3d-square.pt", "rec-vec"), (OBLONG, "transformer3d-rec-vec.pt", "square")],
)
def test_what_is_missing_is_named_with_the_folder_it_goes_to(
    size: tuple[str, ...], file: str, other: str, place: StablePlace, tmp_path: Path
) -> None:
    with pytest.raises(WeightsMissing) as told:
        loaded(place, place.model, f"model.weights_root={tmp_path}", *size)
    for part in (
        file, "from FrancisRing/StableAvatar", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "preprocessor_config.json",
    ):  # fmt: skip
        assert part in str(told.value)
    assert other not in told.value.what
    assert "diffusion_pytorch_model" not in str(told.value), "the base is in the file"


def test_a_release_folder_as_weights_root_and_a_audio_encoder_of_its_own(
    place: StablePlace, tmp_path: Path
) -> None:
    """As the instructions leave it (`--local-dir checkpoints`), and wav2vec2 in its own repository."""
    expected, _ = loaded(place, place.model)
    flat = tmp_path / "checkpoints"
    shutil.copytree(place.root / stable.FOLDER, flat)
    held, _ = loaded(place, place.model, f"model.weights_root={flat}")
    assert torch.equal(held[NAME], expected[NAME])
    apart = tmp_path / "apart"
    shutil.copytree(place.root, apart)
    shutil.move(apart / stable.FOLDER / "wav2vec2-base-960h", apart / "wav2vec2-base-960h")
    held, _ = loaded(place, place.model, f"model.weights_root={apart}")
    assert torch.equal(held[NAME], expected[NAME])


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_lora_of_the_published_trainer(strength: float, place: StablePlace, tmp_path: Path) -> None:
    """Its names (spec/stableavatar.md i.4): two underscores behind the prefix, alpha in the file;
    layers for images too."""
    generator = torch.Generator().manual_seed(4)
    path, width, pair = tmp_path / "lora-checkpoint-1.pt", stable.DIMS.width, {}
    targets = {"blocks_1_cross_attn_k_img": (width, width), "img_emb_proj_3": (width, stable.CLIP_WIDTH),
               "head_head": (64, width)}  # fmt: skip
    for module, (outputs, inputs) in targets.items():
        pair[f"lora_transformer__{module}.lora_down.weight"] = torch.randn(4, inputs, generator=generator)
        pair[f"lora_transformer__{module}.lora_up.weight"] = torch.randn(outputs, 4, generator=generator)
        pair[f"lora_transformer__{module}.alpha"] = torch.tensor(2.0)
    torch.save(pair, path)
    before, _ = loaded(place, place.model)
    after, said = loaded(place, place.model, f"model.lora={path}:{strength}")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    names = {
        "blocks.1.attn2.add_k_proj.weight": "blocks_1_cross_attn_k_img",
        "condition_embedder.image_embedder.ff.net.2.weight": "img_emb_proj_3",
        "proj_out.weight": "head_head",
    }
    assert changed == names.keys()
    for name, module in names.items():
        up, down = (pair[f"lora_transformer__{module}.lora_{side}.weight"] for side in ("up", "down"))
        torch.testing.assert_close(after[name], before[name] + strength * 2 / 4 * (up @ down))
    assert any(f"lora {path}: 3 targets at scale" in line for line in said)


def test_inspect_knows_its_files(place: StablePlace) -> None:
    facts = json.loads(place.cli("convert-ckpt", place.published, "--inspect", "--json").stdout)
    assert (facts["family"], facts["kind"], facts["channels"], facts["layers"]) == (
        "stableavatar", "model", 36, 2,
    )  # fmt: skip
    assert facts["variant"] == "StableAvatar of width 128, 2 layers, 36 channels"
    assert (facts["missing"], facts["unknown"], facts["audio_offset"]) == ([], [], 0)
    answers = {each["loader"]: each["answer"] for each in facts["loaders"]}
    assert (answers["avatarctl infer --model"], answers["diffusers from_single_file"]) == ("yes", "wrong")
    clip = place.root / stable.BASE / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    assert "CLIP vision encoder" in place.cli("convert-ckpt", clip, "--inspect").stdout
    assert "as clip=PATH" in place.cli("convert-ckpt", clip, "--inspect").stdout


def test_names_of_diffusers_and_back_are_the_same_bytes(place: StablePlace, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back.safetensors"
    assert place.cli("convert-ckpt", place.published, "--out", there, "--to", "diffusers").exit_code == 0
    config = json.loads((there / "config.json").read_text())
    assert (config["_class_name"], config["vocal_dim"]) == ("StableAvatarTransformer", 16)
    assert place.cli("convert-ckpt", there, "--out", back).exit_code == 0
    held = load_file(back)
    assert held.keys() == place.stable.square.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in place.stable.square.items())


def test_bfloat16_keeps_what_is_computed_in_float32(place: StablePlace, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    assert place.cli("convert-ckpt", place.published, "--out", out, "--dtype", "bf16").exit_code == 0
    kept = {name for name, tensor in load_file(out).items() if tensor.dtype == torch.float32}
    for name in place.stable.square:
        words = name.split(".")
        inside = {"time_embedding", "time_projection", "modulation", "norm3", "norm"} & set(words)
        assert (name in kept) == bool(inside or name.startswith(("img_emb.proj.0", "img_emb.proj.4"))), name


def test_what_conversions_refuse(place: StablePlace, tmp_path: Path) -> None:
    """Channels that mean other things, and merges across families, which name both sides."""
    out = tmp_path / "x"
    widened = place.cli("convert-ckpt", place.published, "--out", out, "--channels", "49")
    assert widened.exit_code == 3 and "36 input channels mean other things" in widened.stderr
    other = release.write_release(tmp_path / "omni")
    crossed = place.cli("convert-ckpt", other, "--out", out, "--merge-lora", "--base", place.published)
    assert crossed.exit_code == 3
    assert "OmniAvatar" in crossed.stderr and "is StableAvatar" in crossed.stderr
    fun = tmp_path / "fun.safetensors"
    save_file({name: tensor for name, tensor in place.stable.square.items() if "vocal" not in name}, fun)
    shown = place.cli("convert-ckpt", fun, "--inspect").stdout
    assert "Wan 2.1 I2V of width 128" in shown and "no audio layers" in shown
    on_images = place.cli("convert-ckpt", other, "--out", out, "--merge-lora", "--base", fun)
    assert on_images.exit_code == 3 and "made for a text-to-video model" in on_images.stderr
    difference = place.cli("convert-ckpt", place.published, "--out", out, "--extract", "lora", "--base", fun)
    assert (
        difference.exit_code == 3 and "fun.safetensors" in difference.stderr and "vocal" in difference.stderr
    )
    assert not out.exists()


def test_half_a_file_is_refused_by_what_it_lacks(place: StablePlace, tmp_path: Path) -> None:
    path = tmp_path / "half.pt"
    held = dict(place.stable.square)
    del held["vocal_projector.final_head.final_proj.bias"]
    torch.save(held, path)
    with pytest.raises(UnusableWeights, match=r"1 tensor is missing, vocal_projector\.final_head"):
        loaded(place, str(path))


def test_a_projector_without_its_last_block_is_refused(place: StablePlace, tmp_path: Path) -> None:
    """The first block alone looks whole: that there are two is published, and no tensor tells it."""
    path = tmp_path / "half.pt"
    held = place.stable.square
    torch.save({name: held[name] for name in held if "vocal_projector.blocks.1." not in name}, path)
    shown = place.cli("convert-ckpt", path, "--inspect")
    assert shown.exit_code == 3 and "vocal_projector.blocks.1.modulation" in shown.stdout
    words = ("--model", path, "--image", place.face, "--audio", place.voice, "--weights-root", place.root)
    refused = place.cli("infer", *words, "--out", tmp_path / "x.mp4")
    assert refused.exit_code == 3 and not (tmp_path / "x.mp4").exists()
    said = " ".join(refused.stderr.split())
    assert "17 tensors are missing, vocal_projector.blocks.1.modulation" in said and str(path) in said


def test_the_base_alone_is_no_model_nor_the_base_of_an_adapter(place: StablePlace, tmp_path: Path) -> None:
    path = tmp_path / "base.pt"
    torch.save({name: held for name, held in place.stable.square.items() if "vocal" not in name}, path)
    with pytest.raises(UnusableWeights, match="has no audio layers") as told:
        loaded(place, str(path))
    assert "model.weights.dit" not in str(told.value), "no adapter is made for it"


LAYER = "visual.transformer.1"
CLIP_DAMAGES: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "lacks one": ({f"{LAYER}.mlp.0.bias": None}, f"1 tensor is missing: {LAYER}.mlp.0.bias"),
    "lacks what is divided": (
        {f"{LAYER}.attn.to_qkv.weight": None}, f"1 tensor is missing: {LAYER}.attn.to_qkv.weight",
    ),
    "lacks what layers are counted by": (
        {f"{LAYER}.norm1.weight": None}, f"1 tensor is missing: {LAYER}.norm1.weight",
    ),
    "lacks an embedding": ({"visual.cls_embedding": None}, "1 tensor is missing: visual.cls_embedding"),
    "has one more": ({f"{LAYER}.attn.x": torch.ones(3)}, f"1 has no place in the network: {LAYER}.attn.x"),
    "has another shape": (
        {f"{LAYER}.mlp.2.bias": torch.ones(31)}, f"{LAYER}.mlp.2.bias has shape [31], the network needs [32]",
    ),
    "divides into other parts": (
        {f"{LAYER}.attn.to_qkv.weight": torch.ones(99, 32)},
        f"{LAYER}.attn.to_qkv.weight has shape [99, 32]; the rest of the file needs [96, 32]",
    ),
    "divides into no parts": (
        {f"{LAYER}.attn.to_qkv.bias": torch.ones(97)},
        f"{LAYER}.attn.to_qkv.bias has shape [97]; the rest of the file needs [96]",
    ),
    "has no square of places": (
        {"visual.pos_embedding": torch.ones(1, 200, 32)},
        "visual.pos_embedding has shape [1, 200, 32]; the rest of the file needs [1, 197, 32]",
    ),
    "has a bare embedding": (
        {"visual.cls_embedding": torch.ones(32)},
        "visual.cls_embedding has shape [32]; the rest of the file needs [1, 1, 32]",
    ),
    "holds NaN": (
        {f"{LAYER}.attn.to_qkv.weight": torch.full((96, 32), float("nan"))},
        f"{LAYER}.attn.to_qkv.weight holds NaN",
    ),
    "holds integers": (
        {"visual.pre_norm.weight": torch.ones(32, dtype=torch.int8)}, "visual.pre_norm.weight has dtype I8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CLIP_DAMAGES)
def test_a_damaged_image_encoder_is_told_by_the_names_of_its_file(
    what: str, place: StablePlace, tmp_path: Path
) -> None:
    changes, says = CLIP_DAMAGES[what]
    held = {**place.stable.clip, **changes}
    path = tmp_path / "clip.pth"
    torch.save({name: tensor for name, tensor in held.items() if tensor is not None}, path)
    with pytest.raises(UnusableWeights) as told:
        image_encoder(path, torch.device("cpu"), lambda _: None)
    assert says in told.value.what and told.value.where == path


@pytest.mark.parametrize("shape", [(0, 3, 14, 14), (32, 3, 0, 0), (32, 3), (24, 3, 14, 14)])
def test_an_image_encoder_of_no_size_is_refused_by_its_name(
    shape: tuple[int, ...], place: StablePlace, tmp_path: Path
) -> None:
    path = tmp_path / "clip.pth"
    torch.save(place.stable.clip | {"visual.patch_embedding.weight": torch.zeros(shape)}, path)
    with pytest.raises(UnusableWeights, match="image tower") as told:
        image_encoder(path, torch.device("cpu"), lambda _: None)
    assert told.value.where == path


def test_an_image_encoder_of_another_width(place: StablePlace, tmp_path: Path) -> None:
    path = tmp_path / "clip.pth"
    held = {
        name: torch.zeros([16 * (side // 32) if side in (32, 96) else side for side in tensor.shape])
        for name, tensor in place.stable.clip.items()
    }
    torch.save(held, path)
    with pytest.raises(UnusableWeights, match=r"gives image features of width 16, and .* takes 32"):
        loaded(place, place.model, f"model.weights.clip={path}")
