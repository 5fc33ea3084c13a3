"""W + alpha / rank * B @ A, and whole tensors that replace: through files, against layers that stay apart.

The rule of the recorded `lora_in33` (tests/parity), on weights made here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from avatarctl.loading.parts import transformer
from avatarctl.weights.merge import merge_adapter
from avatarctl.weights.recognise import read_weight_file
from avatarctl.weights.weight_file import WeightFile
from tests.weights.published_tables import LINEARS, Shapes, audio, lora, wan

WIDTH, FFN, LAYERS, HEADS, RANK, ALPHA = 48, 64, 6, 2, 4, 2.0
AUDIO, TEXT = 5, 7
INSIDE = dict(
    zip(
        LINEARS,
        ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
         "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"),
        strict=True,
    )
)  # fmt: skip

State = dict[str, Tensor]


def random(shapes: Shapes, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


BASE = random(wan(WIDTH, FFN, LAYERS, text=TEXT, freq=16), 0)
LORA = random(lora(WIDTH, FFN, LAYERS, RANK), 1)
OWN = random(
    audio(WIDTH, LAYERS, hidden=3, features=AUDIO)
    | {"patch_embedding.weight": (WIDTH, 33, 1, 2, 2), "patch_embedding.bias": (WIDTH,)},
    2,
)
CONFIG = {
    "model_config": {"in_dim": 33, "num_heads": HEADS}, "train_architecture": "lora", "lora_rank": RANK,
    "lora_alpha": ALPHA, "lora_target_modules": "q,k,v,o,ffn.0,ffn.2",
}  # fmt: skip


def written(folder: Path) -> tuple[WeightFile, WeightFile]:
    """A plain Wan base in one file and a release folder."""
    save_file(BASE, folder / "base.safetensors")
    release = folder / "release"
    release.mkdir()
    torch.save(LORA | OWN, release / "pytorch_model.pt")
    (release / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return read_weight_file(folder / "base.safetensors"), read_weight_file(release)


def inputs(channels: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((1, channels, 2, 4, 6), (1, 8, TEXT), (1, 5, AUDIO))
    x, text, audio = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, torch.tensor([500.0]), text, audio


@pytest.fixture
def pair(tmp_path: Path) -> tuple[WeightFile, WeightFile]:
    return written(tmp_path)


def beside(layer: nn.Module, down: Tensor, up: Tensor) -> None:
    """The update as a side path of a layer, as it is trained."""
    layer.register_forward_hook(
        lambda _, given, out: (
            out + ALPHA / RANK * nn.functional.linear(nn.functional.linear(given[0], down), up)
        )
    )


@torch.no_grad()
def test_merged_weights_give_what_side_paths_give(pair: tuple[WeightFile, WeightFile]) -> None:
    base, adapter = pair
    merged = transformer(merge_adapter(base, adapter), torch.float32, torch.device("cpu"))
    apart = transformer(merge_adapter(base, adapter, strength=0), torch.float32, torch.device("cpu"))
    plain = apart(*inputs(33))
    for i in range(LAYERS):
        for name in LINEARS:
            prefix = f"blocks.{i}.{name}.lora_"
            beside(
                apart.get_submodule(f"blocks.{i}.{INSIDE[name]}"),
                LORA[f"{prefix}A.default.weight"],
                LORA[f"{prefix}B.default.weight"],
            )
    expected = apart(*inputs(33))
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(merged(*inputs(33)), expected, atol=1e-4, rtol=0)


def test_every_weight_is_what_the_rule_says(pair: tuple[WeightFile, WeightFile]) -> None:
    state = transformer(merge_adapter(*pair), torch.float32, torch.device("cpu")).state_dict()
    for i in range(LAYERS):
        for name in LINEARS:
            module = f"blocks.{i}.{name}"
            down, up = LORA[f"{module}.lora_A.default.weight"], LORA[f"{module}.lora_B.default.weight"]
            expected = BASE[f"{module}.weight"] + ALPHA / RANK * (up @ down)
            found = state[f"blocks.{i}.{INSIDE[name]}.weight"]
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
            assert torch.equal(state[f"blocks.{i}.{INSIDE[name]}.bias"], BASE[f"{module}.bias"])
    for name, tensor in OWN.items():
        assert torch.equal(state[name], tensor)
