"""What is counted on fake tensors is what real ones take, to the byte; and it follows the networks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

import pytest
import torch

from avatarctl.errors import AvatarctlError
from avatarctl.live_bytes import LiveBytes
from avatarctl.loading.built_in import build_on_meta
from avatarctl.profiling import extend as extension
from avatarctl.profiling import inference, training
from avatarctl.profiling.account import Account
from avatarctl.profiling.fakes import tensor_bytes, tensors
from avatarctl.profiling.inference import counted_modules, profile_inference
from avatarctl.profiling.training import profile_training
from avatarctl.registry import configure, find_model
from tests.accounts import account

ADAPTED = ("train.mode=lora", "train.lora_rank=4")
TRAINED = [
    ("cartoon-v2v", ("train.batch_size=2",)),
    ("cartoon-i2v", (*ADAPTED, "memory.activation_checkpointing=none")),
    (
        "cartoon-i2v",
        (
            *ADAPTED,
            "memory.base_precision=fp8",
            "memory.activation_checkpointing=block_offload",
            "memory.swap_blocks=2",
            "memory.optimizer_device=cpu",
        ),
    ),
]
SMALL = ("data.width=16", "data.height=16", "data.num_frames=5", "train.batch_size=1")


@pytest.mark.parametrize(("model", "words"), TRAINED)
def test_training_takes_what_was_counted(
    model: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted is what a card does, which reads all rows of a text."""
    monkeypatch.setattr("avatarctl.models.omniavatar.without_padding", lambda text: (text, None))
    row, cfg = wider(model, num_layers=4), configure(f"model.name={model}", *SMALL, *words)
    counted, measured = profile_training(row, cfg), profile_training(row, cfg, "real")
    require_same(counted, measured)
    assert counted.stages["backward"] > counted.stages["load"] > 0
    backward, optimizer, numbers = counted.parts["backward"], counted.parts["optimizer"], counted.trained
    assert 0 < backward["gradients"] <= optimizer["gradients"] == 4 * numbers
    assert optimizer["moments"] == 8 * numbers
    waits = "memory.optimizer_device=cpu" in words
    assert ("moments" in backward) != waits
    assert (counted.host_parts.get("moments") == 8 * numbers) == waits


def require_same(counted: Account, measured: Account) -> None:
    """To the byte, by phase and by what each was made of; and nothing is left over."""
    assert counted.stages == measured.stages and counted.parts == measured.parts
    assert counted.host == measured.host and counted.host_parts == measured.host_parts
    for stage, size in counted.stages.items():
        sizes = counted.parts[stage].values()
        assert sum(sizes) == size and min(sizes, default=1) > 0
    assert sum(counted.host_parts.values()) == counted.host


CHUNKS = ("long_video.num_frames=5", "long_video.overlap_frames=1")
WINDOWS = ("long_video.num_frames=9", "long_video.overlap_frames=5")


@pytest.mark.parametrize(
    ("model", "layers", "words"),
    [
        ("cartoon-v2v", 4, (*CHUNKS, "memory.mode=group", "memory.group_blocks=1")),
        ("stableavatar-tiny", 2, (*WINDOWS, "memory.mode=full")),
    ],
)
def test_inference_takes_what_was_counted(model: str, layers: int, words: tuple[str, ...]) -> None:
    """What waits on the host is counted apart, where that is the device as well."""
    words = ("output.width=16", "output.height=16", *words)
    row, cfg = wider(model, num_layers=layers), configure(f"model.name={model}", *words)
    counted, measured = profile_inference(row, cfg), profile_inference(row, cfg, "real")
    require_same(counted, measured)
    assert (counted.host > 0) == (model == "cartoon-v2v")
    assert {"text", "audio", "image", "condition", "step", "decode"} <= counted.stages.keys()
    away = "weights that come and go" in counted.parts["step"]
    assert away == (model == "cartoon-v2v") and ("weights of text" in counted.parts["step"]) != away
    assert counted.parts["step"]["weights of vae"] == counted.weights["vae"]
    assert "text embeddings" in counted.parts["step"] and "caches" in counted.parts["decode"]
    # A frame waits for whoever writes it: float32 of three colours; one, or as many as a window has.
    assert counted.parts["loop"]["frames"] % (4 * 3 * 16 * 16) == 0


