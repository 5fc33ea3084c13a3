"""Which two files belong together, and what their sum is said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from avatarctl.errors import UnusableWeights
from avatarctl.events import silent
from avatarctl.models.parts import transformer
from avatarctl.pipelines.convert import ConvertRequest, plan_conversion, write
from avatarctl.weights.checkpoint import Checkpoint
from avatarctl.weights.merge import merge_adapter
from avatarctl.weights.metadata import network_of
from avatarctl.weights.recognise import read_checkpoint
from tests.weights import release

ADAPTER = release.adapter_state()


def network(**fields: float) -> dict[str, str]:
    return {"avatarctl.network": json.dumps(fields)} if fields else {}


def held(path: Path, state: release.State, **fields: float) -> Checkpoint:
    """A file whose header states `fields`."""
    save_file(state, path, network(**fields) | {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 2}'})
    return read_checkpoint(path)


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return read_checkpoint(release.write_base(tmp_path / "base.safetensors"))


@pytest.fixture
def adapter(tmp_path: Path) -> Checkpoint:
    return read_checkpoint(release.write_release(tmp_path / "omni"))


# What no shape tells


def test_a_stated_number_of_heads_wins_over_a_guess(tmp_path: Path) -> None:
    """The guess for width 128 is 1, and it comes first where the base does not state it."""
    for base_says, adapter_says in (({}, {"num_attention_heads": 4}), ({"num_attention_heads": 4}, {})):
        base = held(tmp_path / "base.safetensors", release.base_state(), **base_says)
        adapter = held(tmp_path / "adapter.safetensors", ADAPTER, **adapter_says)
        merged = merge_adapter(base, adapter)
        assert (merged.heads, merged.heads_stated) == (4, True)
    merged = merge_adapter(*(held(tmp_path / "x.safetensors", s) for s in (release.base_state(), ADAPTER)))
    assert (merged.heads, merged.heads_stated) == (1, False)


def test_a_guess_does_not_become_a_statement_by_conversion(adapter: Checkpoint, tmp_path: Path) -> None:
    request = ConvertRequest(adapter.path, tmp_path / "again.safetensors")
    write(plan_conversion(request, silent), silent)
    base = held(tmp_path / "base.safetensors", release.base_state(), num_attention_heads=4)
    assert merge_adapter(base, read_checkpoint(request.out)).heads == 4


@pytest.mark.parametrize(("name", "ours", "theirs"), [("num_attention_heads", 4, 2), ("eps", 1e-5, 1e-6)])
def test_two_statements_that_differ_are_refused(
    name: str, ours: float, theirs: float, tmp_path: Path
) -> None:
    base = held(tmp_path / "base.safetensors", release.base_state(), **{name: theirs})
    adapter = held(tmp_path / "adapter.safetensors", ADAPTER, **{name: ours})
    with pytest.raises(
        UnusableWeights, match=rf"adapter\.safe.*{name} {ours:g}.*base\.safe.* has {theirs:g}"
    ):
        merge_adapter(base, adapter)


def test_heads_that_do_not_divide_the_base_are_refused(base: Checkpoint, tmp_path: Path) -> None:
    lora = {"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(release.FFN)}  # tells no width
    with pytest.raises(UnusableWeights, match="3 heads, which do not divide"):
        merge_adapter(base, held(tmp_path / "lora.safetensors", lora, num_attention_heads=3))


def test_eps_survives_a_file_and_a_merge(adapter: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "wan"
    release.write_base(folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"eps": 0.25, "num_heads": 1}))
    merged = tmp_path / "merged.safetensors"
    request = ConvertRequest(adapter.path, merged, base=folder, merge=True)
    write(plan_conversion(request, silent), silent)
    assert network_of(read_checkpoint(merged))["eps"] == 0.25
    for whole in (merge_adapter(read_checkpoint(folder), adapter), read_checkpoint(merged)):
        built = transformer(whole, torch.float32, torch.device("cpu"))
        assert built.config.eps == 0.25


@pytest.mark.parametrize("eps", ["small", 0, 7, True])
def test_an_eps_that_is_none_is_refused(eps: object, adapter: Checkpoint, tmp_path: Path) -> None:
    release.write_base(tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "wan" / "config.json").write_text(json.dumps({"eps": eps}))
    with pytest.raises(UnusableWeights, match=r"wan: eps is .*, not a small number"):
        merge_adapter(read_checkpoint(tmp_path / "wan"), adapter)
