"""Names, scales and metadata of what is written, against tables typed from the specification."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from avatarctl.errors import UnusableWeights, UsageError
from avatarctl.events import silent
from avatarctl.families import OmniAvatar
from avatarctl.files.tensors import read_whole
from avatarctl.pipelines.convert import ConvertRequest, plan_conversion, write
from avatarctl.registry import configure
from avatarctl.weights.export import TARGETS, export, with_release_config
from avatarctl.weights.metadata import file_metadata, mismatch, read_own
from avatarctl.weights.recognise import read_weight_file
from avatarctl.weights.weight_file import WeightFile
from tests.weights import release

MODULES = [f"blocks.{i}.{target}" for i in range(release.LAYERS) for target in release.TARGETS]
WHOLE = sorted(release.patch_state() | release.audio_state())


@pytest.fixture
def adapter(tmp_path: Path) -> WeightFile:
    return with_release_config(read_weight_file(release.write_release(tmp_path / "omni")))


@pytest.fixture
def model(tmp_path: Path) -> WeightFile:
    return with_release_config(read_weight_file(release.write_model(tmp_path / "full.safetensors")))


def kohya(path: Path, ranks: dict[str, int], alphas: dict[str, float]) -> Path:
    """A LoRA of kohya's scripts with a rank and an alpha for each module."""
    state = {}
    for module, rank in ranks.items():
        flat = "lora_unet_" + module.replace(".", "_")
        generator = torch.Generator().manual_seed(len(state))
        state[f"{flat}.lora_down.weight"] = torch.randn(rank, release.WIDTH, generator=generator)
        state[f"{flat}.lora_up.weight"] = torch.randn(release.WIDTH, rank, generator=generator)
        state[f"{flat}.alpha"] = torch.tensor(alphas[module])
    save_file(state, path)
    return path


def arguments(network: type) -> set[str]:
    """Of a network's constructor."""
    return {*inspect.signature(network.__init__).parameters} - {"self"}  # type: ignore[misc]


# Names


def test_models_get_the_names_of_their_target(model: WeightFile) -> None:
    names = list(release.omniavatar_state())
    assert sorted(export(model, "original").tensors) == sorted(names)
    assert sorted(export(model, "diffusers").tensors) == sorted(map(release.diffusers_name, names))
    assert sorted(export(model, "comfyui").tensors) == sorted(f"model.diffusion_model.{n}" for n in names)
    with pytest.raises(UsageError, match="--extract lora"):
        export(model, "peft")


def test_an_adapter_for_the_release(adapter: WeightFile) -> None:
    made = export(adapter, "original")
    pairs = [f"{module}.lora_{side}.default.weight" for module in MODULES for side in "AB"]
    assert sorted(made.tensors) == sorted([*pairs, *WHOLE]) and not made.companion
    assert made.documents == {"config.json": release.release_config()}


def test_an_adapter_for_diffusers(adapter: WeightFile) -> None:
    made = export(adapter, "diffusers")
    targets = [release.diffusers_module(module) for module in MODULES]
    assert sorted(made.tensors) == sorted(f"transformer.{t}.lora_{s}.weight" for t in targets for s in "AB")
    assert sorted(made.companion) == sorted(map(release.diffusers_name, WHOLE))
    stated = json.loads(made.metadata["lora_adapter_metadata"])
    assert (stated["transformer.r"], stated["transformer.lora_alpha"]) == (4, 2)
    assert sorted(stated["transformer.target_modules"]) == sorted(targets)


def test_an_adapter_for_peft(adapter: WeightFile) -> None:
    made = export(adapter, "peft")
    targets = [release.diffusers_module(module) for module in MODULES]
    expected = [f"{t}.lora_{s}.weight" for t in targets for s in "AB"]
    expected += map(release.diffusers_name, WHOLE)
    assert sorted(made.tensors) == sorted(f"base_model.model.{name}" for name in expected)
    config = made.documents["adapter_config.json"]
    assert sorted(config["modules_to_save"]) == [
        "audio_cond_projs.0", "audio_proj.norm_out", "audio_proj.proj", "patch_embedding"
    ]  # fmt: skip


def test_an_adapter_for_comfyui_states_every_alpha(adapter: WeightFile) -> None:
    made = export(adapter, "comfyui")
    expected = [f"diffusion_model.{m}.{part}" for m in MODULES for part in ("lora_A.weight", "lora_B.weight")]
    alphas = [f"diffusion_model.{module}.alpha" for module in MODULES]
    assert sorted(made.tensors) == sorted(expected + alphas)
    assert sorted(made.companion) == [f"diffusion_model.{name}" for name in WHOLE]
    for name in alphas:
        assert made.tensors[name].info.dtype == "F32" and made.tensors[name].info.shape == ()
        assert read_whole(made.tensors[name]) == np.float32(2)


