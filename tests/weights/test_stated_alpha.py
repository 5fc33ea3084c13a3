"""Whose word on alpha counts, and what is no plain LoRA: against peft where peft can say it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avatarctl.errors import UnusableWeights
from avatarctl.files.source import RawWeights
from avatarctl.files.tensors import ArrayTensor
from avatarctl.weights.describe import describe, lines
from avatarctl.weights.recognise import read_weight_file, recognise
from avatarctl.weights.stated_alpha import CHANGES_THE_UPDATE, HARMLESS
from avatarctl.weights.weight_file import WeightFile

WIDTH, RANK = 48, 4
MODULES = [
    f"blocks.{i}.{part}.{end}" for i in range(2) for part in ("attn1", "attn2") for end in ("to_q", "to_k")
]
PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8}


def read(
    form: str = "{module}.lora_{ab}.weight",
    config: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    rank: int = RANK,
) -> WeightFile:
    """A LoRA of diffusers' modules under names of `form`."""
    tensors = {}
    for module in MODULES:
        for ab, shape in (("A", (rank, WIDTH)), ("B", (WIDTH, rank))):
            original = module.replace("attn1.to_", "self_attn.").replace("attn2.to_", "cross_attn.")
            words = {"module": module, "ab": ab, "original": original, "flat": original.replace(".", "_"),
                     "way": {"A": "down", "B": "up"}[ab]}  # fmt: skip
            tensors[form.format(**words)] = ArrayTensor(np.zeros(shape, "<f4"), "F32")
    path = Path("lora.safetensors")
    raw = RawWeights(path, (path,), "safetensors", tensors, metadata or {}, config or {})
    return recognise(raw)


def scales(weight_file: WeightFile) -> set[float]:
    return {weight_file.scale_of(pair) for pair in weight_file.lora_pairs.values()}


TRANSFORMER = "transformer.{module}.lora_{ab}.weight"
COMFYUI = "diffusion_model.{original}.lora_{ab}.weight"
ORIGINAL = "{original}.lora_{ab}.weight"
KOHYA = "lora_unet_{flat}.lora_{way}.weight"


def of_diffusers(**fields: object) -> dict[str, str]:
    return {
        "lora_adapter_metadata": json.dumps({name.replace("__", "."): each for name, each in fields.items()})
    }


# kohya's header


@pytest.mark.parametrize(("form", "scale"), [(KOHYA, 0.25), (COMFYUI, 1), (TRANSFORMER, 1), (ORIGINAL, 1)])
def test_kohyas_alpha_counts_beside_kohyas_names_only(form: str, scale: float) -> None:
    """`convert_lora.py --target other` has multiplied it into the matrices (spec/field.md 4a)."""
    weight_file = read(form, metadata={"ss_network_alpha": "1.0", "ss_network_dim": "4"})
    assert scales(weight_file) == {scale}
    assert any("ss_network_alpha 1.0 is not applied" in note for note in weight_file.notes) == (scale == 1)


def test_a_header_of_kohya_is_no_reason_to_speak_where_something_states_alpha() -> None:
    weight_file = read(COMFYUI, config=PEFT, metadata={"ss_network_alpha": "1.0"})
    assert scales(weight_file) == {2}
    assert not any("ss_network_alpha" in note for note in weight_file.notes)


# Patterns


