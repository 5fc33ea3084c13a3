"""The one question about finite numbers that code on tensors asks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import avatarctl
from avatarctl.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_element_is_enough(dtype: torch.dtype, bad: float) -> None:
    x = torch.zeros(2, 3, 4, dtype=dtype)
    assert is_finite(x)
    x[1, 2, 3] = bad
    assert not is_finite(x)


def test_a_tensor_without_numbers_holds_no_bad_one() -> None:
    assert is_finite(torch.empty(3, device="meta"))
    with FakeTensorMode():
        assert is_finite(torch.full((3,), float("nan")))


def test_nobody_asks_torch_directly() -> None:
    """A fake tensor cannot answer."""
    root = Path(avatarctl.__file__).parent
    asked = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r"torch\.(isfinite|isnan|isinf)\(|\.(isfinite|isnan|isinf)\(\)", path.read_text("utf-8"))
    }
    assert asked == {"finite.py"}
