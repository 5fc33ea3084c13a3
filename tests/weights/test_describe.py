"""What `convert-ckpt --inspect` says, for files that are nothing but names, shapes and configs."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avatarctl.errors import UnusableWeights
from avatarctl.files.source import RawWeights
from avatarctl.files.tensors import TensorInfo
from avatarctl.weights.describe import describe, lines
from avatarctl.weights.merge import merge_adapter
from avatarctl.weights.recognise import recognise
from avatarctl.weights.weight_file import WeightFile
from tests.weights.published_tables import Shapes, audio, lora, umt5, wan

PATCH: Shapes = {"patch_embedding.weight": (5120, 33, 1, 2, 2), "patch_embedding.bias": (5120,)}
RELEASE_14B = lora(5120, 13_824, 40) | audio(5120, 40) | PATCH
CONFIG = {
    "model_config": {"in_dim": 33, "audio_hidden_size": 32}, "train_architecture": "lora", "lora_rank": 128,
    "lora_alpha": 64, "lora_target_modules": "q,k,v,o,ffn.0,ffn.2", "init_lora_weights": "kaiming",
    "use_audio": True, "i2v": True, "random_prefix_frames": True,
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """A tensor of which nobody may read a value."""

    info: TensorInfo

    def read(self, start: int, stop: int) -> np.ndarray:
        raise AssertionError("a value was read")


def about(shapes: Shapes, **said: Any) -> dict[str, Any]:
    return describe(checkpoint_of(shapes, **said))


def checkpoint_of(
    shapes: Shapes,
    *,
    dtype: str = "BF16",
    file: str = "model.safetensors",
    config: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    notes: tuple[str, ...] = (),
) -> WeightFile:
    path = Path("folder") / file
    raw = RawWeights(
        path=path,
        files=(path,),
        format="safetensors" if file.endswith(".safetensors") else "zip",
        tensors={name: Header(TensorInfo(dtype, shape)) for name, shape in shapes.items()},
        metadata=metadata or {},
        config=config or {},
        notes=notes,
    )
    return recognise(raw)


def answers(facts: dict[str, Any]) -> dict[str, str]:
    return {entry["loader"]: entry["answer"] for entry in facts["loaders"]}


def reason(facts: dict[str, Any], loader: str) -> str:
    return next(entry["reason"] for entry in facts["loaders"] if entry["loader"] == loader)


def test_the_published_adapter() -> None:
    facts = about(RELEASE_14B, file="pytorch_model.pt", config=CONFIG)
    assert facts["variant"] == "adapter of OmniAvatar 14B, 33 channels"
    assert (facts["kind"], facts["family"], facts["naming"], facts["format"]) == (
        "adapter", "omniavatar", "original", "zip",
    )  # fmt: skip
    assert (facts["channels"], facts["layers"], facts["width"], facts["ffn"], facts["heads"]) == (
        33, 40, 5120, 13_824, 40,
    )  # fmt: skip
    assert (facts["targets"], facts["ranks"], facts["alphas"], facts["scales"]) == (400, [128], [64], [0.5])
    assert facts["train_architecture"] == "lora" and facts["random_prefix_frames"] is True
    assert facts["audio_offset"] == 1 and facts["audio_offset_rule"]
    # spec/omniavatar.md i, g.4: 844 tensors, 613 million LoRA parameters.
    assert facts["tensors"] == 844 and facts["dtypes"] == {"BF16": 844}
    whole = 32 * 43_008 + 3 * 32 + 19 * (5120 * 32 + 5120) + 5120 * 33 * 4 + 5120
    assert facts["parameters"] == 613_416_960 + whole
    assert facts["bytes"] == 2 * facts["parameters"]
    assert facts["published_hash"] is None
    assert facts["unknown"] == facts["missing"] == []
    assert answers(facts) == {
        "avatarctl infer --model": "yes", "avatarctl infer --lora": "yes",
        "diffusers load_lora_adapter": "no", "diffusers load_lora_weights": "no",
    }  # fmt: skip
    assert facts["read_by"] == [], "the release's own names of LoRA tensors"


@pytest.mark.parametrize(
    ("shapes", "variant", "published"),
    [
        (wan(1536, 8960, 30), "Wan 2.1 T2V 1.3B", "Wan2.1-T2V-1.3B"),
        (wan(5120, 13_824, 40), "Wan 2.1 T2V 14B", "Wan2.1-T2V-14B"),
        (wan(5120, 13_824, 40, 36, image=1280), "Wan 2.1 I2V 14B", "Wan2.1-I2V-14B"),
        (wan(3072, 14_336, 30, 48, out=48), "Wan 2.2 TI2V 5B", "Wan2.2-TI2V-5B"),
    ],
)
def test_plain_wan_is_named_as_what_it_is(shapes: Shapes, variant: str, published: str) -> None:
    facts = about(shapes)
    assert facts["variant"].startswith(variant) and facts["published_as"] == published
    known = answers(facts)
    assert known["avatarctl infer --model"] == "no"
    assert known["diffusers from_single_file"] == "yes"
    assert facts["read_by"] == ["diffusers from_single_file", "ComfyUI"]


def test_a_full_avatar_is_damaged_where_audio_layers_are_unknown() -> None:
    facts = about(wan(1536, 8960, 30, 33) | audio(1536, 30))
    known = answers(facts)
    assert known["avatarctl infer --model"] == "yes"
    assert known["diffusers from_single_file"] == "wrong"
    assert "audio layers" in reason(facts, "diffusers from_single_file")
    assert any(line.startswith("wrongly in") for line in lines(facts))


def test_an_encoder_is_named_and_only_offered_as_one() -> None:
    facts = about(umt5(), file="models_t5_umt5-xxl-enc-bf16.pth")
    assert facts["kind"] == "component" and "UMT5" in facts["variant"]
    assert facts["published_as"].startswith("models_t5")
    assert answers(facts) == {"avatarctl infer --weights": "yes"}
    assert "text=PATH" in reason(facts, "avatarctl infer --weights")
    assert not any(line.startswith(("heads", "network")) for line in lines(facts))


@pytest.mark.parametrize("channels", [49, 65])
def test_channels_of_video_to_video_are_said_to_load(channels: int) -> None:
    whole = about(wan(1536, 8960, 30, channels) | audio(1536, 30))
    for loader in ("avatarctl infer --model", "avatarctl infer --weights"):
        assert answers(whole)[loader] == "yes"
    assert answers(whole)["avatarctl convert-ckpt --base"] == "yes"
    patch = {"patch_embedding.weight": (5120, channels, 1, 2, 2)}
    adapter = about(RELEASE_14B | patch)
    assert answers(adapter)["avatarctl infer --model"] == "yes"


def test_the_second_half_of_an_adapter_names_the_first() -> None:
    metadata = {"avatarctl.companion_of": "mine.safetensors"}
    facts = about(audio(5120, 40) | PATCH, file="mine.patch.safetensors", metadata=metadata)
    for loader in ("avatarctl infer --model", "avatarctl infer --lora"):
        assert answers(facts)[loader] == "no" and "mine.safetensors" in reason(facts, loader)


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        (wan(1536, 8960, 30), {}),
        (wan(1536, 8960, 30), {"model_type": "t2v"}),
        (wan(1536, 8960, 30), {"model_type": "vace"}),
        (wan(1536, 8960, 30, 33), {}),
        (wan(1536, 8960, 30, 36), {}),
        (wan(1536, 8960, 30, 36, image=1280), {}),
        (wan(1536, 8960, 30, 48), {}),
        (wan(3072, 14_336, 30, 48, out=48), {}),
    ],
)
def test_a_base_of_avatars_is_what_a_merge_takes(shapes: Shapes, config: dict[str, Any]) -> None:
    width, ffn = shapes["patch_embedding.bias"][0], shapes["blocks.0.ffn.0.bias"][0]
    patch: Shapes = {"patch_embedding.weight": (width, 33, 1, 2, 2), "patch_embedding.bias": (width,)}
    adapter = checkpoint_of(lora(width, ffn, 30) | audio(width, 30) | patch)
    taken = True
    try:
        merge_adapter(checkpoint_of(shapes, config=config), adapter)
    except UnusableWeights as error:
        assert "text-to-video" in str(error)
        taken = False
    facts = about(shapes, config=config)
    assert answers(facts)["avatarctl infer --weights"] == ("yes" if taken else "no")
    assert answers(facts)["avatarctl convert-ckpt --base"] == "yes"
    told = reason(facts, "avatarctl infer --model")
    assert ("it is the base" in told) == taken and ("text-to-video models only" in told) != taken
    assert any(line.startswith("not in") for line in lines(facts)) != taken


def test_a_lora_for_a_image_encoder_needs_a_model_that_has_one() -> None:
    pair = {f"diffusion_model.blocks.0.cross_attn.k_img.lora_{ab}.weight": (8, 8) for ab in "AB"}
    facts = about(pair)
    assert answers(facts)["avatarctl infer --lora"] == "yes"
    assert "k_img" in reason(facts, "avatarctl infer --lora")
    assert "StableAvatar" in reason(facts, "avatarctl infer --lora")


@pytest.mark.parametrize(
    ("prefix", "programs"),
    [
        ("", {"diffusers from_single_file", "ComfyUI"}),
        ("model.diffusion_model.", {"diffusers from_single_file", "ComfyUI"}),
        ("pipe.dit.", set()),
        ("diffusion_model.", set()),
    ],
)
def test_who_reads_the_names_of_a_model(prefix: str, programs: set[str]) -> None:
    facts = about({f"{prefix}{name}": shape for name, shape in wan(1536, 8960, 30).items()})
    assert set(facts["read_by"]) == programs
    assert any(line.startswith("names ") for line in lines(facts)) == bool(programs)
    loads = answers(facts)["diffusers from_single_file"]
    assert (loads == "yes") == ("diffusers from_single_file" in programs)


@pytest.mark.parametrize(
    ("module", "programs"),
    [
        ("diffusion_model.blocks.0.self_attn.q", {"diffusers load_lora_weights", "ComfyUI"}),
        ("model.diffusion_model.blocks.0.self_attn.q", set()),
        ("pipe.dit.blocks.0.self_attn.q", set()),
        ("transformer.blocks.0.attn1.to_q", {"diffusers load_lora_adapter", "diffusers load_lora_weights"}),
        ("base_model.model.blocks.0.attn1.to_q", {"PEFT from_pretrained"}),
        (
            "lora_unet_blocks_0_self_attn_q",
            {"diffusers load_lora_weights", "ComfyUI", "kohya's scripts", "musubi-tuner"},
        ),
        ("lora_transformer__blocks_0_self_attn_q", set()),
    ],
)
def test_who_reads_the_names_of_a_lora(module: str, programs: set[str]) -> None:
    facts = about({f"{module}.lora_{ab}.weight": (8, 8) for ab in "AB"})
    assert facts["kind"] == "adapter" and set(facts["read_by"]) == programs
    assert answers(facts)["avatarctl infer --lora"] == "yes"


def test_conventions_come_from_our_metadata_only() -> None:
    shapes = wan(1536, 8960, 30, 49) | audio(1536, 30)
    stated = {"audio_offset": 0, "mask_keep": 0, "hole": 0.0, "fps": 25, "sigma_shift": 5.0}
    facts = about(shapes, metadata={"avatarctl.conventions": json.dumps(stated)})
    assert facts["conventions"] == stated
    assert (facts["audio_offset"], facts["audio_offset_rule"]) == (0, "the file's metadata")
    shown = "\n".join(lines(facts))
    assert "mask value that keeps: 0" in shown and "frames per second: 25" in shown
    silent = about(shapes)
    assert silent["conventions"] == {} and "conventions" not in "\n".join(lines(silent))


def test_damaged_metadata_of_ours_is_refused_and_named() -> None:
    with pytest.raises(UnusableWeights, match=r"model\.safetensors: .*avatarctl\."):
        about(wan(1536, 8960, 30), metadata={"avatarctl.operations": "{"})


def test_everything_strange_is_in_the_json_and_the_first_ten_are_shown() -> None:
    strange = {f"strange.{i:02}\x1b[2J": (1,) for i in range(25)}
    facts = about(wan(1536, 8960, 30, 33) | audio(1536, 30) | strange)
    assert facts["unknown"] == list(strange)
    assert answers(facts)["avatarctl infer --model"] == "no"
    shown = [line for line in lines(facts) if "strange." in line]
    assert len(shown) == 10 and any("and 15 more" in line for line in lines(facts))


def test_missing_tensors_are_named() -> None:
    shapes = wan(1536, 8960, 30, 33) | audio(1536, 30)
    lost = [name for name in shapes if name.startswith("blocks.29.norm3.")]
    facts = about({name: shape for name, shape in shapes.items() if name not in lost})
    assert sorted(facts["missing"]) == sorted(lost)
    assert any("blocks.29.norm3.weight" in line for line in lines(facts))
    assert "2 tensors missing" in reason(facts, "avatarctl infer --model")


def test_what_strangers_wrote_reaches_no_terminal_raw() -> None:
    hostile = "\x1b]0;owned\x07\r\n\u202e" + "x" * 5000
    facts = about(
        wan(1536, 8960, 30) | {hostile: (1,)},
        metadata={hostile: hostile, "plain": "text"},
        config={"train_architecture": hostile, "random_prefix_frames": [hostile]},
        notes=(hostile,),
    )
    for line in lines(facts):
        assert not any(unicodedata.category(char) in ("Cc", "Cf") for char in line)
        assert len(line) < 700
    assert json.loads(json.dumps(facts))["metadata"][hostile] == hostile


def test_lines_are_aligned_and_say_nothing_about_absent_facts() -> None:
    facts = about(lora(1536, 8960, 30), file="lora.safetensors")
    shown = lines(facts)
    text = "\n".join(shown)
    assert shown[0].startswith("path") and shown[1].split(maxsplit=1) == ["is", facts["variant"]]
    column = len(shown[0]) - len(shown[0].split(maxsplit=1)[1])
    assert all(line[column - 1] == " " and line[column] != " " for line in shown)
    labels = {line[:column].strip() for line in shown}
    assert labels == {
        "path",
        "is",
        "format",
        "network",
        "LoRA",
        "alpha",
        "scale",
        "heads",
        "holds",
        "loads in",
    }
    assert "None" not in text and "0.5" in text


def test_a_description_is_json_with_the_same_keys_for_every_file() -> None:
    kinds = (wan(1536, 8960, 30), lora(1536, 8960, 30), umt5(), RELEASE_14B)
    described = [about(shapes) for shapes in kinds]
    assert len({tuple(facts) for facts in described}) == 1
    for facts in described:
        assert json.loads(json.dumps(facts)) == facts