def by_peft(folder: Path, **fields: Any) -> dict[str, float]:
    """Has peft write an adapter into `folder`; the scale of each module as peft reads it from there."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

    def network() -> Any:
        root = torch.nn.Module()
        for module in MODULES:
            at = root
            *parents, name = module.split(".")
            for each in parents:
                if not hasattr(at, each):
                    at.add_module(each, torch.nn.Module())
                at = getattr(at, each)
            at.add_module(name, torch.nn.Linear(WIDTH, WIDTH))
        return root

    config = peft.LoraConfig(target_modules=["to_q", "to_k"], **fields)
    peft.get_peft_model(network(), config).save_pretrained(folder)
    model = peft.PeftModel.from_pretrained(network(), folder)
    return {
        module: model.get_submodule(f"base_model.model.{module}").scaling["default"] for module in MODULES
    }


def read_scales(folder: Path) -> dict[str, float]:
    weight_file = read_weight_file(folder)
    return {
        module.replace("self_attn.", "attn1.to_").replace("cross_attn.", "attn2.to_"): weight_file.scale_of(
            pair
        )
        for module, pair in weight_file.lora_pairs.items()
    }


@pytest.mark.parametrize(
    "patterns",
    [
        {"alpha_pattern": {"attn1.to_q": 16, "^blocks.1.attn2.to_k": 2}},
        {"alpha_pattern": {r"blocks\.0\.attn1\.to_q": 16}, "rank_pattern": {r"^blocks\.1\.attn2\.to_q$": 8}},
        {"alpha_pattern": {"to_q": 16, "blocks.0.attn1.to_q": 2}},
        {"alpha_pattern": {"blocks.0.attn1.to_q": 2, "to_q": 16}},
        {"alpha_pattern": {"^attn1.to_q": 16, "1.to_q": 2}},
        {"rank_pattern": {"^blocks.0.attn1.to_k": 8}, "use_rslora": True},
    ],
)  # fmt: skip
def test_patterns_mean_what_they_mean_to_peft(tmp_path: Path, patterns: dict[str, Any]) -> None:
    wanted = by_peft(tmp_path, r=RANK, lora_alpha=4, **patterns)
    assert len(set(wanted.values())) > 1 or "1.to_q" in str(patterns)
    assert read_scales(tmp_path) == pytest.approx(wanted)


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("pattern", [r"blocks\.[01]\.attn1\..*", "to_(q|k)", ".*to_q", "a^b", "", "^", r"\d"])
def test_other_regular_expressions_are_refused(field: str, pattern: str) -> None:
    with pytest.raises(UnusableWeights, match=f"{field} has the regular expression"):
        read("base_model.model." + "{module}.lora_{ab}.weight", config=PEFT | {field: {pattern: 8}})


def test_a_pattern_that_names_nothing_is_told() -> None:
    weight_file = read(config=PEFT | {"alpha_pattern": {"blocks.7.attn1.to_q": 1, "to_k": 4}})
    assert scales(weight_file) == {2, 1}
    assert "4 targets by its patterns" in weight_file.scale_rule
    assert any("1 patterns" in note and "blocks.7.attn1.to_q" in note for note in weight_file.notes)


# What is no plain LoRA


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new", {}])
def test_a_start_that_changes_the_base_is_refused(start: object) -> None:
    for config in (PEFT, {"train_architecture": "lora", "lora_alpha": 8}):
        with pytest.raises(UnusableWeights, match="init_lora_weights"):
            read(config=config | {"init_lora_weights": start})
    header = of_diffusers(r=RANK, lora_alpha=8, init_lora_weights=start)
    with pytest.raises(UnusableWeights, match="init_lora_weights"):
        read(metadata=header)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "Gaussian", "kaiming", "eva", "orthogonal"])
def test_a_start_that_leaves_the_base_alone_is_read(start: object) -> None:
    assert scales(read(config=PEFT | {"init_lora_weights": start})) == {2}


@pytest.mark.parametrize("name", CHANGES_THE_UPDATE)
def test_an_update_of_another_kind_is_refused(name: str) -> None:
    with pytest.raises(UnusableWeights, match="DoRA" if name == "use_dora" else name):
        read(config=PEFT | {name: [[0, 1]]})
    assert scales(read(config=PEFT | {name: None})) == {2}


def test_every_field_of_pefts_config_is_known() -> None:
    config = pytest.importorskip("peft").LoraConfig
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields - HARMLESS - set(CHANGES_THE_UPDATE) == set()


def test_a_field_that_peft_does_not_have_yet_is_told() -> None:
    weight_file = read(config=PEFT | {"use_tomorrow": True, "use_yesterday": False})
    assert [note for note in weight_file.notes if "use_" in note] == [
        "adapter_config.json says use_tomorrow, which is not known here and is ignored"
    ]


def test_fan_in_fan_out_has_no_effect_on_linear_layers(tmp_path: Path) -> None:
    """peft turns it off for them."""
    wanted = by_peft(tmp_path, r=RANK, lora_alpha=8, fan_in_fan_out=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))
    assert read_scales(tmp_path) == wanted
    assert set(wanted.values()) == {2}


# The release's config


@pytest.mark.parametrize("architecture", [None, "lora", "LoRA", "dit"])
def test_a_stated_alpha_counts_whatever_the_config_calls_the_training(architecture: str | None) -> None:
    config = {"lora_rank": RANK, "lora_alpha": 8}
    weight_file = read(
        ORIGINAL, config if architecture is None else config | {"train_architecture": architecture}
    )
    assert scales(weight_file) == {2}
    assert weight_file.scale_rule == "alpha 8 / rank 4 from config.json"


def test_a_config_of_a_full_model_beside_lora_tensors_is_refused() -> None:
    with pytest.raises(UnusableWeights, match="a full model, and the file has LoRA tensors"):
        read(ORIGINAL, {"train_architecture": "full", "lora_rank": RANK, "lora_alpha": 8})


def test_an_alpha_beyond_every_float_is_refused() -> None:
    with pytest.raises(UnusableWeights, match="not a finite number"):
        read(config=PEFT | {"lora_alpha": 10**400})


# The header


def test_the_files_own_header_wins_over_a_config_beside_it() -> None:
    for config in (PEFT, {"train_architecture": "lora", "lora_rank": RANK, "lora_alpha": 2}):
        header = of_diffusers(transformer__r=RANK, transformer__lora_alpha=1)
        assert scales(read(TRANSFORMER, config, header)) == {0.25}


def test_of_a_pipelines_parts_the_one_of_the_tensors_counts() -> None:
    header = of_diffusers(transformer__lora_alpha=4, text_encoder__lora_alpha=32)
    for form in (TRANSFORMER, COMFYUI, "{module}.lora_{ab}.weight"):
        assert scales(read(form, metadata=header)) == {1}
    bare = of_diffusers(lora_alpha=8, text_encoder__lora_alpha=32)
    assert scales(read(TRANSFORMER, metadata=bare)) == {2}
    with pytest.raises(UnusableWeights, match="only for text_encoder"):
        read(TRANSFORMER, metadata=of_diffusers(text_encoder__lora_alpha=32))


@pytest.mark.parametrize("text", ["{", "[]", "3", "null", "{}"])
def test_a_damaged_header_is_refused(text: str) -> None:
    with pytest.raises(
        UnusableWeights, match=r"lora_adapter_metadata is (not valid JSON|invalid)|lacks lora_alpha"
    ):
        read(metadata={"lora_adapter_metadata": text})


def test_a_rank_stabilised_alpha_is_shown_as_it_is_stated() -> None:
    weight_file = read(config=PEFT | {"r": 16, "use_rslora": True}, rank=16)
    facts = describe(weight_file)
    assert (facts["alphas"], facts["scales"]) == ([8], [2])
    shown = "\n".join(" ".join(line.split()) for line in lines(facts))
    assert "alpha 8\nscale 2 (alpha 8 / sqrt(rank 16) from adapter_config.json)" in shown
