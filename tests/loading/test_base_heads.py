"""Heads of a full model that states none: those of the config.json of the base that it came out of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from avatarctl.errors import UnusableWeights
from avatarctl.events import Event, Notice
from avatarctl.loading.assemble import assemble
from avatarctl.loading.model_row import row_named
from avatarctl.loading.parts import transformer
from avatarctl.loading.sources import find_sources
from avatarctl.registry import configure
from avatarctl.weights.metadata import network_of
from avatarctl.weights.weight_file import WeightFile
from tests.pipelines import tiny_release as tiny
from tests.pipelines import tiny_stable_release as stable

MODEL = "stableavatar-1.3b"
SQUARE = stable.TRANSFORMERS / "transformer3d-square.pt"
STABLE = stable.tiny_stable_release()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A release; nothing but headers and configurations is read here."""
    STABLE.write(tmp_path / "weights")
    return tmp_path / "weights"


def state_in(config: Path, *removed: str, **fields: Any) -> None:
    held = json.loads(config.read_text()) if config.exists() else {}
    left = {name: value for name, value in held.items() if name not in removed}
    config.write_text(json.dumps(left | fields))


def assembled(root: Path, model: str | Path = MODEL, **weights: Path) -> tuple[WeightFile, list[str]]:
    """The transformer of a run, and what was said."""
    named = [f"model.weights.{part}={path}" for part, path in weights.items()]
    row = row_named(str(model))
    cfg = configure(f"model.name={model}", f"model.weights_root={root}", *named, row_named=row_named)
    events: list[Event] = []
    held = assemble(row, find_sources(row, cfg.model), cfg.model, events.append)
    return held, [event.text for event in events if isinstance(event, Notice)]


def heads_said(said: list[str]) -> list[str]:
    return [line for line in said if "attention heads" in line]


def test_the_guess_holds_where_the_base_says_the_same(root: Path) -> None:
    held, said = assembled(root)
    assert held.heads == stable.DIMS.width // 128 and not heads_said(said)
    (root / stable.BASE / "config.json").unlink()
    held, said = assembled(root)
    assert held.heads == stable.DIMS.width // 128 and not held.heads_stated


@pytest.mark.parametrize(
    "fields",
    [
        {"num_heads": 4},
        {"num_attention_heads": 4},
        {"num_attention_heads": 4, "attention_head_dim": 32, "_class_name": "WanTransformer3DModel"},
    ],
)
def test_what_the_base_states_wins_over_the_guess(fields: dict[str, Any], root: Path) -> None:
    removed = ("num_heads", *(["dim"] if "attention_head_dim" in fields else []))
    state_in(root / stable.BASE / "config.json", *removed, eps=1e-5, **fields)
    named = root / SQUARE
    for model in (MODEL, named):
        held, said = assembled(root, model)
        assert (held.heads, held.heads_stated, network_of(held)["eps"]) == (4, True, 1e-5)
        assert [str(stable.BASE / "config.json") in line for line in heads_said(said)] == [True]
    built = transformer(held, torch.float32, torch.device("cpu"))
    assert (built.config.num_attention_heads, built.config.attention_head_dim) == (4, 32)


def test_a_base_beside_the_file_and_encoders_that_are_named(root: Path, tmp_path: Path) -> None:
    """No folder has the name that a release gives it."""
    mine = tmp_path / "mine"
    shutil.copytree(root / stable.BASE, mine)
    state_in(mine / "config.json", num_heads=2)
    state_in(root / stable.BASE / "config.json", "num_heads")
    shutil.copy(root / SQUARE, mine / "x.pt")
    assert assembled(root, MODEL, dit=mine / "x.pt", vae=mine / "Wan2.1_VAE.pth")[0].heads == 2
    shutil.move(mine / "x.pt", tmp_path / "x.pt")
    clip = mine / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    assert assembled(root, tmp_path / "x.pt", clip=clip)[0].heads == 2


def test_a_config_of_another_model_says_nothing(root: Path) -> None:
    """Another width, an encoder's, or none of a transformer."""
    config = root / stable.BASE / "config.json"
    for fields in (
        {"dim": 5120, "num_heads": 40}, {"num_attention_heads": 12, "hidden_size": 768},
        {"num_heads": 64, "d_model": 4096}, {"num_attention_heads": 3, "attention_head_dim": "x"},
    ):  # fmt: skip
        config.write_text(json.dumps(fields))
        held, said = assembled(root)
        assert (held.heads, held.heads_stated, heads_said(said)) == (1, False, [])


def test_what_the_file_states_too_must_be_the_same(root: Path) -> None:
    path = root / SQUARE.with_suffix(".safetensors")
    (root / SQUARE).unlink()
    save_file(STABLE.square, path, {"avatarctl.network": '{"num_attention_heads": 4}'})
    with pytest.raises(UnusableWeights, match=rf"{path.name}: .*_heads 4, .*config\.json has 1"):
        assembled(root)
    state_in(root / stable.BASE / "config.json", num_heads=4)
    assert assembled(root)[0].heads == 4
    state_in(root / stable.BASE / "config.json", "num_heads")
    assert assembled(root)[0].heads == 4


@pytest.mark.parametrize("heads", [3, 129])
def test_heads_that_do_not_divide_the_width_are_refused(heads: int, root: Path) -> None:
    config = root / stable.BASE / "config.json"
    state_in(config, num_heads=heads)
    with pytest.raises(UnusableWeights, match=rf"config\.json: num_heads {heads} does not divide"):
        assembled(root)


def test_a_merged_model_takes_its_bases_word(tmp_path: Path) -> None:
    """The guess is none for a width that is no multiple of 128: it ran with nothing until now."""
    release = tiny.tiny_release()
    release.write(tmp_path)
    base = tmp_path / "Wan2.1-T2V-14B"
    merged = tmp_path / "merged.safetensors"
    whole = {name: tensor for name, tensor in release.base.items() if not name.startswith("patch_")}
    whole |= {name: tensor for name, tensor in release.adapter.items() if "lora" not in name}
    save_file(whole, merged)
    held, said = assembled(tmp_path, "omniavatar-14b", dit=merged)
    assert held.heads == tiny.TINY.heads and heads_said(said)
    state_in(base / "config.json", num_heads=4)
    assert assembled(tmp_path, merged)[0].heads == 4
