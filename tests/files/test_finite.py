"""The bit test against the values themselves, on every pattern or on random ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avatarctl.files.finite import nonfinite
from avatarctl.files.tensors import DTYPES

SMALL = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@pytest.mark.parametrize("dtype", SMALL)
def test_every_pattern_of_the_small_dtypes_is_judged_as_torch_does(dtype: str) -> None:
    size = DTYPES[dtype].itemsize
    bits = np.arange(1 << (8 * size)).astype(f"u{size}")
    values = torch.from_numpy(bits.view(f"i{size}").copy()).view(SMALL[dtype]).to(torch.float32)
    judged = [nonfinite(one, dtype) for one in bits.view(DTYPES[dtype].storage).reshape(-1, 1)]
    assert judged == (~torch.isfinite(values)).tolist()


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_wide_dtypes_agree_with_numpy_on_random_and_on_edge_patterns(dtype: str) -> None:
    storage = DTYPES[dtype].storage
    rng = np.random.default_rng(5)
    tiny, huge = np.finfo(storage).smallest_subnormal, np.finfo(storage).max
    edges = np.array([0.0, -0.0, tiny, -tiny, huge, -huge, np.inf, -np.inf, np.nan, -np.nan], storage)
    random = np.frombuffer(rng.bytes(4000 * storage.itemsize), storage)
    # The same numbers with an exponent of all ones: mostly NaN, of either sign and any payload.
    exponent = {"F32": 0x7F800000, "F64": 0x7FF0000000000000}[dtype]
    special = (random.view(f"u{storage.itemsize}") | exponent).view(storage)
    for value in np.concatenate([edges, random, special]):
        assert nonfinite(np.array([value]), dtype) == (not np.isfinite(value)), value.tobytes().hex()


@pytest.mark.parametrize("dtype", [name for name, kind in DTYPES.items() if kind.floating])
def test_one_bad_number_anywhere_in_a_block_is_enough(dtype: str) -> None:
    size = DTYPES[dtype].itemsize
    # 0x34 repeated is an ordinary positive number in each dtype, 0xb4 an ordinary negative one.
    block = np.frombuffer(bytes([0x34] * size + [0xB4] * size) * 500, DTYPES[dtype].storage).copy()
    assert not nonfinite(block, dtype)
    for place in (0, 499, 999):
        for bits in (b"\x7f", b"\xff"):
            bad = block.copy()
            bad.view("u1").reshape(1000, size)[place] = list(b"\xff" * (size - 1) + bits)
            assert nonfinite(bad, dtype)


def test_integers_and_nothing_are_finite() -> None:
    assert not nonfinite(np.array([-1, 2**63 - 1]), "I64")
    assert not nonfinite(np.array([255], np.uint8), "BOOL")
    assert not nonfinite(np.array([], np.float32), "F32")
