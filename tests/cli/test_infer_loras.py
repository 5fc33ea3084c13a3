"""`--lora` on the built-in model: a dry run refuses what a run refuses, from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import save_file

from avatarctl.loading.assemble import built_in
from avatarctl.registry import find_model

WIDTH = 96
Shapes = Mapping[str, tuple[int, ...]]


def lora(width: int = WIDTH, block: int = 0) -> Shapes:
    target = f"blocks.{block}.self_attn.q"
    return {f"{target}.lora_A.weight": (2, width), f"{target}.lora_B.weight": (width, 2)}


def full_model() -> Shapes:
    return {name: tensor.info.shape for name, tensor in built_in(find_model("cartoon-i2v")).tensors.items()}


def save(path: Path, shapes: Shapes, metadata: dict[str, str] | None = None) -> str:
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, path, metadata)
    return str(path)


@pytest.mark.parametrize(
    ("shapes", "metadata", "says"),
    [
        (full_model(), None, "is no adapter"),
        (lora(64), None, "changes blocks.0.self_attn.q.weight as [64, 64]"),
        (lora(block=9), None, "blocks.9.self_attn.q.weight, which the base cartoon-i2v lacks"),
        (lora(), {"avatarctl.network": '{"num_attention_heads": 8}'}, "was made for num_attention_heads 8"),
    ],
)
def test_what_does_not_fit(
    shapes: Shapes, metadata: dict[str, str] | None, says: str, refused: Callable[..., str], here: Path
) -> None:
    path = save(here / "x.safetensors", shapes, metadata)
    words = ("infer", "--lora", path, "--size", "16x16", "--num-frames", "9", "--steps", "1")
    planned = refused(3, *words, "--dry-run")
    assert says in planned
    assert planned == refused(3, *words)


def test_what_fits(run: Callable[..., Result], here: Path) -> None:
    path = save(here / "x.safetensors", lora())
    planned = run("infer", "--lora", f"{path}:0.5", "--dry-run")
    assert planned.exit_code == 0 and "1 target at scale 0.5" in planned.stderr
