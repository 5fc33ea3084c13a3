"""Networks built without memory and filled from tensors: values, dtypes, ties, bytes, refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from avatarctl.errors import UnusableWeights
from avatarctl.files.source import open_weights
from avatarctl.files.tensors import ArrayTensor, StoredTensor, from_float32
from avatarctl.live_bytes import LiveBytes
from avatarctl.loading.fill import fill, on_meta
from avatarctl.models.omniavatar import OmniAvatarTransformer
from avatarctl.models.precision import is_float32_island

CPU = torch.device("cpu")
FILE = Path("weights.safetensors")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def tensors(dtype: str = "F32") -> dict[str, StoredTensor]:
    random = np.random.default_rng(0)
    return {
        name: ArrayTensor(from_float32(random.standard_normal(tuple(value.shape), np.float32), dtype), dtype)
        for name, value in network().state_dict().items()
    }


def filled(given: Mapping[str, StoredTensor], dtype: torch.dtype = torch.float32) -> nn.Module:
    with on_meta():
        module = network()
    fill(module, given, dtype_of=lambda name: dtype, device=CPU, where=FILE, likely=lambda: "likely")
    return module


def test_values_arrive_in_the_asked_dtype() -> None:
    module = filled(tensors(), torch.bfloat16)
    for name, value in module.state_dict().items():
        stored = tensors()[name]
        assert isinstance(stored, ArrayTensor)
        assert torch.equal(value, torch.from_numpy(stored.array).bfloat16()), name
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module(torch.ones(2, 3, dtype=torch.bfloat16)).shape == (2, 4)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_every_stored_dtype_is_read_as_what_it_means(dtype: str) -> None:
    expected = {
        name: torch.from_numpy(t.array) for name, t in tensors().items() if isinstance(t, ArrayTensor)
    }
    for name, value in filled(tensors(dtype)).state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-6)
        exact = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        assert torch.equal(value, expected[name].to(exact[dtype]).float())


def test_float8_is_read_as_values() -> None:
    given = tensors()
    stored = torch.randn(4, 3).to(torch.float8_e4m3fn)
    given["0.weight"] = ArrayTensor(stored.view(torch.uint8).numpy(), "F8_E4M3")
    assert torch.equal(filled(given).state_dict()["0.weight"], stored.float())


def _without(name: str) -> dict[str, StoredTensor]:
    return {key: value for key, value in tensors().items() if key != name}


def _with(name: str, array: np.ndarray, dtype: str = "F32") -> dict[str, StoredTensor]:
    return tensors() | {name: ArrayTensor(array, dtype)}


NAN, INF = np.full((4, 3), np.nan, np.float32), np.full((4, 3), -np.inf, np.float32)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda: _without("0.bias"), ("1 tensor is missing: 0.bias", "likely")),
        (lambda: _with("2.weight", NAN), ("1 has no place in the network: 2.weight",)),
        (lambda: _with("0.weight", np.zeros((3, 4), np.float32)), ("0.weight has shape [3, 4]", "[4, 3]")),
        (lambda: _with("0.weight", np.zeros((4, 3), np.int8), "I8"), ("0.weight has dtype I8",)),
        (lambda: _with("0.weight", NAN), ("0.weight holds NaN or infinity",)),
        (lambda: _with("0.weight", INF), ("0.weight holds NaN or infinity",)),
    ],
)
def test_refusals(given: Callable[[], dict[str, StoredTensor]], says: tuple[str, ...]) -> None:
    with pytest.raises(UnusableWeights) as refused:
        filled(given())
    for part in (str(FILE), *says):
        assert part in str(refused.value)


def test_names_and_shapes_are_checked_before_any_value_is_read() -> None:
    class Unread(ArrayTensor):
        def read(self, start: int, stop: int) -> np.ndarray:
            raise AssertionError("read")

    given: dict[str, StoredTensor] = {name: Unread(t.array, "F32") for name, t in _without("1.bias").items()}  # type: ignore[attr-defined]
    with pytest.raises(UnusableWeights, match=r"1\.bias"):
        filled(given)


def test_a_value_too_large_for_float16_is_refused() -> None:
    with pytest.raises(UnusableWeights, match="too large for float16"):
        filled(_with("0.weight", np.full((4, 3), 1e5, np.float32)), torch.float16)
    assert filled(_with("0.weight", np.full((4, 3), 1e5, np.float32)), torch.bfloat16)


def test_a_long_list_is_cut_and_a_long_name_too() -> None:
    given = tensors() | {f"{'x' * 300}{i}": tensors()["0.bias"] for i in range(9)}
    with pytest.raises(UnusableWeights, match="9 have no place") as refused:
        filled(given)
    assert "and 6 more" in str(refused.value) and len(str(refused.value)) < 600


def test_tied_weights_stay_tied() -> None:
    with on_meta():
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=7, d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1)
        )
    given: dict[str, StoredTensor] = {
        name: ArrayTensor(np.ones(tuple(parameter.shape), np.float32), "F32")
        for name, parameter in encoder.named_parameters()
    }
    assert "encoder.embed_tokens.weight" not in given
    fill(encoder, given, dtype_of=lambda name: torch.bfloat16, device=CPU, where=FILE)
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight
    assert not any(parameter.is_meta for parameter in encoder.parameters())


def test_a_parameter_that_nothing_reads_may_be_absent() -> None:
    with on_meta():
        module = network()
    fill(
        module, _without("1.bias"), dtype_of=lambda name: torch.float32, device=CPU, where=FILE,
        unused=("1.bias",),
    )  # fmt: skip
    assert torch.equal(module.state_dict()["1.bias"], torch.zeros(4))


def test_a_buffer_that_no_file_holds_is_not_left_as_garbage() -> None:
    class WithTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(2), persistent=False)

    with on_meta():
        module = WithTable()
    with pytest.raises(ValueError, match="table"):
        fill(module, {}, dtype_of=lambda name: torch.float32, device=CPU, where=FILE)


def test_building_on_meta_leaves_the_random_generator_alone() -> None:
    before = torch.get_rng_state()
    with on_meta():
        nn.Linear(2, 2)
        torch.empty(3, device="cpu").uniform_()  # as wav2vec2's own constructor does
    assert torch.equal(torch.get_rng_state(), before)


def test_live_bytes_stay_at_the_size_of_the_network(tmp_path: Path) -> None:
    """From a file of float32 into bfloat16, tensors larger and smaller than a block."""
    with on_meta():
        module = OmniAvatarTransformer(
            num_attention_heads=8, attention_head_dim=96, in_channels=33, out_channels=16, text_dim=512,
            freq_dim=256, ffn_dim=3072, num_layers=4, audio_input_dim=768, audio_hidden_size=32,
        )  # fmt: skip
    state = {name: torch.randn(p.shape) * 0.02 for name, p in module.named_parameters()}
    save_file(state, tmp_path / "model.safetensors")
    raw = open_weights(tmp_path / "model.safetensors")

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if is_float32_island(module, name) else torch.bfloat16

    with LiveBytes() as live:
        fill(module, raw.tensors, dtype_of=dtype_of, device=CPU, where=raw.path)
    final = sum(p.numel() * p.element_size() for p in module.parameters())
    assert final > 80e6, "a block of 8 MB must be small beside it"
    assert live.peak <= 1.1 * final, f"{live.peak / final:.3f} of the network"
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, state[name].to(parameter.dtype)), name
        assert parameter.dtype == dtype_of(name)
    assert module.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