def test_a_validation_takes_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clip is made and judged beside what the training holds; texts are read before."""
    monkeypatch.setattr("avatarctl.models.omniavatar.without_padding", lambda text: (text, None))
    words = (*SMALL, *ADAPTED, "data.num_frames=17", "train.ema=0.9", "memory.swap_blocks=1")
    row, cfg = wider("cartoon-v2v", num_layers=4), configure("model.name=cartoon-v2v", *words)
    without = profile_training(row, cfg)
    cfg = configure("model.name=cartoon-v2v", *words, "validation.every=1")
    counted, measured = profile_training(row, cfg), profile_training(row, cfg, "real")
    require_same(counted, measured)
    read, step, judged = (counted.parts[f"validation {name}"] for name in ("text", "step", "judges"))
    assert "weights of text" in read and "weights of dit" not in read
    held = {"weights of dit", "moments", "averaged weights", "weights of syncnet", "weights of lpips_vgg"}
    assert held <= step.keys() and held <= judged.keys() and "gradients" not in step
    # Encoders come module by module, and so does a block that waits.
    assert "weights of vae" not in step and "weights that come and go" in counted.parts["validation decode"]
    for stage in ("forward", "backward", "checkpoint"):
        assert counted.parts[stage] == without.parts[stage]
    assert counted.host_parts["text embeddings"] == 2 * step["text embeddings"]


def test_activations_that_are_made_again_are_not_kept() -> None:
    """Of four blocks one is made again at a time: less than half of what all of them keep."""
    row = wider("cartoon-v2v", num_layers=4)
    words = ("data.width=64", "data.height=64", "data.num_frames=9", "train.batch_size=1")
    whole, again = (
        profile_training(row, configure("model.name=cartoon-v2v", *words, f"memory.{setting}"), "real")
        for setting in ("activation_checkpointing=none", "activation_checkpointing=block")
    )
    held = whole.weights["dit"] + whole.parts["backward"]["moments"]
    assert again.stages["forward"] - held < 0.5 * (whole.stages["forward"] - held)


def test_attention_is_counted_without_a_matrix_of_tokens_by_tokens() -> None:
    tokens, width = 2048, 16
    with tensors("fake"), LiveBytes() as live:
        query = torch.zeros(1, 1, tokens, width, requires_grad=True)
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        out.sum().backward()
    assert live.peak < tokens * tokens, "bytes of a matrix of logits would be four times as many"


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_real_networks_are_as_large_as_counted_ones(device: str) -> None:
    """In half precision; the VAE of a CPU computes in float32."""
    row = find_model("stableavatar-tiny")
    cfg = configure("model.name=stableavatar-tiny", "runtime.dtype=bfloat16", f"runtime.device={device}")
    counted, real = counted_modules(row, cfg, tensors("fake")), inference._random(row, cfg)
    sizes = {part: tensor_bytes(network) for part, network in real.items()}
    assert sizes == {part: tensor_bytes(getattr(counted, part)) for part in sizes} and len(sizes) == 5
    numbers = sum(each.numel() for each in real["vae"].parameters())
    assert sizes["vae"] >= numbers * (4 if device == "cpu" else 2)


def test_an_operator_that_needs_numbers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose result has a size that only numbers decide, in the middle of a step."""
    row, cfg = find_model("cartoon-v2v"), configure("model.name=cartoon-v2v", *SMALL)
    step = training.flow_step

    def with_another(*inputs: Any) -> Any:
        made = step(*inputs)
        made.loss.nonzero()
        return made

    monkeypatch.setattr(training, "flow_step", with_another)
    with pytest.raises(
        AvatarctlError, match=r"an operator: cannot be counted: aten\.nonzero.*please report"
    ) as caught:
        profile_training(row, cfg)
    assert caught.value.exit_code == 1


