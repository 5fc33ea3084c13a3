"""What the tokenizer is given of a prompt."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from avatarctl.events import silent
from avatarctl.families import family_named
from avatarctl.family import Inputs
from avatarctl.loading.built_in import build_random_modules
from avatarctl.registry import configure, find_model


@pytest.mark.parametrize(
    ("row", "prompt", "negative"),
    [
        ("cartoon-i2v", "Tom & Ann talk", "静态,字幕"),  # spec/omniavatar.md d
        ("stableavatar-tiny", "Tom &amp; Ann \n talk", "静态，字幕"),  # spec/stableavatar.md f: no cleaning
    ],
)
def test_prompts_are_cleaned_for_the_family_whose_script_cleans_them(
    row: str, prompt: str, negative: str
) -> None:
    modules = build_random_modules(find_model(row))
    text: Any = modules.text
    read: set[str] = set()
    tokenizer = text.tokenizer

    def note(given: str, **how: Any) -> Any:
        read.add(given)
        return tokenizer(given, **how)

    text.tokenizer = note
    cfg = configure(f"model.name={row}", "sampling.guidance_scale=2")
    image = torch.zeros(1, 3, 64, 64)
    inputs = Inputs(image, cast(Any, None), 3200, 0.0, 1.0, "Tom &amp; Ann \n talk", "静态，字幕", 0, silent)
    family_named(find_model(row).family).open(modules, inputs, cfg)
    assert read == {prompt, negative}
