"""Conversions, and what they wrote, for the tests of `convert-ckpt`'s pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from avatarctl.events import silent
from avatarctl.pipelines.convert import (
    Converted,
    ConvertRequest,
    plan_conversion,
    write,
)
from tests.weights import release
from tests.weights.release import State

SCALE = release.ALPHA / release.RANK


def convert(source: Path, out: Path, to: str = "original", **asked: object) -> Converted:
    request = ConvertRequest(source, out, to, **asked)  # type: ignore[arg-type]
    return write(plan_conversion(request, silent), silent)


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        return dict(file.metadata())


def loaded(path: Path) -> State:
    """Every tensor of a file or folder, by safetensors' own reader."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def close(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor.float(), other[name].float(), rtol=0, atol=1e-6, msg=name)


def whole_model(pairs: release.State | None = None, channels: int = 33) -> State:
    """What the release's adapter makes of the base, computed here."""
    replaced = release.audio_state() | release.patch_state(channels)
    return release.merged(release.base_state(), release.lora_pairs(), SCALE, replaced)


def in_diffusers(state: State) -> State:
    return {release.diffusers_name(name): tensor for name, tensor in state.items()}