def test_a_tensor_that_stays_is_counted_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known one that a step keeps, predicted and measured."""
    monkeypatch.setattr("avatarctl.models.omniavatar.without_padding", lambda text: (text, None))
    row, cfg = wider("cartoon-v2v", num_layers=4), configure("model.name=cartoon-v2v", *SMALL)
    before = of_depth(4)
    step = training.flow_step

    def keeping(*inputs: Any) -> Any:
        tensor = torch.zeros(12_345)
        made = step(*inputs)
        made.velocity.register_hook(lambda _, kept=tensor: None)  # as long as the graph
        return made

    monkeypatch.setattr(training, "flow_step", keeping)
    counted, measured = profile_training(row, cfg, exact=True), profile_training(row, cfg, "real")
    assert counted.stages == measured.stages
    for phase in ("forward", "backward"):
        assert counted.stages[phase] - before.stages[phase] == 4 * 12_345
        assert counted.parts[phase]["activations"] - before.parts[phase]["activations"] == 4 * 12_345


@pytest.mark.parametrize(("part", "published"), [("dit", 28.6e9), ("text", 11.4e9)])
def test_published_networks_have_the_published_size(part: str, published: float) -> None:
    """In bfloat16 (spec/building-blocks.md 10)."""
    networks = build_on_meta(find_model("omniavatar-14b"), 49)
    assert 2 * sum(each.numel() for each in networks[part].parameters()) == pytest.approx(published, rel=5e-3)


def wider(model: str, **sizes: Any) -> Any:
    row = find_model(model)
    network = {**row.network, "dit": {**row.network["dit"], **sizes}}
    return replace(row, network=MappingProxyType(network))


@cache
def of_depth(layers: int, heads: int = 4) -> Account:
    """Every block of a model of so many; two tests look at some of the same."""
    cfg = configure("model.name=cartoon-v2v", *SMALL)
    row = wider("cartoon-v2v", num_layers=layers, num_attention_heads=heads)
    return profile_training(row, cfg, exact=True)


@pytest.mark.parametrize("heads", [4, 2])
def test_a_changed_network_changes_the_answer(heads: int) -> None:
    """By a closed formula: a block of width d with f in between has 8 d (d + 1) numbers in its attentions,
    2 d f + f + d in its feed-forward, 12 d in norms and modulation."""
    d, f = 24 * heads, 384
    block = 8 * d * (d + 1) + 2 * d * f + f + d + 6 * d + 4 * d + 2 * d
    four, six = of_depth(4, heads), of_depth(6, heads)
    audio = d * 32 + d  # one more projection
    assert six.trained - four.trained == 2 * block + audio
    assert six.weights["dit"] - four.weights["dit"] == 4 * (2 * block + audio)
    assert six.parts["backward"]["moments"] == 8 * six.trained
    # The second step is counted: in its backward pass weights, gradients and moments are all there.
    assert six.stages["backward"] >= 4 * 4 * six.trained


def test_auxiliary_losses_take_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's gradient and the judges', behind the step of the trainer."""
    monkeypatch.setattr("avatarctl.models.omniavatar.without_padding", lambda text: (text, None))
    words = ("data.width=32", "data.height=32", "data.num_frames=5", "train.batch_size=1", "aux.losses=lpips")
    words += ("validation.every=1", "validation.metrics=lpips")
    row, cfg = wider("cartoon-v2v", num_layers=4), configure("model.name=cartoon-v2v", *words)
    counted, measured = profile_training(row, cfg), profile_training(row, cfg, "real")
    require_same(counted, measured)
    for stage in ("aux", "validation judges"):  # which take it from there
        assert counted.parts[stage]["weights of lpips_vgg"] == counted.weights["lpips_vgg"]
    assert counted.stages["aux"] > counted.stages["forward"]
    assert counted.stages["aux backward"] > counted.stages["backward"]
    assert {"vae", "lpips_vgg"} <= counted.weights.keys()


def deep(monkeypatch: pytest.MonkeyPatch, depth: int) -> Any:
    """A model of so many blocks, extended from 4, 6 and 8."""
    monkeypatch.setattr(extension, "_DEPTHS", (4, 6, 8))
    monkeypatch.setattr(extension, "_WORTH", 10)
    return wider("cartoon-v2v", num_layers=depth)


def test_an_extended_network_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    row, cfg = deep(monkeypatch, 10), configure("model.name=cartoon-v2v", *SMALL)
    whole = {layers: of_depth(layers) for layers in (4, 6, 8, 10)}
    depths = []

    def noted(small: Any, settings: Any, mode: str, **_: Any) -> Account:
        """A shallow one is counted block by block, as the whole one is."""
        depths.append(small.network["dit"]["num_layers"])
        assert (small, settings, mode) == (wider("cartoon-v2v", num_layers=depths[-1]), cfg, "fake")
        return whole[depths[-1]]

    monkeypatch.setattr(training, "_counted", noted)
    extended = profile_training(row, cfg)
    assert depths == [4, 6, 8]
    assert extended == whole[10]


def test_a_block_made_different_in_the_middle_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    row, cfg = deep(monkeypatch, 10), configure("model.name=cartoon-v2v", *SMALL)
    assert extension.sizes_of(row, cfg) is not None
    build = extension.build_on_meta

    def with_another(row: Any, channels: Any = None) -> Any:
        parts = build(row, channels)
        parts["dit"].blocks[4].attn1.heads += 1
        return parts

    monkeypatch.setattr(extension, "build_on_meta", with_another)
    assert extension.sizes_of(row, cfg) is None


def test_numbers_that_do_not_lie_on_a_line_are_not_extended() -> None:
    depths = extension.Depths((), (6, 8, 10), 40)
    line = [account({"step": size}) for size in (60, 80, 100)]
    assert extension.extend(line, depths) == account({"step": 400})
    bent = [account({"step": size}) for size in (60, 80, 101)]
    assert extension.extend(bent, depths) is None
