"""The face networks come with the package, are checked, and are said by `models`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from avatarctl.cli.models import models
from avatarctl.errors import WeightsMissing
from avatarctl.loading.faces import face_networks
from avatarctl.registry import ASSETS, find, row

FILES = ("faces/blazeface_short.safetensors", "faces/face_mesh_468.safetensors")


def test_what_is_loaded_is_what_the_files_hold() -> None:
    made = face_networks(torch.device("cpu"))
    for network, file, numbers in ((made.detector, FILES[0], 101_390), (made.mesh, FILES[1], 604_685)):
        stored, state = load_file(ASSETS / file), network.state_dict()
        assert state.keys() == stored.keys() and sum(value.numel() for value in state.values()) == numbers
        assert all(torch.equal(state[name], stored[name].float()) for name in stored)
        assert not network.training and not any(each.requires_grad for each in network.parameters())
    assert made.identity == face_networks(torch.device("cpu")).identity


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_damage_is_said(file: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "assets"
    shutil.copytree(ASSETS / "faces", copy / "faces")
    monkeypatch.setattr(row, "ASSETS", copy)
    if damage == "missing":
        (copy / file).unlink()
    else:
        content = bytearray((copy / file).read_bytes())
        content[-1] ^= 1
        (copy / file).write_bytes(content)
    with pytest.raises(WeightsMissing, match="install avatarctl again") as caught:
        face_networks(torch.device("cpu"))
    assert Path(file).name in str(caught.value)


def test_models_shows_and_checks_them() -> None:
    run = CliRunner().invoke
    listed = run(models, ["list", "--kind", "detector"]).output
    for name in ("blazeface", "face-mesh"):
        (line,) = (line for line in listed.splitlines() if line.split()[:1] == [name])
        assert "[works]" in line
        shown = run(models, ["show", name]).output
        assert "built in" in shown and "Apache-2.0" in shown and "all files are here" in shown
    checked = run(models, ["verify", "blazeface", "face-mesh", "--json"])
    assert checked.exit_code == 0
    assert [item["state"] for item in json.loads(checked.output)["files"]] == ["ok", "ok"]


def test_the_licence_travels_with_the_weights() -> None:
    text = (ASSETS / "faces/LICENSE.txt").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    card = (ASSETS / "faces/README.md").read_text(encoding="utf-8")
    notice = (Path(__file__).parents[2] / "NOTICE").read_text(encoding="utf-8")
    for words in (card, notice):
        assert "MediaPipe" in words and "Apache" in words
    assert all(find(name).license == "Apache-2.0" for name in ("blazeface", "face-mesh"))
