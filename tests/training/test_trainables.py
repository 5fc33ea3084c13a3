"""What is trained, and that it moves: names as published, float32, nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from avatarctl.errors import UnusableWeights, UsageError
from avatarctl.models.omniavatar import OmniAvatarTransformer
from avatarctl.models.precision import cast
from avatarctl.registry import configure
from avatarctl.training.optimizer import Optimizer
from avatarctl.training.trainables import Trainables, make_trainable
from avatarctl.weights.layouts import OMNIAVATAR

TRAIN = replace(configure("model.name=omniavatar-1.3b").train, lora_rank=4, lora_alpha=2.0)


def network(seed: int = 0) -> OmniAvatarTransformer:
    torch.manual_seed(seed)
    made = OmniAvatarTransformer(
        num_attention_heads=2, attention_head_dim=12, in_channels=33, text_dim=8, freq_dim=16, ffn_dim=32,
        num_layers=4, audio_input_dim=12, audio_hidden_size=4,
    )  # fmt: skip
    return made.eval()


def velocity(dit: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    x, text, audio = torch.randn(2, 33, 2, 4, 4), torch.randn(2, 5, 8), torch.randn(2, 5, 12)
    made: torch.Tensor = dit(x, torch.tensor([700.0, 20.0]), text, audio)
    return made


def trained(seed: int = 3) -> tuple[OmniAvatarTransformer, Trainables]:
    dit = network()
    return dit, make_trainable(dit, OMNIAVATAR, TRAIN, seed)


def test_an_adapter_has_the_tensors_of_a_published_one() -> None:
    """Pairs on 10 layers of each block; patch embedding and audio layers whole (spec/omniavatar.md i)."""
    _, made = trained()
    assert len([name for name in made.parameters if ".lora_" in name]) == 4 * 10 * 2
    assert made.parameters["blocks.3.self_attn.q.lora_A.weight"].shape == (4, 24)
    assert made.parameters["blocks.3.ffn.0.lora_B.weight"].shape == (32, 4)
    whole = {name for name in made.parameters if ".lora_" not in name}
    assert whole == {
        "patch_embedding.weight", "patch_embedding.bias", "audio_proj.proj.weight", "audio_proj.proj.bias",
        "audio_proj.norm_out.weight", "audio_proj.norm_out.bias", "audio_cond_projs.0.weight",
        "audio_cond_projs.0.bias",
    }  # fmt: skip


def test_an_adapter_starts_as_nothing_at_all() -> None:
    before = velocity(network())
    dit, _ = trained()
    assert torch.equal(velocity(dit), before)


def test_adapters_are_drawn_from_the_seed_and_leave_the_global_generator() -> None:
    networks = [network() for _ in range(3)]
    torch.manual_seed(11)
    before = torch.get_rng_state()
    made = zip(networks, (3, 3, 4), strict=True)
    one, same, other = (make_trainable(dit, OMNIAVATAR, TRAIN, seed).state() for dit, seed in made)
    assert torch.equal(torch.get_rng_state(), before)
    name = "blocks.0.self_attn.q.lora_A.weight"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])


def test_only_what_is_trained_gets_gradients() -> None:
    dit, made = trained()
    velocity(dit).square().mean().backward()
    own = {id(parameter) for parameter in made.parameters.values()}
    for name, parameter in dit.named_parameters():
        assert parameter.requires_grad == (id(parameter) in own), name
        assert (parameter.grad is not None) == (id(parameter) in own), name


def test_a_bfloat16_base_is_trained_in_float32_and_adapters_move_at_1e_4() -> None:
    """In bfloat16 a weight of 0.05 and more stands still at this rate (spec/omniavatar.md j 6)."""
    dit = cast(network(), torch.bfloat16)
    made = make_trainable(dit, OMNIAVATAR, TRAIN, 3)
    assert {parameter.dtype for parameter in made.parameters.values()} == {torch.float32}
    frozen = dit.blocks[0].attn1.to_q.base_layer.weight
    assert frozen.dtype == torch.bfloat16
    optimizer = Optimizer(made.parameters, replace(TRAIN, learning_rate=1e-4, weight_decay=0.0))
    before = {name: tensor.clone() for name, tensor in made.state().items()}
    for step in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            loss = velocity(dit).float().square().mean()
        loss.backward()
        optimizer.step(step)
    name = "blocks.1.self_attn.v.lora_A.weight"
    large = before[name].abs() > 0.05
    moved = (made.state()[name] - before[name]).abs()[large]
    assert large.sum() > 10 and (moved > 2e-4).float().mean() > 0.8
    name = "patch_embedding.weight"
    assert (made.state()[name] != before[name]).float().mean() > 0.9


def test_time_stays_float32_below_autocast() -> None:
    """A bfloat16 timestep would be rounded to another one."""
    dit = cast(network(), torch.bfloat16)
    make_trainable(dit, OMNIAVATAR, TRAIN, 3)
    seen = []
    dit.condition_embedder.time_embedder.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = velocity(dit)
    assert seen == [torch.float32] and out.dtype == torch.bfloat16


def test_every_weight_is_trained_in_full_mode() -> None:
    dit = network()
    made = make_trainable(dit, OMNIAVATAR, replace(TRAIN, mode="full"), 3)
    assert made.count == sum(parameter.numel() for parameter in dit.parameters())
    assert made.parameters.keys() == OMNIAVATAR.key_map.rename_to_original(dit.state_dict()).keys()


def test_targets_are_original_names() -> None:
    made = make_trainable(network(), OMNIAVATAR, replace(TRAIN, lora_targets=("self_attn.q", "ffn.2")), 3)
    assert made.modules == tuple(
        sorted(f"blocks.{block}.{name}" for block in range(4) for name in ("self_attn.q", "ffn.2"))
    )
    with pytest.raises(UsageError, match=r"no layer is named 'to_q'.*there are ffn.0, ffn.2, k, o, q, v"):
        make_trainable(network(), OMNIAVATAR, replace(TRAIN, lora_targets=("to_q",)), 3)


def test_weights_of_another_run_are_refused() -> None:
    _, made = trained()
    state = made.state()
    made.load({name: tensor + 1 for name, tensor in state.items()})
    assert all(bool((made.state()[name] == state[name]).all()) for name in state)  # the same memory
    with pytest.raises(UnusableWeights, match="1 tensors are on one side only"):
        made.load({name: tensor for name, tensor in state.items() if name != "patch_embedding.bias"})
    with pytest.raises(UnusableWeights, match=r"is \[2, 24\], and this run trains \[4, 24\]"):
        name = "blocks.0.self_attn.q.lora_A.weight"
        made.load({**state, name: state[name][:2]})


def test_moments_of_other_weights_are_refused() -> None:
    _, made = trained()
    optimizer = Optimizer(made.parameters, TRAIN)
    with pytest.raises(UnusableWeights, match="moments of other weights"):
        optimizer.load({"blocks.9.self_attn.q.lora_A.weight.exp_avg": torch.zeros(4, 24)})
