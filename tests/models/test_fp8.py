"""Weights stored in float8: which, how exactly, and that everything else stays."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from avatarctl.loading.built_in import build_random_modules
from avatarctl.models.fp8 import Float8Linear, store_in_float8, store_layer
from avatarctl.models.precision import cast
from avatarctl.registry import find_model

MODELS = ("cartoon-i2v", "stableavatar-tiny")

MATRIX = re.compile(
    r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)|ffn\.net\.(0\.proj|2))\.weight"
)
"""What is stored, by names of diffusers, written down a second time."""


def layer(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    made.bias = nn.Parameter(made.bias.to(weight.dtype), requires_grad=False)
    return made


def same(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_blocks_are_stored_and_nothing_else_is_touched(name: str, dtype: torch.dtype) -> None:
    network = build_random_modules(find_model(name)).dit
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():  # a fresh norm is all ones, which float8 would hold as well
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    network = cast(network, dtype)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    store_in_float8(network)
    after = network.state_dict()
    stored = {key for key, value in after.items() if value.dtype == torch.float8_e4m3fn}
    assert stored == {key for key in before if MATRIX.fullmatch(key)} and stored
    assert after.keys() - before.keys() == {f"{key}_scale" for key in stored}
    for key in before.keys() - stored:
        assert after[key].dtype == before[key].dtype and torch.equal(after[key], before[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_number_is_the_nearest_that_three_bits_hold(dtype: torch.dtype) -> None:
    """Rows a million times apart in size; the steps of a number in [2^e, 2^(e+1)) are 2^(e-3)."""
    torch.manual_seed(3)
    weight = (torch.randn(6, 500) * 10.0 ** torch.tensor([-3, -2, -1, 0, 2, 3])[:, None]).to(dtype)
    made = layer(weight)
    store_layer(made)
    widened = made.weight.double() * made.weight_scale.double()
    _, exponent = torch.frexp(weight.double())
    step = torch.ldexp(torch.ones(6, 500, dtype=torch.float64), exponent - 4)
    normal = weight.abs().double() >= 2**-6 * made.weight_scale.double()
    assert normal.float().mean() > 0.99
    assert ((widened - weight.double()).abs() <= step / 2)[normal].all()


def test_scales_are_powers_of_two_that_leave_no_room() -> None:
    weight = torch.tensor([[448.0, 1], [449, 1], [0, 0], [-3, 2], [2.0**-120, 0]])
    made = layer(weight)
    store_layer(made)
    assert made.weight_scale.flatten().tolist() == [1, 2, 1, 2.0**-7, 2.0**-100]
    widened = made.weight.float() * made.weight_scale
    assert widened[3].tolist() == [-3, 2], "of few bits, and so exact"
    assert not widened[2].any() and torch.isfinite(widened).all()


def test_a_stored_layer_gives_the_gradient_of_a_wide_one_and_keeps_no_wide_weight() -> None:
    torch.manual_seed(0)
    stored = layer(torch.randn(7, 5))
    store_layer(stored)
    wide = layer(stored.weight.float() * stored.weight_scale)
    wide.bias = stored.bias
    inputs = torch.randn(2, 3, 5)
    gradients, kept = [], []
    for module in (wide, stored):
        kept.clear()
        x = inputs.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.dtype) or each, same):
            out = module(x)
        out.square().sum().backward()
        gradients.append((out.detach(), x.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.allclose(gradients[0][1], gradients[1][1], rtol=1e-6)
    assert kept == [torch.float8_e4m3fn, torch.float32], "the stored weight and its scales"


def test_storing_twice_changes_nothing() -> None:
    made = layer(torch.randn(4, 4))
    store_layer(made)
    first = made.weight.clone(), made.weight_scale.clone()
    store_layer(made)
    assert type(made) is Float8Linear
    assert torch.equal(made.weight.float(), first[0].float()) and torch.equal(made.weight_scale, first[1])


def test_what_is_trained_is_not_stored() -> None:
    network = build_random_modules(find_model("cartoon-i2v")).dit
    network.blocks[0].attn1.to_q.weight.requires_grad_(True)
    store_in_float8(network)
    assert network.blocks[0].attn1.to_q.weight.dtype == torch.float32
    assert network.blocks[1].attn1.to_q.weight.dtype == torch.float8_e4m3fn
