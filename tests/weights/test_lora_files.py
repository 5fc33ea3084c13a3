"""LoRA files as trainers write them: whose scale holds, differences, wrapped names, convolutions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from avatarctl.errors import UnusableWeights
from avatarctl.events import silent
from avatarctl.files.tensors import read_whole
from avatarctl.pipelines.convert import ConvertRequest, plan_conversion, write
from avatarctl.weights.merge import merge_adapter
from avatarctl.weights.recognise import open_model, read_weight_file
from avatarctl.weights.weight_file import WeightFile
from tests.weights import release
from tests.weights.release import FFN, LAYERS, RANK, WIDTH, State

PAIRS = release.lora_pairs()
BASE = release.base_state()
RATIO = "whose published ratio is 0.5"


def named(
    module: Callable[[str], str] = str, down: str = "lora_A.default", up: str = "lora_B.default"
) -> State:
    """The pairs of all targets, under other names."""
    return {
        f"{module(name)}.{word}.weight": pair[part].clone()
        for name, pair in PAIRS.items()
        for word, part in ((down, "A"), (up, "B"))
    }


def saved(path: Path, state: State) -> WeightFile:
    save_file(state, path)
    return open_model(path)


def merged(lora: WeightFile, folder: Path, base: State = BASE) -> State:
    """The base with the LoRA merged in, read as a run reads it."""
    save_file(base, folder / "base.safetensors")
    whole = merge_adapter(open_model(folder / "base.safetensors"), lora)
    return {name: torch.from_numpy(read_whole(tensor)) for name, tensor in whole.tensors.items()}


def check(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


# The scale that nothing states


@pytest.mark.parametrize(
    ("parts", "scale"),
    [
        ({}, 1),
        (release.patch_state(16), 1),  # a text-to-video model's, trained as well
        (release.patch_state(33) | release.audio_state(), 0.5),
        (release.audio_state(), 0.5),
        (release.patch_state(49), 0.5),
    ],
    ids=["plain", "patch of text to video", "both", "audio layers", "wider patch"],
)
@pytest.mark.parametrize("dots", ["lora_{}.default", "lora_{}"])
def test_what_a_file_holds_decides_its_scale(parts: State, scale: float, dots: str, tmp_path: Path) -> None:
    """Two trainers share this spelling; one of them has a published ratio, and tensors of its own."""
    save_file(named(str, dots.format("A"), dots.format("B")) | parts, tmp_path / "x.safetensors")
    held = read_weight_file(tmp_path / "x.safetensors")
    assert {held.scale_of(pair) for pair in held.lora_pairs.values()} == {scale}
    assert f"no alpha is stated: {scale:g}, " in held.scale_rule
    assert (RATIO in held.scale_rule) == (scale == 1)


def test_a_plain_lora_is_merged_and_converted_whole(tmp_path: Path) -> None:
    lora = saved(tmp_path / "x.safetensors", named())
    check(merged(lora, tmp_path), release.merged(BASE, PAIRS, 1.0))
    request = ConvertRequest(lora.path, tmp_path / "again.safetensors", "comfyui")
    write(plan_conversion(request, silent), silent)
    alphas = {float(value) for name, value in load_file(request.out).items() if name.endswith(".alpha")}
    assert alphas == {RANK}


# Differences


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("blocks.1.diff_m", "blocks.1.modulation"),
        ("head.diff_m", "head.modulation"),
        ("blocks.1.modulation.diff", "blocks.1.modulation"),
        ("blocks.2.norm3.w_norm", "blocks.2.norm3.weight"),
        ("blocks.2.norm3.b_norm", "blocks.2.norm3.bias"),
        ("blocks.0.self_attn.norm_q.diff", "blocks.0.self_attn.norm_q.weight"),
        ("patch_embedding.diff", "patch_embedding.weight"),
        ("time_projection.1.diff_b", "time_projection.1.bias"),
    ],
)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "module."])
def test_a_difference_is_added_to_what_it_is_of(name: str, changed: str, prefix: str, tmp_path: Path) -> None:
    difference = torch.full_like(BASE[changed], 0.25)
    lora = saved(tmp_path / "x.safetensors", {f"{prefix}{name}": difference})
    check(merged(lora, tmp_path), BASE | {changed: BASE[changed] + difference})


def test_a_difference_of_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    state = named() | {"blocks.1.ffn.0.diff_m": torch.zeros(FFN)}
    with pytest.raises(
        UnusableWeights, match=r"1 unknown tensor .*, blocks\.1\.ffn\.0\.diff_m \(the nearest"
    ):
        saved(tmp_path / "x.safetensors", state)


# Wrapped names


def inside(module: str, word: str) -> str:
    """A wrapper around every attention, as in `blocks.0._orig_mod.self_attn.q`."""
    return module.replace(".self_attn", f".{word}.self_attn").replace(".cross_attn", f".{word}.cross_attn")


def flat(module: str, prefix: str = "lora_unet_") -> str:
    return prefix + module.replace(".", "_")


KOHYA = ("lora_down", "lora_up")
WRAPPED: dict[str, Callable[[], State]] = {
    "compiled": lambda: named(lambda name: f"_orig_mod.{name}"),
    "compiled blocks": lambda: named(lambda name: inside(name, "_orig_mod")),
    "compiled layers": lambda: named(lambda name: f"{name}._orig_mod"),
    "compiled matrices": lambda: named(str, "lora_A.default._orig_mod", "lora_B.default._orig_mod"),
    "DDP": lambda: named(lambda name: f"module.{name}"),
    "DDP around a part": lambda: named(lambda name: inside(name, "module")),
    "Fabric": lambda: named(lambda name: f"_forward_module.module.{name}"),
    "PEFT": lambda: named(lambda name: f"base_model.model.{name}", "lora_A", "lora_B"),
    "PEFT, compiled, DDP": lambda: named(lambda name: f"module._orig_mod.base_model.model.{name}"),
    "compiled in PEFT": lambda: named(lambda name: f"base_model.model.{inside(name, '_orig_mod')}"),
    "flat, DDP": lambda: named(lambda name: f"module.{flat(name, 'lora_unet__')}", *KOHYA),
    "flat, compiled": lambda: named(lambda name: flat(f"_orig_mod.{name}"), *KOHYA),
    "flat, compiled, two underscores": lambda: named(
        lambda name: flat(f"_orig_mod.{name}", "lora_transformer__"), *KOHYA
    ),
    "flat, compiled blocks": lambda: named(lambda name: flat(inside(name, "_orig_mod")), *KOHYA),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_of_names_change_nothing(name: str, tmp_path: Path) -> None:
    lora = saved(tmp_path / "x.safetensors", WRAPPED[name]())
    assert lora.lora_pairs.keys() == PAIRS.keys()
    check(merged(lora, tmp_path), release.merged(BASE, PAIRS, 1.0))
    assert any("was taken off" in note for note in lora.notes)
    if name.startswith("flat, compiled") and "blocks" not in name:
        (prefix,) = {key.partition("blocks_")[0] for key in WRAPPED[name]()}
        assert f"the prefix {prefix!r} of 80 names was taken off" in lora.notes


# What no rule covers


@pytest.mark.parametrize(
    ("state", "first", "nearest"),
    [
        (named(lambda name: f"net.{name}"), "net.blocks.0.", "blocks.N.cross_attn.k.lora_A.default.weight"),
        (named(lambda name: flat(name, "lora_dit_"), *KOHYA), "lora_dit_blocks_0_", "lora_unet_blocks_N_"),
        (named(str, "lora_a", "lora_b"), "blocks.0.cross_attn.k.lora_a.", "blocks.N.cross_attn.k.lora_A."),
        (named(lambda name: name.replace("attn.q", "attn.query")), "query.lora_A", "blocks.N.cross_attn.q."),
        (
            named(lambda name: f"diffusion_model.{name.replace('attn.q', 'attn.qq')}"),
            "diffusion_model.blocks.0.cross_attn.qq.", "diffusion_model.blocks.N.cross_attn.q.lora_A.",
        ),
        (
            named(lambda name: flat(name.replace("ffn", "mlp"), "lora_transformer__"), *KOHYA),
            "lora_transformer__blocks_0_mlp_0.", "lora_transformer__blocks_N_ffn_0.lora_down.weight",
        ),
        ({"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(1, 4)}, "model.layers.0.mlp", ""),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(1, 4)}, "down_", ""),
    ],
    ids=[
        "prefix", "flat prefix", "ending", "module", "module behind a prefix", "flat module behind a prefix",
        "another network", "another flat network",
    ],
)  # fmt: skip
def test_strangers_are_refused_with_their_first_names_and_the_nearest_known(
    state: State, first: str, nearest: str, tmp_path: Path
) -> None:
    with pytest.raises(UnusableWeights, match="unknown tensor") as told:
        saved(tmp_path / "x.safetensors", state)
    assert first in told.value.what
    if nearest:
        assert nearest in (told.value.fix or "")
    else:
        assert told.value.fix is None


# Convolutions


def patch_pair(channels: int, kernel: tuple[int, ...] = (1, 2, 2)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    down = torch.randn(RANK, channels, *kernel, generator=generator) * 0.1
    return down, torch.randn(WIDTH, RANK, generator=generator)


@pytest.mark.parametrize("ones", [(), (1, 1, 1)], ids=["a matrix", "a convolution"])
@pytest.mark.parametrize("name", ["diffusion_model.patch_embedding", "lora_unet__patch_embedding"])
def test_a_pair_of_the_patch_embedding_is_merged(name: str, ones: tuple[int, ...], tmp_path: Path) -> None:
    down, up = patch_pair(16)
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up.reshape(*up.shape, *ones)}
    lora = saved(tmp_path / "x.safetensors", state | {f"{name}.alpha": torch.tensor(RANK / 2)})
    assert lora.sizes.in_channels == 16
    weight = BASE["patch_embedding.weight"]
    expected = weight + 0.5 * (up @ down.flatten(1)).reshape(weight.shape)
    check(merged(lora, tmp_path), BASE | {"patch_embedding.weight": expected})


@pytest.mark.parametrize(
    ("channels", "kernel", "says"),
    [
        (36, (1, 2, 2), r"changes patch_embedding\.weight as \[128, 36, 1, 2, 2\].* is \[128, 16, 1, 2, 2\]"),
        (16, (2, 2), r"patch_embedding\.weight has shape \[128, 16, 2, 2\]"),
        (17, (1, 2, 2), "17 input channels"),
    ],
)
def test_a_pair_of_another_patch_embedding_is_refused_by_name(
    channels: int, kernel: tuple[int, ...], says: str, tmp_path: Path
) -> None:
    down, up = patch_pair(channels, kernel)
    state = {"patch_embedding.lora_A.weight": down, "patch_embedding.lora_B.weight": up}
    with pytest.raises(UnusableWeights, match=says):
        merged(saved(tmp_path / "x.safetensors", state), tmp_path)


def test_a_kernel_on_the_wrong_side_is_refused_by_name(tmp_path: Path) -> None:
    down, up = patch_pair(16)
    state = {
        "patch_embedding.lora_A.weight": down,
        "patch_embedding.lora_B.weight": up.reshape(WIDTH, RANK, 1, 1, 1).repeat(1, 1, 1, 2, 2),
    }
    with pytest.raises(UnusableWeights, match=r"lora_B\.weight: shape \[128, 4, 1, 2, 2\] is no LoRA matrix"):
        saved(tmp_path / "x.safetensors", state)


# Files that people brought


@pytest.mark.parametrize(
    ("file", "targets", "differences", "rule"),
    [
        ("diffsynth", 10 * LAYERS, 0, RATIO),
        ("lightx2v", 10 * LAYERS, 49, "no alpha is stated: 1, by comfyui names"),
        ("videoxfun", 10 * LAYERS, 0, "alpha of each target, in the file"),
    ],
)
def test_a_field_case(
    file: str, targets: int, differences: int, rule: str, shared_dir: Path, tmp_path: Path
) -> None:
    path = shared_dir / "field-cases" / f"{file}-lora.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the checkout")
    lora, stored = open_model(path), load_file(path)
    assert (len(lora.lora_pairs), len(lora.differences)) == (targets, differences)
    assert {lora.scale_of(pair) for pair in lora.lora_pairs.values()} == {1}
    assert rule in lora.scale_rule
    found = merged(lora, tmp_path)
    for i in range(LAYERS):
        name = f"blocks.{i}.modulation"
        change = stored.get(f"diffusion_model.blocks.{i}.diff_m", torch.zeros(1))
        torch.testing.assert_close(found[name], BASE[name] + change.float())
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, BASE[name])}
    assert {f"{module}.weight" for module in PAIRS} <= changed
