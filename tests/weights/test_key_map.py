import pytest

from avatarctl.loading.built_in import build_random_modules
from avatarctl.registry import find_model
from avatarctl.weights.key_map import KeyMap
from avatarctl.weights.layouts import OMNIAVATAR


def test_every_parameter_of_the_network_has_an_original_name_and_finds_back() -> None:
    state = build_random_modules(find_model("cartoon-i2v")).dit.state_dict()
    original = OMNIAVATAR.key_map.rename_to_original(state)
    assert len(original) == len(state)
    assert {"blocks.0.self_attn.q.weight", "blocks.5.norm3.bias", "head.modulation"} <= original.keys()
    assert OMNIAVATAR.key_map.rename_to_internal(original).keys() == state.keys()


def test_adapter_suffixes_travel_with_the_name() -> None:
    key = "blocks.3.self_attn.o.lora_A.default.weight"
    internal = OMNIAVATAR.key_map.to_internal(key)
    assert internal == "blocks.3.attn1.to_out.0.lora_A.default.weight"
    assert OMNIAVATAR.key_map.to_original(internal) == key


def test_unknown_keys_are_named_not_dropped() -> None:
    with pytest.raises(KeyError, match=r"blocks\.0\.self_attn\.x\.weight"):
        OMNIAVATAR.key_map.rename_to_internal({"blocks.0.self_attn.x.weight": 1})


def test_literal_dots_do_not_match_other_characters() -> None:
    assert KeyMap((("a.{n}.b", "c.{n}"),)).to_internal("aX1Xb") is None
