"""Which two files belong together, and what their sum is said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from avatarctl.errors import UnusableWeights
from avatarctl.events import silent
from avatarctl.loading.parts import transformer
from avatarctl.pipelines.convert import ConvertRequest, plan_conversion, write
from avatarctl.weights.merge import merge_adapter
from avatarctl.weights.metadata import network_of
from avatarctl.weights.recognise import read_weight_file
from avatarctl.weights.weight_file import WeightFile
from tests.weights import published_tables, release

ADAPTER = release.adapter_state()


def network(**fields: float) -> dict[str, str]:
    return {"avatarctl.network": json.dumps(fields)} if fields else {}


def held(path: Path, state: release.State, **fields: float) -> WeightFile:
    """A file whose header states `fields`."""
    save_file(state, path, network(**fields) | {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 2}'})
    return read_weight_file(path)


@pytest.fixture
def base(tmp_path: Path) -> WeightFile:
    return read_weight_file(release.write_base(tmp_path / "base.safetensors"))


@pytest.fixture
def adapter(tmp_path: Path) -> WeightFile:
    return read_weight_file(release.write_release(tmp_path / "omni"))


# What no shape tells


def test_a_stated_number_of_heads_wins_over_a_guess(tmp_path: Path) -> None:
    """The guess for width 128 is 1, and it comes first where the base does not state it."""
    for base_says, adapter_says in (({}, {"num_attention_heads": 4}), ({"num_attention_heads": 4}, {})):
        base = held(tmp_path / "base.safetensors", release.base_state(), **base_says)
        adapter = held(tmp_path / "adapter.safetensors", ADAPTER, **adapter_says)
        merged = merge_adapter(base, adapter)
        assert (merged.heads, merged.heads_stated) == (4, True)
    merged = merge_adapter(*(held(tmp_path / "x.safetensors", s) for s in (release.base_state(), ADAPTER)))
    assert (merged.heads, merged.heads_stated) == (1, False)


def test_a_guess_does_not_become_a_statement_by_conversion(adapter: WeightFile, tmp_path: Path) -> None:
    request = ConvertRequest(adapter.path, tmp_path / "again.safetensors")
    write(plan_conversion(request, silent), silent)
    base = held(tmp_path / "base.safetensors", release.base_state(), num_attention_heads=4)
    assert merge_adapter(base, read_weight_file(request.out)).heads == 4


@pytest.mark.parametrize(("name", "ours", "theirs"), [("num_attention_heads", 4, 2), ("eps", 1e-5, 1e-6)])
def test_two_statements_that_differ_are_refused(
    name: str, ours: float, theirs: float, tmp_path: Path
) -> None:
    base = held(tmp_path / "base.safetensors", release.base_state(), **{name: theirs})
    adapter = held(tmp_path / "adapter.safetensors", ADAPTER, **{name: ours})
    with pytest.raises(
        UnusableWeights, match=rf"adapter\.safe.*{name} {ours:g}.*base\.safe.* has {theirs:g}"
    ):
        merge_adapter(base, adapter)


def test_heads_that_do_not_divide_the_base_are_refused(base: WeightFile, tmp_path: Path) -> None:
    lora = {"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(release.FFN)}  # tells no width
    with pytest.raises(UnusableWeights, match="3 heads, which do not divide"):
        merge_adapter(base, held(tmp_path / "lora.safetensors", lora, num_attention_heads=3))


def test_eps_survives_a_file_and_a_merge(adapter: WeightFile, tmp_path: Path) -> None:
    folder = tmp_path / "wan"
    release.write_base(folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"eps": 0.25, "num_heads": 1}))
    merged = tmp_path / "merged.safetensors"
    request = ConvertRequest(adapter.path, merged, base=folder, merge=True)
    write(plan_conversion(request, silent), silent)
    assert network_of(read_weight_file(merged))["eps"] == 0.25
    for whole in (merge_adapter(read_weight_file(folder), adapter), read_weight_file(merged)):
        built = transformer(whole, torch.float32, torch.device("cpu"))
        assert built.config.eps == 0.25


@pytest.mark.parametrize("eps", ["small", 0, 7, True])
def test_an_eps_that_is_none_is_refused(eps: object, adapter: WeightFile, tmp_path: Path) -> None:
    release.write_base(tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "wan" / "config.json").write_text(json.dumps({"eps": eps}))
    with pytest.raises(UnusableWeights, match=r"wan: eps is .*, not a small number"):
        merge_adapter(read_weight_file(tmp_path / "wan"), adapter)


# Bases of other kinds


def with_image(channels: int, image: int = 1280) -> release.State:
    """A Wan model that starts from an image; image: width of its CLIP features."""
    shapes = published_tables.wan(
        release.WIDTH,
        release.FFN,
        release.LAYERS,
        channels,
        text=release.TEXT,
        freq=release.FREQ,
        image=image,
    )
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("channels", "image", "model_type"),
    [(36, 1280, None), (36, 0, "i2v"), (36, 0, None), (16, 1280, None), (48, 0, "ti2v"), (16, 0, "vace")],
)
def test_an_avatar_is_made_of_a_text_to_video_model(
    channels: int, image: int, model_type: str | None, adapter: WeightFile, tmp_path: Path
) -> None:
    """All of these have the blocks that the adapter changes: the sum would be complete and wrong."""
    folder = tmp_path / "wan"
    folder.mkdir()
    save_file(with_image(channels, image), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
    with pytest.raises(UnusableWeights, match=r"omni: is adapter.*text-to-video.*base .*wan is Wan") as error:
        merge_adapter(read_weight_file(folder), adapter)
    assert (f'"{model_type}"' in str(error.value)) == (model_type is not None)


def test_a_text_to_video_model_may_have_been_widened(adapter: WeightFile, tmp_path: Path) -> None:
    folder = tmp_path / "wan"
    release.write_base(folder / "diffusion_pytorch_model.safetensors", channels=33)
    (folder / "config.json").write_text(json.dumps({"model_type": "t2v"}))
    assert merge_adapter(read_weight_file(folder), adapter).sizes.in_channels == 33


def test_an_avatar_with_a_image_encoder_is_none(tmp_path: Path) -> None:
    state = with_image(33) | release.audio_state()
    save_file(state, tmp_path / "odd.safetensors")
    held = read_weight_file(tmp_path / "odd.safetensors")
    assert "img_emb.proj.1.weight" in held.unknown and "blocks.0.cross_attn.k_img.bias" in held.unknown


@pytest.mark.parametrize(
    "state", [release.omniavatar_state(49), release.base_state(49)], ids=["avatar", "plain"]
)
def test_no_channels_are_lost(state: release.State, adapter: WeightFile, tmp_path: Path) -> None:
    save_file(state, tmp_path / "wide.safetensors", {"avatarctl.conventions": '{"audio_offset": 1}'})
    wide = read_weight_file(tmp_path / "wide.safetensors")
    with pytest.raises(UnusableWeights, match=r"omni: has 33 .*wide\.safetensors has 49.*--channels 49"):
        merge_adapter(wide, adapter)


# Whose configuration


def test_the_configuration_is_that_of_the_avatars_adapter(adapter: WeightFile, tmp_path: Path) -> None:
    """On a full avatar model too, which was trained otherwise."""
    request = ConvertRequest(
        adapter.path,
        tmp_path / "full",
        base=release.write_base(tmp_path / "base.safetensors"),
        merge=True,
    )
    write(plan_conversion(request, silent), silent)
    whole = read_weight_file(tmp_path / "full")
    trained = release.write_release(tmp_path / "trained")
    config = release.release_config() | {"random_prefix_frames": False}
    (trained / "config.json").write_text(json.dumps(config))
    assert merge_adapter(whole, read_weight_file(trained)).config["random_prefix_frames"] is False

    (trained / "config.json").unlink()
    assert merge_adapter(whole, read_weight_file(trained)).config["random_prefix_frames"] is True
    convert = ConvertRequest(trained, tmp_path / "peft", "peft")
    write(plan_conversion(convert, silent), silent)
    assert merge_adapter(whole, read_weight_file(tmp_path / "peft")).config["random_prefix_frames"] is True
    lora = {name: tensor for name, tensor in ADAPTER.items() if "lora" in name}
    plain = merge_adapter(whole, held(tmp_path / "lora.safetensors", lora))
    assert plain.config["random_prefix_frames"] is True
