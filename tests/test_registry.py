"""Rows of the registry hold together."""

from __future__ import annotations

from typing import get_args

import pytest

from avatarctl.config import ModelRowDefaults, Setting, keys, resolve, value_of
from avatarctl.errors import ConfigError
from avatarctl.registry import ROWS, Kind, Row, Status, configure, find, find_model, fitting

ALL = [pytest.param(row, id=row.name) for row in ROWS.values()]
RUNNING = [row.name for row in ROWS.values() if row.kind == "model" and row.status != "not yet supported"]


@pytest.mark.parametrize("row", ALL)
def test_row_is_well_formed(row: Row) -> None:
    assert ROWS[row.name] is row
    assert row.kind in get_args(Kind) and row.status in get_args(Status)
    assert row.title and row.title == row.title.strip()
    assert set(row.needs) <= ROWS.keys() - {row.name}
    assert (row.kind == "model") == bool(row.family)
    if row.source == "package":
        assert not row.hub_id and row.sha256.keys() == set(row.files)
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


@pytest.mark.parametrize("name", RUNNING)
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
        "cartoon-i2v", "cartoon-v2v", "omniavatar-14b", "omniavatar-1.3b", "stableavatar-1.3b",
        "stableavatar-1.3b-rec-vec", "stableavatar-tiny", "liveavatar-14b",
    }  # fmt: skip
    assert status["cartoon-i2v"] == status["cartoon-v2v"] == "works"
    assert status["stableavatar-tiny"] == "works" and status["liveavatar-14b"] == "not yet supported"
    assert status["omniavatar-14b"] == status["stableavatar-1.3b"] == "needs weights"


@pytest.mark.parametrize("row", ALL)
def test_what_runs_instead_is_the_same_network_for_another_shape(row: Row) -> None:
    for other in map(find, row.instead):
        assert (other.family, other.network, other.needs) == (row.family, row.network, row.needs)
        assert other.made_for and row.made_for and other.made_for != row.made_for
        assert not other.instead, "one step leads to it"


@pytest.mark.parametrize(
    ("asked", "size", "runs"),
    [
        ("stableavatar-1.3b", (512, 512), "stableavatar-1.3b"),
        ("stableavatar-1.3b", (832, 480), "stableavatar-1.3b-rec-vec"),
        ("stableavatar-1.3b", (480, 832), "stableavatar-1.3b-rec-vec"),
        ("stableavatar-1.3b-rec-vec", (512, 512), "stableavatar-1.3b-rec-vec"),
        ("omniavatar-14b", (512, 512), "omniavatar-14b"),
        ("stableavatar-tiny", (64, 32), "stableavatar-tiny"),
    ],
)
def test_the_size_chooses(asked: str, size: tuple[int, int], runs: str) -> None:
    assert fitting(find(asked), *size).name == runs


def test_find() -> None:
    assert find("cartoon-i2v").family == "omniavatar"
    with pytest.raises(ConfigError, match=r"did you mean omniavatar-1\.3b\?"):
        find("omniavatar-1.3")
    with pytest.raises(ConfigError, match=r"did you mean cartoon-i2v\?"):
        find("Cartoon_i2v")
    with pytest.raises(ConfigError, match="models list"):
        find("zzzzzz")


def test_find_model() -> None:
    assert find_model("omniavatar-14b").kind == "model"
    with pytest.raises(ConfigError, match=r"kind base.*did you mean omniavatar-14b\?"):
        find_model("wan2.1-t2v-14b")
    with pytest.raises(ConfigError, match="no model"):
        find_model("absent")


def test_what_a_named_transformer_states_counts_below_what_is_asked() -> None:
    def stated(model: str, transformer: str) -> dict[str, str]:
        assert (model, transformer) == ("omniavatar-14b", "mine.safetensors")
        return {"data.mask_rule": "first_keep"}

    named = ("model.name=omniavatar-14b", "model.channels=49", "model.weights.dit=mine.safetensors")
    assert configure(*named).data.mask_rule == "all"
    assert configure(*named, stated_by=stated).data.mask_rule == "first_keep"
    assert configure(*named, "data.mask_rule=all", stated_by=stated).data.mask_rule == "all"
