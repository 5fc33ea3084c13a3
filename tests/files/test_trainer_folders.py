"""Checkpoint folders that trainers cut into parts are named for what they are, with the way out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from avatarctl.errors import UnusableWeights
from avatarctl.files.source import open_weights
from avatarctl.weights.recognise import read_weight_file
from tests.weights import release

DEEPSPEED = ("checkpoint of DeepSpeed", "zero_to_fp32.py")
DCP = ("distributed checkpoint of torch", "dcp_to_torch")
BLOCKS = ("files by block", "diffusion_pytorch_model.safetensors.index.json")

RANKS = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
FOLDERS: dict[str, tuple[list[str], tuple[str, str]]] = {
    "ZeRO 2": (["zero_to_fp32.py", "latest", "global_step5/mp_rank_00_model_states.pt",
                *(f"global_step5/{name}" for name in RANKS)], DEEPSPEED),
    "ZeRO 2, its step": (["mp_rank_00_model_states.pt", *RANKS], DEEPSPEED),
    "ZeRO 3, its step": ([f"zero_pp_rank_{rank}_mp_rank_00_{part}_states.pt" for rank in (0, 1)
                          for part in ("model", "optim")], DEEPSPEED),
    "DeepSpeed by accelerate": (["zero_to_fp32.py", "latest", "scheduler.bin", "random_states_0.pkl",
                                 "pytorch_model/mp_rank_00_model_states.pt"], DEEPSPEED),
    "a run of it": (["logs/events", "checkpoint-100/zero_to_fp32.py", "checkpoint-100/latest"], DEEPSPEED),
    "DCP": ([".metadata", "__0_0.distcp", "__1_0.distcp"], DCP),
    "FSDP by accelerate": (["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp",
                            "optimizer_0/__0_0.distcp", "scheduler.bin"], DCP),
    "a run of FSDP": (["checkpoint-9/pytorch_model_fsdp_0/__0_0.distcp"], DCP),
    "blocks": (["block_0.safetensors", "block_1.safetensors", "non_block.safetensors"], BLOCKS),
    "blocks alone": (["block_0.safetensors", "block_17.safetensors"], BLOCKS),
}  # fmt: skip


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_named_for_what_it_is(name: str, tmp_path: Path) -> None:
    names, (what, way_out) = FOLDERS[name]
    fill(tmp_path, names)
    with pytest.raises(UnusableWeights) as told:
        open_weights(tmp_path)
    assert what in told.value.what and way_out in (told.value.fix or "")
    assert str(told.value.where).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("part", "others", "way_out"),
    [
        ("__0_0.distcp", [], DCP),
        (".metadata", ["__0_0.distcp"], DCP),
        (RANKS[0], [], DEEPSPEED),
        ("block_1.safetensors", ["non_block.safetensors"], BLOCKS),
        ("non_block.safetensors", ["block_0.safetensors"], BLOCKS),
    ],
)
def test_a_part_of_one_is_named_too(
    part: str, others: list[str], way_out: tuple[str, str], tmp_path: Path
) -> None:
    fill(tmp_path, [part, *others])
    with pytest.raises(UnusableWeights) as told:
        open_weights(tmp_path / part)
    assert way_out[0] in told.value.what and way_out[1] in (told.value.fix or "")


def test_a_file_with_the_name_of_a_block_and_no_others_is_read(tmp_path: Path) -> None:
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "block_0.safetensors")
    assert list(open_weights(tmp_path / "block_0.safetensors").tensors) == ["x"]


def test_what_was_gathered_already_is_read(tmp_path: Path) -> None:
    names, _ = FOLDERS["ZeRO 2"]
    fill(tmp_path, names)
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert list(open_weights(tmp_path).tensors) == ["w"]


def test_weights_of_the_second_stage_are_read_by_their_file(tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {"w": torch.ones(2)}, "global_steps": 5}, path)
    for named in (path, tmp_path):
        assert list(open_weights(named).tensors) == ["w"]


def test_blocks_with_their_index_are_one_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    files = {
        "blocks.0.x": "block_0.safetensors",
        "blocks.1.x": "block_1.safetensors",
        "y": "non_block.safetensors",
    }
    for name, file in files.items():
        save_file({name: np.ones(2, np.float32)}, folder / file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    raw = open_weights(folder)
    assert raw.tensors.keys() == files.keys()
    assert not any("not read" in note for note in raw.notes)
    with pytest.raises(UnusableWeights, match="holds no weight file"):
        open_weights(tmp_path)


def test_a_folder_of_other_things_holds_no_weights(tmp_path: Path) -> None:
    fill(tmp_path, ["logs/events", "metadata", "zero/readme.txt", "block.txt"])
    with pytest.raises(UnusableWeights, match="holds no weight file"):
        open_weights(tmp_path)


@pytest.mark.parametrize("kind", ["all", "one", "LoRA"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_placeholders_of_the_third_stage(kind: str, suffix: str, tmp_path: Path) -> None:
    """What a process saves that did not gather: every weight has shape [0]."""
    state = release.adapter_state() if kind == "LoRA" else release.base_state()
    empty = list(state)[:1] if kind == "one" else list(state)
    state |= {name: torch.empty(0, dtype=torch.bfloat16) for name in empty}
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save({"module": state}, path)
    else:
        from safetensors.torch import save_file as save

        save(state, path)
    with pytest.raises(UnusableWeights) as told:
        read_weight_file(path)
    assert f"{len(empty)} of {len(state)} tensors have shape [0]" in told.value.what
    assert "ZeRO-3" in told.value.what and "gather" in (told.value.fix or "")
