"""Files that come with the program: of the bytes that the registry states, or refused with what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from avatarctl.config import Model
from avatarctl.demo.sample import sample_audio, sample_image
from avatarctl.errors import AvatarctlError, WeightsMissing
from avatarctl.events import silent
from avatarctl.files.strict_json import read_object
from avatarctl.loading.built_in import build_random_modules
from avatarctl.loading.judges import find_judges, load_judges
from avatarctl.loading.sources import check_packaged
from avatarctl.pipelines.infer import load
from avatarctl.pipelines.job import Job, check_job
from avatarctl.registry import ASSETS, configure, find_model, row

ROW = find_model("cartoon-i2v")
CONFIG = configure("model.name=cartoon-i2v")
VAE_CONFIG = ASSETS / "cartoon/config.json"


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files that may be spoilt."""
    copy = tmp_path / "assets"
    shutil.copytree(ASSETS, copy)
    monkeypatch.setattr(row, "ASSETS", copy)
    return copy


def plan():
    return check_job(CONFIG, ROW, Job(sample_image(), sample_audio(0.2), "", ""), silent)


def test_the_files_are_there_small_and_of_the_stated_bytes() -> None:
    check_packaged(ROW, plan().sources)
    files = [path for path in ASSETS.glob("cartoon/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    rows = {*ROW.files, *find_model("cartoon-v2v").files}
    assert {str(path.relative_to(ASSETS)) for path in files} == {*rows, "cartoon/README.md"}


def test_the_sizes_beside_the_vae_are_those_of_the_row() -> None:
    stated = read_object(ASSETS / "cartoon/config.json", 1 << 16)
    row = {
        name: list(value) if isinstance(value, tuple) else value for name, value in ROW.network["vae"].items()
    }
    assert {name: stated[name] for name in row} == row
    assert len(stated["latents_mean"]) == len(stated["latents_std"]) == 16


def test_what_is_loaded_is_what_the_files_hold() -> None:
    made, untrained = load(plan()), build_random_modules(ROW)
    names = ("vae", "text", "audio", "dit_i2v")
    vae, text, audio, dit = (load_file(ASSETS / f"cartoon/{name}.safetensors") for name in names)
    for module, stored in ((made.vae.vae, vae), (made.text.encoder, text), (made.audio, audio)):
        state = module.state_dict()
        assert all(torch.equal(state[name].float(), stored[name].float()) for name in stored)
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert made.vae.vae.config.latents_mean == read_object(VAE_CONFIG, 1 << 16)["latents_mean"]
    name = "blocks.2.attn2.to_q.weight"
    assert torch.equal(made.dit.state_dict()[name], dit["blocks.2.cross_attn.q.weight"].float())
    assert not torch.equal(made.dit.state_dict()[name], untrained.dit.state_dict()[name])


@pytest.mark.parametrize("name", ROW.files)
@pytest.mark.parametrize("damage", ["missing", "changed", "cut"])
def test_a_damaged_or_missing_file_ends_with_what_to_do(assets: Path, name: str, damage: str) -> None:
    path = assets / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "changed":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 3])
    with pytest.raises(WeightsMissing) as told:
        if "syncnet" in name:  # no part of a video, and checked where a training loads it
            load_judges(ROW, find_judges(ROW, Model(), ("sync",)), ("sync",), torch.device("cpu"), silent)
        else:
            plan().require_weights()
    error: AvatarctlError = told.value
    assert error.exit_code == 4 and error.fix == "install avatarctl again"
    assert name.rpartition("/")[2] in str(error)


def test_a_row_without_files_keeps_seeded_random_weights() -> None:
    row = find_model("stableavatar-tiny")
    assert not row.files and not row.trained
    first, second = (build_random_modules(row).dit.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
