"""Conversions as other programs see them: round trips, and readers that share no code with us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from avatarctl.errors import UnusableWeights, UsageError
from avatarctl.events import BytesMoved, Event, silent
from avatarctl.pipelines.convert import (
    ConvertRequest,
    plan_conversion,
    preview_conversion,
    write,
)
from avatarctl.weights.metadata import read_own
from avatarctl.weights.recognise import read_weight_file
from tests.pipelines.converting import SCALE, close, convert, header, in_diffusers, loaded, same, whole_model
from tests.weights import published_tables, release
from tests.weights.release import State

# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["diffusers", "comfyui"])
def test_a_model_there_and_back(way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = release.write_model(tmp_path / "full.safetensors", dtype)
    convert(source, tmp_path / "there", way)
    convert(tmp_path / "there", tmp_path / "back.safetensors")
    same(loaded(tmp_path / "back.safetensors"), release.omniavatar_state(dtype=dtype))


@pytest.mark.parametrize("way", ["diffusers", "comfyui", "peft"])
def test_an_adapter_there_and_back(way: str, omni: Path, tmp_path: Path) -> None:
    convert(omni, tmp_path / "there", way)
    convert(tmp_path / "there", tmp_path / "back")
    same(loaded(tmp_path / "back"), release.adapter_state())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == release.release_config()


def test_one_file_with_its_companion_there_and_back(omni: Path, tmp_path: Path) -> None:
    done = convert(omni, tmp_path / "lora.safetensors", "comfyui")
    assert done.files == ("lora.patch.safetensors", "lora.safetensors")
    assert header(tmp_path / "lora.safetensors")["avatarctl.companion"] == "lora.patch.safetensors"
    assert header(tmp_path / "lora.patch.safetensors")["avatarctl.companion_of"] == "lora.safetensors"
    convert(tmp_path / "lora.safetensors", tmp_path / "back.safetensors")
    same(loaded(tmp_path / "back.safetensors"), release.adapter_state())


def test_the_scale_and_the_conventions_survive_every_way(omni: Path, tmp_path: Path) -> None:
    before = read_weight_file(omni)
    here = omni
    for way in ("comfyui", "diffusers", "peft", "original"):
        convert(here, tmp_path / way, way)
        here = tmp_path / way
        after = read_weight_file(here)
        assert {after.scale_of(pair) for pair in after.lora_pairs.values()} == {SCALE}, way
        assert (after.audio_offset, after.sizes) == (before.audio_offset, before.sizes), way
    steps = read_own(after.metadata).operations
    assert [step["to"] for step in steps] == ["comfyui", "diffusers", "peft", "original"]


# Independent readers


def test_diffusers_loads_a_folder_of_ours(tmp_path: Path, base: Path) -> None:
    from diffusers import WanTransformer3DModel

    from avatarctl.models.omniavatar import OmniAvatarTransformer

    convert(release.write_model(tmp_path / "full.safetensors"), tmp_path / "omni")
    convert(tmp_path / "omni", tmp_path / "there", "diffusers", shard_bytes=1_000_000)
    assert (tmp_path / "there" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    model, told = OmniAvatarTransformer.from_pretrained(tmp_path / "there", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    same(model.state_dict(), in_diffusers(release.omniavatar_state()))

    convert(base, tmp_path / "plain", "diffusers")
    plain, told = WanTransformer3DModel.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    same(plain.state_dict(), in_diffusers(release.base_state()))


@pytest.mark.parametrize("to", ["original", "comfyui"])
def test_diffusers_loads_a_single_file_of_ours(to: str, base: Path, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    convert(base, tmp_path / "config", "diffusers")
    convert(base, tmp_path / "one.safetensors", to)
    model = WanTransformer3DModel.from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path / "config"), torch_dtype=torch.float32
    )
    same(model.state_dict(), in_diffusers(release.base_state()))


def test_diffusers_applies_an_adapter_of_ours_as_we_merge_it(omni: Path, base: Path, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    convert(base, tmp_path / "plain", "diffusers")
    convert(omni, tmp_path / "lora", "diffusers")
    model = WanTransformer3DModel.from_pretrained(tmp_path / "plain")
    model.load_lora_adapter(str(tmp_path / "lora"), weight_name="pytorch_lora_weights.safetensors")
    model.fuse_lora()
    model.unload_lora()
    expected = release.merged(release.base_state(), release.lora_pairs(), SCALE)
    close(model.state_dict(), in_diffusers(expected))


def test_the_companion_for_diffusers_completes_the_model(omni: Path, tmp_path: Path) -> None:
    from avatarctl.models.omniavatar import OmniAvatarTransformer

    convert(omni, tmp_path / "lora", "diffusers")
    convert(release.write_model(tmp_path / "full.safetensors"), tmp_path / "model", "diffusers")
    model = OmniAvatarTransformer.from_pretrained(tmp_path / "model")
    companion = load_file(tmp_path / "lora" / "pytorch_lora_weights.patch.safetensors")
    assert not model.load_state_dict(companion, strict=False).unexpected_keys
    assert torch.equal(model.patch_embedding.weight, release.patch_state()["patch_embedding.weight"])


def test_peft_applies_an_adapter_of_ours_as_we_merge_it(omni: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    from avatarctl.models.omniavatar import OmniAvatarTransformer

    convert(omni, tmp_path / "lora", "peft")
    # Other audio weights and another patch embedding than the adapter's, to be replaced by it.
    start = release.base_state() | release.patch_state(seed=8) | release.audio_state(seed=9)
    save_file(start, tmp_path / "start.safetensors")
    convert(tmp_path / "start.safetensors", tmp_path / "start", "diffusers")
    model = OmniAvatarTransformer.from_pretrained(tmp_path / "start")
    applied = PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload()
    close(applied.state_dict(), in_diffusers(whole_model()))


def comfyui(model: State, files: list[Path]) -> State:
    """What ComfyUI makes of a model under `diffusion_model.` and LoRA files (spec/field.md 4a): two spellings
    of every weight are known; a missing alpha means a scale of 1; what no key names is left out."""
    lora = {name: tensor for file in files for name, tensor in load_file(file).items()}
    patched = dict(model)
    for name, weight in model.items():
        module = name.removesuffix(".weight")
        for key in (f"diffusion_model.{module}", "lora_unet_" + module.replace(".", "_")):
            for a, b in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
                if f"{key}.{a}.weight" in lora:
                    down, up = lora[f"{key}.{a}.weight"], lora[f"{key}.{b}.weight"]
                    alpha = lora.get(f"{key}.alpha")
                    scale = 1.0 if alpha is None else alpha.item() / down.shape[0]
                    patched[name] = weight + scale * (up @ down)
            if f"{key}.diff" in lora:
                patched[name] = weight + lora[f"{key}.diff"]
        if name.endswith(".bias") and f"diffusion_model.{name[:-5]}.diff_b" in lora:
            patched[name] = weight + lora[f"diffusion_model.{name[:-5]}.diff_b"]
    return patched


def test_comfyui_applies_an_adapter_of_ours_as_we_merge_it(omni: Path, tmp_path: Path) -> None:
    convert(omni, tmp_path / "lora.safetensors", "comfyui")
    patched = comfyui(release.base_state(), [tmp_path / "lora.safetensors"])
    close(patched, release.merged(release.base_state(), release.lora_pairs(), SCALE))


def test_comfyui_and_we_agree_on_differences(base: Path, tmp_path: Path) -> None:
    lora = {
        "diffusion_model.blocks.0.norm3.diff": torch.full((release.WIDTH,), 0.25),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.full((release.FFN,), 0.5),
        "diffusion_model.blocks.1.self_attn.q.diff": torch.full((release.WIDTH, release.WIDTH), 0.125),
    }
    save_file(lora, tmp_path / "diff.safetensors")
    convert(tmp_path / "diff.safetensors", tmp_path / "whole.safetensors", base=base, merge=True)
    expected = comfyui(release.base_state(), [tmp_path / "diff.safetensors"])
    close(loaded(tmp_path / "whole.safetensors"), expected)
    convert(tmp_path / "diff.safetensors", tmp_path / "again.safetensors", "comfyui")
    same(loaded(tmp_path / "again.safetensors"), lora)


def test_a_kohya_lora_merges_as_comfyui_merges_it(base: Path, tmp_path: Path) -> None:
    lora = {}
    for module, pair in release.lora_pairs().items():
        flat = "lora_unet_" + module.replace(".", "_")
        lora |= {f"{flat}.lora_down.weight": pair["A"], f"{flat}.lora_up.weight": pair["B"]}
        if module.startswith("blocks.0."):
            lora[f"{flat}.alpha"] = torch.tensor(3.0)
    save_file(lora, tmp_path / "kohya.safetensors")
    expected = comfyui(release.base_state(), [tmp_path / "kohya.safetensors"])
    convert(tmp_path / "kohya.safetensors", tmp_path / "whole.safetensors", base=base, merge=True)
    close(loaded(tmp_path / "whole.safetensors"), expected)
    # Written for ComfyUI again, with the alphas that were missing stated.
    convert(tmp_path / "kohya.safetensors", tmp_path / "again.safetensors", "comfyui")
    close(comfyui(release.base_state(), [tmp_path / "again.safetensors"]), expected)


# Merge and extract


def test_merging_gives_the_sum_and_the_adapters_channels(omni: Path, base: Path, tmp_path: Path) -> None:
    convert(omni, tmp_path / "whole", base=base, merge=True)
    close(loaded(tmp_path / "whole"), whole_model())
    weight_file = read_weight_file(tmp_path / "whole")
    assert (weight_file.kind, weight_file.sizes.in_channels, weight_file.missing) == ("model", 33, ())
    own = read_own(weight_file.metadata)
    assert own.conventions["audio_offset"] == 1
    assert own.operations[0]["operation"] == "merge" and own.operations[0]["base"] == "wan"
    assert weight_file.metadata["modelspec.architecture"] == "wan2.1-t2v/omniavatar"


def test_the_strength_multiplies_what_is_added_and_nothing_else(
    omni: Path, base: Path, tmp_path: Path
) -> None:
    convert(omni, tmp_path / "whole", base=base, merge=True, strength=0.5)
    replaced = release.audio_state() | release.patch_state()
    close(
        loaded(tmp_path / "whole"),
        release.merged(release.base_state(), release.lora_pairs(), SCALE / 2, replaced),
    )


def test_a_sum_is_rounded_once(omni: Path, tmp_path: Path) -> None:
    """Into bfloat16, and into float32 from a bfloat16 base without a stop at bfloat16."""
    base = release.write_base(tmp_path / "base16.safetensors", torch.bfloat16)
    state = release.base_state(dtype=torch.bfloat16)
    name = "blocks.0.self_attn.q.weight"
    pair = release.lora_pairs()["blocks.0.self_attn.q"]
    exact = state[name].float() + SCALE * (pair["B"] @ pair["A"])
    # One rounding step of slack: the order of the sum in a matrix product is not fixed.
    for dtype, out, step in (
        (None, torch.bfloat16, 2**-7),
        ("F16", torch.float16, 2**-10),
        ("F32", torch.float32, 1e-6),
    ):
        path = tmp_path / f"{dtype}.safetensors"
        convert(omni, path, base=base, merge=True, dtype=dtype)
        held = loaded(path)[name]
        assert held.dtype == out
        torch.testing.assert_close(held.float(), exact.to(out).float(), rtol=step, atol=1e-7)


def test_what_was_merged_can_be_extracted(omni: Path, base: Path, tmp_path: Path) -> None:
    convert(omni, tmp_path / "whole", base=base, merge=True)
    convert(tmp_path / "whole", tmp_path / "lora", base=base, extract=True)
    assert read_weight_file(tmp_path / "lora").kind == "adapter"
    convert(tmp_path / "lora", tmp_path / "again", base=base, merge=True)
    close(loaded(tmp_path / "again"), whole_model())


def test_an_extraction_that_fits_no_file_is_refused_before_it_is_computed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = release.base_state()
    for name in ("blocks.0.ffn.0.weight", "blocks.0.ffn.0.bias"):
        state[name] = state[name] + 1
    save_file(state, tmp_path / "trained.safetensors")
    asked = {"base": base, "extract": True, "rank": 2}

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed")

    with monkeypatch.context() as patch:
        patch.setattr("avatarctl.weights.extract.factorise", fail)
        with pytest.raises(UnusableWeights, match=r"1 difference .*ffn\.0\.bias .--to comfyui holds them"):
            convert(tmp_path / "trained.safetensors", tmp_path / "lora", "peft", **asked)
    done = convert(tmp_path / "trained.safetensors", tmp_path / "lora.safetensors", "comfyui", **asked)
    assert done.tensors == 4


def test_a_full_release_keeps_the_name_that_the_published_scripts_know(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    torch.save(release.omniavatar_state(), folder / "pytorch_model.pt")
    (folder / "config.json").write_text(json.dumps({"train_architecture": "full"}))
    assert convert(folder, tmp_path / "out").files == ("pytorch_model.safetensors", "config.json")
    same(loaded(tmp_path / "out"), release.omniavatar_state())
    done = convert(base, tmp_path / "wan2")
    assert done.files == ("diffusion_pytorch_model.safetensors",)


def test_an_adapter_for_another_base_is_refused(omni: Path, base: Path, tmp_path: Path) -> None:
    wide = {name: tensor for name, tensor in release.base_state().items() if not name.startswith("blocks.3.")}
    save_file(wide, tmp_path / "short.safetensors")
    with pytest.raises(UnusableWeights, match=r"blocks\.3.*which the base .*short\.safetensors lacks"):
        convert(omni, tmp_path / "out", base=tmp_path / "short.safetensors", merge=True)
    with pytest.raises(UnusableWeights, match="is no adapter"):
        convert(base, tmp_path / "out", base=base, merge=True)
    with pytest.raises(UnusableWeights, match="is no full model"):
        convert(omni, tmp_path / "out", base=omni, merge=True)
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_another_convention_is_refused(omni: Path, tmp_path: Path) -> None:
    base = tmp_path / "trained.safetensors"
    metadata = {"avatarctl.conventions": json.dumps({"audio_offset": 0})}
    save_file(release.omniavatar_state(), base, metadata)
    with pytest.raises(UnusableWeights, match=r"another convention.*trained.*audio_offset 1 and 0"):
        convert(omni, tmp_path / "out", base=base, merge=True)


# Channels and dtype


@pytest.mark.parametrize("channels", [49, 65])
def test_new_channels_are_zero_and_the_old_ones_stay(channels: int, omni: Path, tmp_path: Path) -> None:
    convert(omni, tmp_path / "wide", channels=channels)
    weight = loaded(tmp_path / "wide")["patch_embedding.weight"]
    assert weight.shape == (release.WIDTH, channels, 1, 2, 2)
    assert torch.equal(weight[:, :33], release.patch_state()["patch_embedding.weight"])
    assert not weight[:, 33:].any()
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["model_config"]["in_dim"] == channels
    assert read_weight_file(tmp_path / "wide").audio_offset == 1, "the weights are still those of the release"
    with pytest.raises(UsageError, match=f"has {channels} input channels, and 33 would lose some"):
        convert(tmp_path / "wide", tmp_path / "narrow", channels=33)
    convert(tmp_path / "wide", tmp_path / "narrow", channels=33, drop_channels=True)
    same(loaded(tmp_path / "narrow"), release.adapter_state())


def test_a_plain_base_gets_channels_and_a_word_about_its_audio(base: Path, tmp_path: Path) -> None:
    done = convert(base, tmp_path / "wide", channels=33)
    assert any("16 to 33" in line and "no audio layers" in line for line in done.did)
    weight = loaded(tmp_path / "wide")["patch_embedding.weight"]
    assert torch.equal(weight[:, :16], release.base_state()["patch_embedding.weight"])
    assert not weight[:, 16:].any()


def test_image_to_video_channels_are_not_ours_to_extend(tmp_path: Path) -> None:
    source = release.write_base(tmp_path / "i2v.safetensors", channels=36)
    with pytest.raises(UnusableWeights, match="36 input channels mean other things"):
        convert(source, tmp_path / "out", channels=49)


def test_a_lora_alone_has_no_channels(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in release.adapter_state().items() if "lora" in name}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(UnusableWeights, match="no channels to change"):
        convert(tmp_path / "lora.safetensors", tmp_path / "out", channels=49)


def test_float32_islands_stay_and_nothing_is_made_wider_for_them(tmp_path: Path) -> None:
    source = release.write_model(tmp_path / "full.safetensors")
    convert(source, tmp_path / "half.safetensors", dtype="BF16")
    for name, tensor in loaded(tmp_path / "half.safetensors").items():
        island = "time_embedding" in name or name.endswith("modulation") or "norm3" in name
        assert tensor.dtype == (torch.float32 if island else torch.bfloat16), name
        assert torch.equal(tensor, release.omniavatar_state()[name].to(tensor.dtype)), name
    source = release.write_model(tmp_path / "half16.safetensors", torch.bfloat16)
    convert(source, tmp_path / "again.safetensors", dtype="F16")
    assert {t.dtype for t in loaded(tmp_path / "again.safetensors").values()} == {torch.float16}


def test_values_too_large_for_float16_are_refused_unless_allowed(tmp_path: Path) -> None:
    state = release.base_state()
    state["head.head.bias"][3] = 1e6
    save_file(state, tmp_path / "large.safetensors")
    with pytest.raises(UnusableWeights, match=r"head\.head\.bias.*NaN or infinity"):
        convert(tmp_path / "large.safetensors", tmp_path / "half.safetensors", dtype="F16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.safetensors"]
    convert(tmp_path / "large.safetensors", tmp_path / "half.safetensors", dtype="F16", allow_nonfinite=True)
    assert torch.isinf(loaded(tmp_path / "half.safetensors")["head.head.bias"][3])


# Events and previews


def test_progress_counts_every_byte_once(omni: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    request = ConvertRequest(omni, tmp_path / "lora.safetensors", "comfyui")
    done = write(plan_conversion(request, seen.append), seen.append)
    moved = [event for event in seen if isinstance(event, BytesMoved)]
    counts = [event.done for event in moved]
    assert counts == sorted(counts) and counts[-1] == done.bytes == moved[0].total
    assert done.bytes == sum(
        tensor.numel() * tensor.element_size() for tensor in release.adapter_state().values()
    ) + 4 * len(release.lora_pairs())


def test_a_preview_writes_nothing_and_computes_no_extraction(
    omni: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = preview_conversion(ConvertRequest(omni, tmp_path / "out", "peft"), silent)
    assert told["files"] == ["adapter_model.safetensors", "adapter_config.json"] and told["tensors"] == 88
    convert(omni, tmp_path / "whole", base=base, merge=True)

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("an extraction was computed")

    monkeypatch.setattr("avatarctl.pipelines.convert_steps.extract_adapter", fail)
    request = ConvertRequest(tmp_path / "whole", tmp_path / "out", base=base, extract=True)
    assert preview_conversion(request, silent)["files"] is None
    assert not (tmp_path / "out").exists()


def test_an_image_to_video_model_is_renamed_with_its_image_layers(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    shapes = published_tables.wan(release.WIDTH, 64, 2, 36, text=16, freq=32, image=1280)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(state, tmp_path / "i2v.safetensors")
    convert(tmp_path / "i2v.safetensors", tmp_path / "there", "diffusers")
    model, told = WanTransformer3DModel.from_pretrained(tmp_path / "there", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert torch.equal(model.blocks[1].attn2.add_k_proj.weight, state["blocks.1.cross_attn.k_img.weight"])
    convert(tmp_path / "there", tmp_path / "back.safetensors")
    same(loaded(tmp_path / "back.safetensors"), state)


def test_an_assumed_audio_offset_does_not_become_a_stated_one(omni: Path, tmp_path: Path) -> None:
    bare = tmp_path / "renamed.pt"
    bare.write_bytes((omni / "pytorch_model.pt").read_bytes())
    convert(bare, tmp_path / "assumed.safetensors")
    again = read_weight_file(tmp_path / "assumed.safetensors")
    assert (again.audio_offset, again.audio_offset_assumed) == (1, True)
    convert(omni, tmp_path / "stated.safetensors", audio_offset=0)
    stated = read_weight_file(tmp_path / "stated.safetensors")
    assert (stated.audio_offset, stated.audio_offset_assumed) == (0, False)
    assert stated.audio_offset_rule == "the file's metadata"
