"""Branches that have a weight run, and their weighted sum is the published formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from avatarctl.family import Guidance
from avatarctl.sampling.guidance import audio_first, combine, native, text_first

Rule = Callable[[Guidance], dict[str, float]]

CASES: list[tuple[Rule, float, float | None, set[str]]] = [
    (text_first, 1.0, None, {"full"}),
    (text_first, 4.5, None, {"full", "negative"}),
    (text_first, 4.5, 4.5, {"full", "negative"}),
    (text_first, 4.5, 3.0, {"full", "silent", "negative"}),
    (text_first, 1.0, 3.0, {"full", "silent"}),
    (text_first, 4.5, 0.0, {"silent", "negative"}),
    (text_first, 0.0, 0.0, {"negative"}),
    (audio_first, 1.0, None, {"full"}),
    (audio_first, 5.0, None, {"full", "silent_negative"}),
    (audio_first, 5.0, 4.0, {"full", "negative", "silent_negative"}),
    (audio_first, 3.0, 1.0, {"full", "negative"}),
    (audio_first, 1.0, 3.0, {"full", "negative", "silent_negative"}),
    (audio_first, 0.0, 3.0, {"negative", "silent_negative"}),
    (native, 1.0, None, {"full"}),
    (native, 3.0, 1.0, {"full", "unpaired"}),
    (native, 1.0, 3.0, {"full", "silent"}),
    (native, 3.0, 5.0, {"full", "silent", "unpaired"}),
]


def formula(rule: Rule, p: dict[str, Tensor], t: float, a: float) -> Tensor:
    """The rules as their sources write them, with every branch."""
    if rule is text_first:
        return p["negative"] + t * (p["silent"] - p["negative"]) + a * (p["full"] - p["silent"])
    if rule is audio_first:
        loud = p["negative"] - p["silent_negative"]
        return p["silent_negative"] + a * loud + t * (p["full"] - p["negative"])
    return p["full"] + (a - 1) * (p["full"] - p["silent"]) + (t - 1) * (p["full"] - p["unpaired"])


@pytest.mark.parametrize(("rule", "text", "audio", "names"), CASES)
def test_only_branches_with_weight_run_and_the_sum_is_the_published_formula(
    rule: Rule, text: float, audio: float | None, names: set[str]
) -> None:
    weights = rule(Guidance(text, audio))
    assert set(weights) == names
    assert sum(weights.values()) == pytest.approx(1)
    every = ("full", "silent", "negative", "silent_negative", "unpaired")
    values = torch.randn(len(every), 2, 4, generator=torch.Generator().manual_seed(0))
    everything = dict(zip(every, values, strict=True))
    expected = formula(rule, everything, text, text if audio is None else audio)
    # Only what the weights name is given: reading another one would be a KeyError.
    got = combine({name: everything[name] for name in names}, weights)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_two_orders_of_classifier_free_guidance_differ() -> None:
    """Equal scales hide a mistaken order; unequal ones must not."""
    assert text_first(Guidance(3.0, 5.0)) != audio_first(Guidance(3.0, 5.0))
    assert text_first(Guidance(3.0))["full"] == audio_first(Guidance(3.0))["full"]
