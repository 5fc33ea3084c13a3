"""JSON of strangers: what later code can hold, print and write again, or one error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from avatarctl.errors import UnusableWeights
from avatarctl.files.source import open_weights
from avatarctl.files.strict_json import parse_json, parse_object
from avatarctl.weights.layout import Sizes
from avatarctl.weights.layouts import WAN
from avatarctl.weights.metadata import read_own, stated_network
from avatarctl.weights.weight_file import WeightFile

BEYOND = ["1e400", "-1e400", "9223372036854775808", "1" + "0" * 400, "1" + "0" * 9000, "NaN", "-Infinity"]


@pytest.mark.parametrize("number", BEYOND, ids=lambda text: text[:12])
def test_numbers_that_nothing_holds_are_refused(number: str) -> None:
    with pytest.raises(UnusableWeights, match="config is invalid JSON: a number"):
        parse_object(f'{{"a": [{number}]}}'.encode(), Path("config.json"), "config is")


@pytest.mark.parametrize("key", ["conventions", "network", "config", "operations", "sources"])
@pytest.mark.parametrize("number", BEYOND[:4], ids=lambda text: text[:12])
def test_so_they_are_in_our_metadata(key: str, number: str) -> None:
    with pytest.raises(UnusableWeights, match=f"avatarctl.{key} is invalid JSON"):
        read_own({f"avatarctl.{key}": f'[{{"eps": {number}}}]'})


def test_other_numbers_stay_what_they_are() -> None:
    text = "[9223372036854775807, -9223372036854775808, 1e308, 5e-324, 1e-400, 64]"
    assert parse_json(text, None, "it is") == [2**63 - 1, -(2**63), 1e308, 5e-324, 0.0, 64]


@pytest.mark.parametrize("text", [r'{"a": "\ud800"}', r'{"\udc00": 1}', r'{"a": ["x\uDBFFy"]}'])
def test_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(UnusableWeights, match="surrogate"):
        parse_object(text.encode(), Path("config.json"), "config is")


def test_a_whole_pair_is_read() -> None:
    assert parse_json(r'"\ud83d\ude00"', None, "it is") == "\U0001f600"


def test_metadata_names_its_key() -> None:
    with pytest.raises(UnusableWeights, match=r"avatarctl\.config is not valid JSON"):
        read_own({"avatarctl.config": "{"})
    with pytest.raises(UnusableWeights, match=r"duplicate key 'eps'"):
        read_own({"avatarctl.network": '{"eps": 1e-6, "eps": 1e-5}'})


@pytest.mark.parametrize("value", ["1" + "0" * 400, "1e400"], ids=["integer", "float"])
def test_a_config_beside_weights_is_read_so(tmp_path: Path, value: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(save({"w": np.zeros(2, np.float32)}))
    (tmp_path / "config.json").write_text(f'{{"lora_alpha": {value}}}')
    with pytest.raises(UnusableWeights, match=r"config\.json is invalid JSON"):
        open_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"lora_alpha": 64}))
    assert open_weights(tmp_path).config == {"lora_alpha": 64}


@pytest.mark.parametrize("eps", [None, True, "1e-6", 0, 1, -1e-6, 2.5, [1e-6], 10**18])
def test_an_eps_is_a_number_between_0_and_1(eps: object) -> None:
    path = Path("a.safetensors")
    held = WeightFile(path, "model", "original", WAN, "", Sizes(width=256), {}, config={"eps": eps})
    for metadata in ({}, {"avatarctl.network": '{"eps": 1e-6}'}):
        with pytest.raises(UnusableWeights, match="eps is"):
            stated_network(replace(held, metadata=metadata))
