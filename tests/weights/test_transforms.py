"""Lazy transforms against formulas stated in torch, and any range against a slice of the whole."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from avatarctl.errors import UnusableWeights
from avatarctl.files.tensors import ArrayTensor, StoredTensor, read_whole
from avatarctl.weights.transforms import (
    cast,
    padded_pair,
    plus_difference,
    plus_lora,
    with_channels,
)
from avatarctl.weights.weight_file import LoraPair

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


def stored(value: torch.Tensor) -> StoredTensor:
    """A torch tensor as this project's."""
    name = {kind: name for name, kind in TORCH.items()}[value.dtype]
    bits = value.view(_BITS[value.dtype]) if value.dtype in _BITS else value
    return ArrayTensor(bits.numpy(), name)


def value_of(tensor: StoredTensor) -> torch.Tensor:
    """This project's tensor as torch's."""
    whole = torch.from_numpy(read_whole(tensor))
    return whole.view(TORCH[tensor.info.dtype])


def normal(*shape: int, seed: int = 0, dtype: str = "F32", size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * size).to(TORCH[dtype])


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in representable numbers of a 16-bit dtype."""

    def ordered(x: torch.Tensor) -> torch.Tensor:
        bits = x.view(torch.int16).to(torch.int64)
        return torch.where(bits < 0, -32768 - bits, bits)

    return int((ordered(a) - ordered(b)).abs().max())


# ---------------------------------------------------------------- casts


@pytest.mark.parametrize("target", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("source", TORCH)
def test_a_cast_gives_the_bits_of_torch(source: str, target: str) -> None:
    x = torch.cat([normal(700_000, seed=1), torch.tensor([0.0, -0.0, 1e-30, -3e-39, 70000.0, 65520.0])])
    x = x.to(TORCH[source]).reshape(2, -1)
    result = cast(stored(x), target)
    assert result.info.shape == tuple(x.shape) and result.info.dtype == target
    expected = x.to(torch.float32).to(TORCH[target])
    np.testing.assert_array_equal(value_of(result).view(torch.uint8), expected.view(torch.uint8))


def test_a_cast_to_what_it_is_and_a_cast_of_integers_change_nothing() -> None:
    same = stored(normal(4, dtype="BF16"))
    assert cast(same, "BF16") is same
    integers = ArrayTensor(np.arange(4), "I64")
    assert cast(integers, "F16") is integers
    with pytest.raises(ValueError, match="F8_E4M3"):
        cast(same, "F8_E4M3")


# ---------------------------------------------------------------- input channels


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F8_E4M3"])
@pytest.mark.parametrize(("old", "new"), [(16, 33), (33, 49), (49, 65), (16, 65)])
def test_new_input_channels_are_zero_and_old_ones_keep_their_bits(dtype: str, old: int, new: int) -> None:
    weight = normal(12, old, 1, 2, 2, dtype=dtype)
    wide = value_of(with_channels(stored(weight), new))
    assert wide.shape == (12, new, 1, 2, 2)
    assert torch.equal(wide[:, :old].view(torch.uint8), weight.view(torch.uint8))
    assert not wide[:, old:].view(torch.uint8).any()
    back = value_of(with_channels(stored(wide), old))
    assert torch.equal(back.view(torch.uint8), weight.view(torch.uint8))


def test_channels_that_stay_or_cannot_be_counted() -> None:
    weight = stored(normal(3, 16, 1, 2, 2))
    assert with_channels(weight, 16) is weight
    with pytest.raises(UnusableWeights, match="not a convolution weight"):
        with_channels(stored(normal(5, 6)), 33)


# ---------------------------------------------------------------- updates


def lora_pairs(out: int, width: int, rank: int, dtype: str = "F32") -> LoraPair:
    down, up = normal(rank, width, seed=2, dtype=dtype), normal(out, rank, seed=3, dtype=dtype)
    return LoraPair(stored(down), stored(up))


@pytest.mark.parametrize("factors", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("scale", [0.5, 1.0, -0.3])
def test_float32_weights_gain_the_low_rank_product(factors: str, scale: float) -> None:
    w = normal(150, 96)
    pair = lora_pairs(150, 96, 16, factors)
    result = value_of(plus_lora(stored(w), pair, scale))
    exact = w.double() + scale * value_of(pair.up).double() @ value_of(pair.down).double()
    assert ((result.double() - exact).abs() / exact.abs().amax()).max() < 1e-6


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_narrow_weights_are_rounded_once(dtype: str) -> None:
    w = normal(200, 80, dtype=dtype)
    pair = lora_pairs(200, 80, 8, dtype)
    result = value_of(plus_lora(stored(w), pair, 0.5))
    expected = (w.float() + 0.5 * value_of(pair.up).float() @ value_of(pair.down).float()).to(TORCH[dtype])
    assert ulps(result, expected) <= 1
    assert (result != expected).float().mean() < 1e-3
    # Adding a product that was itself rounded first is another, worse number.
    twice = w + (0.5 * value_of(pair.up).float() @ value_of(pair.down).float()).to(TORCH[dtype])
    assert (result != twice).float().mean() > 0.05


def test_a_small_update_survives_a_chain_that_rounds_last() -> None:
    w = torch.full((4, 4), 256.0, dtype=torch.bfloat16)  # the next bfloat16 is 258
    pair = LoraPair(stored(torch.ones(1, 4)), stored(torch.full((4, 1), 0.75)))
    once = plus_lora(plus_lora(cast(stored(w), "F32"), pair, 1.0), pair, 1.0)
    assert (value_of(cast(once, "BF16")) == 258).all()
    assert (value_of(plus_lora(plus_lora(stored(w), pair, 1.0), pair, 1.0)) == 256).all()


@pytest.mark.parametrize(
    ("weight", "down", "up"),
    [
        ((20, 12, 1, 1, 1), (4, 12), (20, 4)),
        ((20, 12, 1, 1, 1), (4, 12, 1, 1, 1), (20, 4, 1, 1, 1)),
        ((20, 12), (4, 12, 1), (20, 4, 1)),
        ((20, 12, 1, 2, 2), (4, 12, 1, 2, 2), (20, 4, 1, 1, 1)),
        ((20, 1), (1, 1), (20, 1)),
    ],
)
def test_convolutions_take_updates_of_their_own_shape(
    weight: tuple[int, ...], down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    w, a, b = normal(*weight), normal(*down, seed=1), normal(*up, seed=2)
    result = value_of(plus_lora(stored(w), LoraPair(stored(a), stored(b)), 2.0))
    update = b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)
    torch.testing.assert_close(result, w + 2.0 * update.reshape(weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "down", "up"),
    [
        ((20, 12), (4, 13), (20, 4)),
        ((20, 12), (4, 12), (21, 4)),
        ((20, 12), (4, 12), (20, 5)),
        ((20, 12), (12, 4), (4, 20)),
        ((20, 12, 1, 2, 2), (4, 48), (20, 4)),
        ((20, 12), (4, 12), (80,)),
        ((240,), (1, 12), (20, 1)),
        ((20, 12), (0, 12), (20, 0)),
    ],
)
def test_shapes_that_disagree_are_refused_by_name(
    weight: tuple[int, ...], down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    pair = LoraPair(stored(normal(*down)), stored(normal(*up)))
    with pytest.raises(UnusableWeights) as caught:
        plus_lora(stored(normal(*weight)), pair, 1.0)
    for shape in (weight, down, up):
        assert f"F32 {list(shape)}" in str(caught.value)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_a_difference_is_added(dtype: str) -> None:
    w, diff = normal(30, 40, dtype=dtype), normal(30, 40, seed=1, dtype="BF16")
    result = value_of(plus_difference(stored(w), stored(diff), 0.25))
    expected = (w.float() + 0.25 * diff.float()).to(TORCH[dtype])
    assert torch.equal(result, expected)


def test_what_cannot_be_added_is_refused() -> None:
    with pytest.raises(UnusableWeights, match=r"F32 \[3\] does not fit weight F32 \[3, 1\]"):
        plus_difference(stored(normal(3, 1)), stored(normal(3)))
    with pytest.raises(UnusableWeights, match="integers"):
        plus_difference(ArrayTensor(np.arange(3), "I64"), stored(normal(3)))
    with pytest.raises(UnusableWeights, match="float8"):
        plus_lora(stored(normal(6, 5, dtype="F8_E4M3")), lora_pairs(6, 5, 2), 1.0)


# ---------------------------------------------------------------- ranges

CHAINS = {
    "cast": lambda: cast(stored(normal(37, 19)), "BF16"),
    "cast back": lambda: cast(stored(normal(37, 19, dtype="BF16")), "F32"),
    "wider": lambda: with_channels(stored(normal(9, 16, 1, 2, 2)), 33),
    "narrower": lambda: with_channels(stored(normal(9, 33, 1, 2, 2)), 16),
    "more rows": lambda: padded_pair(lora_pairs(30, 33, 7), 19).down,
    "more columns": lambda: padded_pair(lora_pairs(30, 33, 7), 19).up,
    "low rank": lambda: plus_lora(stored(normal(200, 33)), lora_pairs(200, 33, 7), 0.5),
    "low rank, bf16": lambda: plus_lora(stored(normal(130, 40, dtype="BF16")), lora_pairs(130, 40, 5), 0.3),
    "one column": lambda: plus_lora(stored(normal(130, 1)), lora_pairs(130, 1, 3), 0.3),
    "difference": lambda: plus_difference(stored(normal(9, 70)), stored(normal(9, 70, seed=1)), 0.1),
    "chain": lambda: cast(
        plus_difference(
            plus_lora(
                cast(with_channels(stored(normal(70, 4, 1, 1, 1, dtype="BF16")), 6), "F32"),
                lora_pairs(70, 6, 3),
                1.0,
            ),
            stored(normal(70, 6, 1, 1, 1)),
        ),
        "F16",
    ),
}


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS.keys())
def test_any_range_has_the_bits_of_the_whole(make) -> None:  # type: ignore[no-untyped-def]
    tensor: StoredTensor = make()
    whole = tensor.read(0, tensor.info.numel)
    assert whole.shape == (tensor.info.numel,)
    draw = random.Random(4)
    ranges = [sorted(draw.choices(range(len(whole) + 1), k=2)) for _ in range(150)]
    for start, stop in [*ranges, (0, 0), (len(whole), len(whole)), (0, 1), (len(whole) - 1, len(whole))]:
        part = tensor.read(start, stop)
        assert part.dtype == whole.dtype and part.shape == (stop - start,)
        assert part.tobytes() == whole[start:stop].tobytes(), (start, stop)
        part[:] = 0  # the reader may overwrite what it got
    assert tensor.read(0, len(whole)).tobytes() == whole.tobytes()


def test_wide_rows_in_blocks_merge_as_at_once() -> None:
    """At true width a BLAS takes other paths for other numbers of rows; the bits must not tell."""
    tensor = plus_lora(stored(normal(300, 1536)), lora_pairs(300, 1536, 128), 0.5)
    whole = tensor.read(0, tensor.info.numel)
    for rows in (1, 7, 100):
        step = rows * 1536
        for start in range(0, len(whole), step * 3):
            part = tensor.read(start, min(start + step, len(whole)))
            assert part.tobytes() == whole[start : start + step].tobytes()


def test_overflow_is_left_for_the_check_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    huge = stored(torch.tensor([[3e38, 1.0]]))
    assert torch.isinf(value_of(plus_difference(huge, huge))).any()
    assert torch.isinf(value_of(cast(huge, "F16"))).any()
    assert torch.isinf(value_of(cast(stored(torch.tensor([1e300], dtype=torch.float64)), "F32"))).all()
    assert not recwarn.list