def test_a_scale_without_alpha_travels_as_alpha(tmp_path: Path) -> None:
    """The release takes 0.5 where nothing is stated, everybody else 1."""
    torch.save(release.adapter_state(), tmp_path / "step-10.pt")
    bare = with_release_config(read_weight_file(tmp_path / "step-10.pt"))
    assert bare.scale == 0.5 and all(pair.alpha is None for pair in bare.lora_pairs.values())
    assert read_whole(export(bare, "comfyui").tensors["diffusion_model.blocks.0.ffn.0.alpha"]) == 2
    assert export(bare, "original").documents["config.json"]["lora_alpha"] == 2
    assert (
        json.loads(export(bare, "diffusers").metadata["lora_adapter_metadata"])["transformer.lora_alpha"] == 2
    )


# Several ranks and scales


def test_ranks_of_their_own_become_patterns_or_zeros(tmp_path: Path) -> None:
    q, k = "blocks.0.self_attn.q", "blocks.1.self_attn.k"
    path = kohya(tmp_path / "lora.safetensors", {q: 4, k: 6}, {q: 2.0, k: 3.0})
    lora = with_release_config(read_weight_file(path))
    config = export(lora, "peft").documents["adapter_config.json"]
    assert (config["r"], config["lora_alpha"]) == (4, 2)
    assert config["rank_pattern"] == {"blocks.1.attn1.to_k": 6}
    assert config["alpha_pattern"] == {"blocks.1.attn1.to_k": 3}
    made = export(lora, "original")
    assert (
        made.documents["config.json"]["lora_rank"] == 6 and made.documents["config.json"]["lora_alpha"] == 3
    )
    assert "filled with zeros to 6" in made.notes[0]
    down, up = (read_whole(made.tensors[f"{q}.lora_{side}.default.weight"]) for side in "AB")
    held = load_file(path)
    flat = "lora_unet_blocks_0_self_attn_q"
    assert np.array_equal(down[:4], held[f"{flat}.lora_down.weight"]) and not down[4:].any()
    assert np.array_equal(up[:, :4], held[f"{flat}.lora_up.weight"]) and not up[:, 4:].any()
    padded = made.tensors[f"{q}.lora_B.default.weight"]
    pieces = [padded.read(start, min(start + 50, up.size)) for start in range(0, up.size, 50)]
    assert np.array_equal(np.concatenate(pieces), up.reshape(-1)), "read in parts that cut rows"


def test_scales_of_their_own_do_not_fit_the_release(tmp_path: Path) -> None:
    q, k = "blocks.0.self_attn.q", "blocks.1.self_attn.k"
    path = kohya(tmp_path / "lora.safetensors", {q: 4, k: 4}, {q: 2.0, k: 4.0})
    lora = with_release_config(read_weight_file(path))
    with pytest.raises(UnusableWeights, match=r"2 different scales.*comfyui"):
        export(lora, "original")
    assert export(lora, "peft").documents["adapter_config.json"]["alpha_pattern"]


def test_differences_ride_to_comfyui_only(tmp_path: Path) -> None:
    state = {
        "diffusion_model.blocks.0.norm3.diff": torch.ones(release.WIDTH),
        "diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(release.FFN),
        "diffusion_model.blocks.0.ffn.0.diff": torch.ones(release.FFN, release.WIDTH),
    }
    save_file(state, tmp_path / "diff.safetensors")
    weight_file = with_release_config(read_weight_file(tmp_path / "diff.safetensors"))
    assert export(weight_file, "comfyui").tensors.keys() == state.keys()
    for target in ("original", "diffusers", "peft"):
        with pytest.raises(UnusableWeights, match=r"3 differences.*--merge-lora"):
            export(weight_file, target)


def test_a_difference_of_a_bare_parameter(adapter: WeightFile) -> None:
    changed = {"blocks.0.modulation": adapter.tensors["patch_embedding.bias"]}
    made = export(replace(adapter, differences=changed), "comfyui")
    assert "diffusion_model.blocks.0.modulation.diff" in made.tensors


# Configurations


def test_the_config_keeps_what_it_does_not_know(adapter: WeightFile) -> None:
    config = {
        **release.release_config(),
        "wandb": "x",
        "model_config": {"in_dim": 33, "num_heads": 1, "z": 2},
    }
    sizes = replace(adapter.sizes, in_channels=49)
    made = with_release_config(replace(adapter, config=config, sizes=sizes)).config
    assert made["wandb"] == "x"
    assert made["model_config"] == {"in_dim": 49, "num_heads": 1, "z": 2, "audio_hidden_size": 8}


