"""Rows of the registry hold together, and files are found where people keep them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from avatarctl.config import ModelRowDefaults, Setting, keys, resolve, value_of
from avatarctl.errors import ConfigError, NotYetSupported
from avatarctl.registry import ROWS, Kind, Row, Status, configure, find, find_model, missing_files

ALL = [pytest.param(row, id=row.name) for row in ROWS.values()]
OMNIAVATAR = [row.name for row in ROWS.values() if row.family == "omniavatar"]


@pytest.mark.parametrize("row", ALL)
def test_row_is_well_formed(row: Row) -> None:
    assert ROWS[row.name] is row
    assert row.kind in get_args(Kind) and row.status in get_args(Status)
    assert row.title and row.title == row.title.strip()
    assert set(row.needs) <= ROWS.keys() - {row.name}
    assert (row.kind == "model") == bool(row.family)
    if row.source == "package":
        assert not row.files and not row.hub_id
    else:
        assert row.files or row.needs
    if row.source == "other":
        assert row.obtained, "a file from elsewhere says from where"
    if row.hub_id:
        owner, slash, name = row.hub_id.partition("/")
        assert owner and slash and row.folder == name


@pytest.mark.parametrize("row", ALL)
def test_defaults_are_values_of_keys(row: Row) -> None:
    assert row.defaults.keys() <= keys().keys()
    layer = ModelRowDefaults(row.name, row.defaults)
    cfg = resolve(lambda name: layer, {}, None, {"model.name": Setting(row.name, "test")}).cfg
    for dotted, value in row.defaults.items():
        assert value_of(cfg, dotted) == value


@pytest.mark.parametrize("name", OMNIAVATAR)
def test_models_that_run_fill_what_only_a_model_can(name: str) -> None:
    cfg = configure(f"model.name={name}")
    for dotted, spec in keys().items():
        if spec.key.from_row:
            assert value_of(cfg, dotted) is not None, dotted


def test_every_kind_is_there() -> None:
    assert {row.kind for row in ROWS.values()} == set(get_args(Kind))


def test_the_models() -> None:
    status = {row.name: row.status for row in ROWS.values() if row.kind == "model"}
    assert status.keys() == {
        "cartoon-i2v", "omniavatar-14b", "omniavatar-1.3b", "stableavatar-1.3b", "liveavatar-14b"
    }  # fmt: skip
    assert status["cartoon-i2v"] == "works"
    assert status["stableavatar-1.3b"] == status["liveavatar-14b"] == "not yet supported"
    assert status["omniavatar-14b"].startswith("needs weights")


def test_find() -> None:
    assert find("cartoon-i2v").family == "omniavatar"
    with pytest.raises(ConfigError, match=r"did you mean omniavatar-1\.3b\?"):
        find("omniavatar-1.3")
    with pytest.raises(ConfigError, match=r"did you mean cartoon-i2v\?"):
        find("Cartoon_i2v")
    with pytest.raises(ConfigError, match="models list"):
        find("zzzzzz")


def test_find_model(tmp_path: Path) -> None:
    assert find_model("omniavatar-14b").kind == "model"
    with pytest.raises(ConfigError, match=r"kind base.*did you mean omniavatar-14b\?"):
        find_model("wan2.1-t2v-14b")
    with pytest.raises(NotYetSupported, match="checkpoint files and folders"):
        find_model(str(tmp_path))
    with pytest.raises(ConfigError, match="no model"):
        find_model("absent")


def names_of(row_name: str, root: Path | None = None) -> set[str]:
    found = missing_files(find(row_name), str(root) if root else None)
    return {f"{wanted.folder}/{wanted.file}" for wanted in found}


def put(folder: Path, *files: str) -> None:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


WAV2VEC = ("config.json", "model.safetensors", "preprocessor_config.json")


def test_a_built_in_model_misses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert missing_files(find("cartoon-i2v"), None) == ()


def test_missing_files_name_folder_and_repository(tmp_path: Path) -> None:
    found = missing_files(find("omniavatar-1.3b"), str(tmp_path))
    assert {wanted.hub_id for wanted in found} == {
        "Wan-AI/Wan2.1-T2V-1.3B", "OmniAvatar/OmniAvatar-1.3B", "facebook/wav2vec2-base-960h"
    }  # fmt: skip
    folders = {wanted.hub_id: wanted.folder for wanted in found}
    assert folders["OmniAvatar/OmniAvatar-1.3B"] == str(tmp_path / "OmniAvatar-1.3B")
    assert "model.safetensors or pytorch_model.bin" in {wanted.file for wanted in found}


def test_what_is_there_is_not_missing(tmp_path: Path) -> None:
    folder = tmp_path / "wav2vec2-base-960h"
    before = names_of("wav2vec2-base-960h", tmp_path)
    assert len(before) == 3
    put(folder, "config.json")
    assert names_of("wav2vec2-base-960h", tmp_path) == before - {f"{folder}/config.json"}
    put(folder, *WAV2VEC)
    assert names_of("wav2vec2-base-960h", tmp_path) == set()


def test_either_of_two_names_will_do(tmp_path: Path) -> None:
    put(tmp_path / "wav2vec2-base-960h", "config.json", "pytorch_model.bin", "preprocessor_config.json")
    assert names_of("wav2vec2-base-960h", tmp_path) == set()


def test_an_empty_folder_or_a_folder_for_a_file_does_not_count(tmp_path: Path) -> None:
    base = tmp_path / "Wan2.1-T2V-1.3B"
    (base / "google/umt5-xxl").mkdir(parents=True)
    (base / "Wan2.1_VAE.pth").mkdir()
    missing = names_of("wan2.1-t2v-1.3b", tmp_path)
    assert {f"{base}/google/umt5-xxl/", f"{base}/Wan2.1_VAE.pth"} <= missing
    put(base / "google/umt5-xxl", "spiece.model")
    assert f"{base}/google/umt5-xxl/" not in names_of("wan2.1-t2v-1.3b", tmp_path)


@pytest.mark.parametrize("root", ["pretrained_models", "checkpoints", "ckpt"])
def test_usual_folders_of_the_current_directory(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert names_of("wav2vec2-base-960h") == {
        "pretrained_models/wav2vec2-base-960h/" + name
        for name in ("config.json", "model.safetensors or pytorch_model.bin", "preprocessor_config.json")
    }
    put(tmp_path / root / "wav2vec2-base-960h", *WAV2VEC)
    assert names_of("wav2vec2-base-960h") == set()


def test_a_named_root_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "pretrained_models" / "wav2vec2-base-960h", *WAV2VEC)
    assert len(names_of("wav2vec2-base-960h", tmp_path / "elsewhere")) == 3


def test_home_in_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "weights" / "wav2vec2-base-960h", *WAV2VEC)
    assert names_of("wav2vec2-base-960h", Path("~/weights")) == set()
