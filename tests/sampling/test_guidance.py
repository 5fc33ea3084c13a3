import pytest
import torch

from avatarctl.family import Guidance
from avatarctl.sampling.guidance import branch_weights, combine

CASES = [
    (1.0, None, {"full"}),
    (4.5, None, {"full", "negative"}),
    (4.5, 4.5, {"full", "negative"}),
    (4.5, 3.0, {"full", "silent", "negative"}),
    (1.0, 3.0, {"full", "silent"}),
    (4.5, 0.0, {"silent", "negative"}),
    (0.0, 0.0, {"negative"}),
]


@pytest.mark.parametrize(("text", "audio", "branches"), CASES)
def test_only_branches_with_weight_run_and_the_sum_is_the_published_formula(
    text: float, audio: float | None, branches: set[str]
) -> None:
    guidance = Guidance(text, audio)
    assert set(branch_weights(guidance)) == branches
    full, silent, negative = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    everything = {"full": full, "silent": silent, "negative": negative}
    a = text if audio is None else audio
    expected = negative + text * (silent - negative) + a * (full - silent)
    # Only what the branches name is given: reading another one would be a KeyError.
    got = combine({name: everything[name] for name in branches}, guidance)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