def test_a_full_model_does_not_call_itself_a_lora(model: WeightFile) -> None:
    made = with_release_config(replace(model, config=release.release_config())).config
    assert made["train_architecture"] == "full" and not any(name.startswith("lora") for name in made)


def test_the_diffusers_config_holds_every_constructor_argument(model: WeightFile, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    from avatarctl.models.omniavatar import OmniAvatarTransformer

    config = export(model, "diffusers").documents["config.json"]
    assert config["_class_name"] == "OmniAvatarTransformer"
    assert config.keys() - {"_class_name"} == arguments(OmniAvatarTransformer)
    base = read_weight_file(release.write_base(tmp_path / "base.safetensors"))
    config = export(base, "diffusers").documents["config.json"]
    assert config["_class_name"] == "WanTransformer3DModel"
    assert config.keys() - {"_class_name"} == arguments(WanTransformer3DModel)


def test_a_number_of_heads_that_nobody_states_is_not_guessed(model: WeightFile) -> None:
    with pytest.raises(UnusableWeights, match="number of attention heads is unknown"):
        export(replace(model, heads=0), "diffusers")


# Metadata


def test_conventions_are_those_of_the_family(adapter: WeightFile) -> None:
    config = configure("model.name=omniavatar-14b")
    stated = read_own(file_metadata(adapter, [], {})).conventions
    assert stated == asdict(OmniAvatar().conventions(config))


def test_metadata_says_what_the_file_is(adapter: WeightFile) -> None:
    source = replace(adapter, metadata={"ss_network_dim": "4", "modelspec.title": "mine", "format": "np"})
    made = file_metadata(source, [{"operation": "write"}], {"avatarctl.companion": "x"})
    assert all(isinstance(value, str) for value in made.values())
    assert made["format"] == "pt" and made["modelspec.sai_model_spec"] == "1.0.1"
    assert made["modelspec.architecture"] == "wan2.1-t2v/omniavatar/lora"
    assert made["modelspec.title"] == "mine" and made["ss_network_dim"] == "4"
    own = read_own(made)
    assert (made["avatarctl.family"], made["avatarctl.kind"], own.channels) == ("omniavatar", "adapter", 33)
    assert made["avatarctl.companion"] == "x"
    assert not own.network, "nobody stated it, and a guess in a header would pass for a statement"
    stated = replace(source, heads_stated=True, config={"eps": 1e-5})
    network = read_own(file_metadata(stated, [], {})).network
    assert network == {"num_attention_heads": 1, "attention_head_dim": 128, "eps": 1e-5}
    assert own.config == release.release_config() and own.operations == ({"operation": "write"},)


def test_what_became_untrue_is_not_passed_on(adapter: WeightFile, model: WeightFile) -> None:
    stated = {
        "sshs_model_hash": "0" * 64,
        "sshs_legacy_hash": "0" * 8,
        "ss_network_module": "networks.lora_wan",
        "ss_base_model_version": "wan2.1",
    }
    assert file_metadata(replace(adapter, metadata=stated), [], {}).keys() & stated.keys() == {
        "ss_network_module", "ss_base_model_version",
    }  # fmt: skip
    of_model = file_metadata(replace(model, metadata=stated), [], {})
    assert of_model.keys() & stated.keys() == {"ss_base_model_version"}, "a full model is no LoRA"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("avatarctl.conventions", "{"),
        ("avatarctl.conventions", '{"fps": "25"}'),
        ("avatarctl.conventions", "[1]"),
        ("avatarctl.operations", "[1]"),
        ("avatarctl.config", "3"),
        ("avatarctl.config", "[" * 100_000),
        ("avatarctl.channels", "many"),
        ("avatarctl.channels", "-1"),
    ],
)
def test_metadata_that_we_would_not_write_is_refused(key: str, value: str) -> None:
    with pytest.raises(UnusableWeights, match=key):
        read_own({key: value})


def test_other_conventions_are_named_on_both_sides(adapter: WeightFile, model: WeightFile) -> None:
    assert mismatch(adapter, model) == ""
    assert mismatch(replace(adapter, audio_offset=0), model) == "", "a guess contradicts nobody"
    stated = replace(model, audio_offset_assumed=False)
    assert mismatch(replace(adapter, audio_offset=0), stated) == "audio_offset 0 and 1"
    other = {"avatarctl.conventions": json.dumps({"mask_keep": 1})}
    assert mismatch(adapter, replace(model, metadata=other)) == "mask_keep 0 and 1"


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_conversion_gives_the_same_bytes(target: str, tmp_path: Path) -> None:
    source = release.write_release(tmp_path / "omni")
    folders = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        request = ConvertRequest(source, tmp_path / name / "out", target)
        write(plan_conversion(request, silent), silent)
        folders.append({path.name: path.read_bytes() for path in request.out.iterdir()})
    assert folders[0] == folders[1] and folders[0]
