"""A network with audio in cross-attention: names, shapes and counts (spec/stableavatar.md a.2, b.2, b.3)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from avatarctl.errors import UnusableWeights
from avatarctl.files.source import RawWeights
from avatarctl.files.tensors import ArrayTensor
from avatarctl.weights.describe import describe, lines
from avatarctl.weights.merge import merge_adapter
from avatarctl.weights.metadata import file_metadata, stated_network
from avatarctl.weights.recognise import recognise, require_complete
from avatarctl.weights.weight_file import WeightFile
from tests.weights.published_tables import Shapes, stableavatar, vocal, wan

EXAMPLES = {
    "blocks.0.cross_attn.k_vocal.weight": "blocks.0.attn2.vocal_k.weight",
    "blocks.1.cross_attn.v_vocal.bias": "blocks.1.attn2.vocal_v.bias",
    "blocks.1.cross_attn.norm_k_img.weight": "blocks.1.attn2.norm_added_k.weight",
    "img_emb.proj.4.bias": "condition_embedder.image_embedder.norm2.bias",
    "vocal_projector.blocks.0.norm3.weight": "vocal_projector.blocks.0.norm3.weight",
}


def read(shapes: Shapes, where: str = "", stated: Mapping[str, int] | None = None) -> WeightFile:
    """stated: what the file's metadata or a config beside it says, or the part of that for the network."""
    zero = np.zeros((), np.float32)
    tensors = {name: ArrayTensor(np.broadcast_to(zero, shape), "F32") for name, shape in shapes.items()}
    path = Path("x.safetensors")
    fields = dict(stated or {})
    config = {"config": fields, "model_config": {"model_config": fields}}.get(where, {})
    metadata = {"avatarctl.network": json.dumps(fields)} if where == "metadata" else {}
    return recognise(RawWeights(path, (path,), "safetensors", tensors, metadata, config))


def test_the_published_model() -> None:
    shapes = stableavatar()
    # spec/stableavatar.md 0
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (1143, 1_747_426_112)
    held = read(shapes)
    require_complete(held)
    assert held.variant == "StableAvatar 1.3B, 36 channels" and held.heads == 12
    sizes = held.sizes
    assert (sizes.vocal_dim, sizes.vocal_hidden_dim, sizes.vocal_layers, sizes.vocal_ffn) == (768, 0, 2, 3072)


def test_the_14b_layout_is_told_from_its_tensors() -> None:
    shapes = wan(5120, 13_824, 40, 36, image=1280) | vocal(5120, 40, hidden=2048)
    own = [math.prod(shape) for name, shape in shapes.items() if name.startswith("vocal_projector.")]
    assert round(sum(own) / 1e6, 1) == 457.9  # spec/stableavatar.md b.3
    held = read(shapes)
    require_complete(held)
    assert held.sizes.vocal_hidden_dim == 2048
    assert held.layout.constructor(held.sizes)["vocal_hidden_dim"] == 2048
    assert "vocal_hidden_dim" not in held.layout.constructor(read(stableavatar()).sizes)


def test_names_of_the_network_and_back() -> None:
    key_map = read(stableavatar()).layout.key_map
    internal = key_map.rename_to_internal(stableavatar())
    assert key_map.rename_to_original(internal) == stableavatar()
    for original, name in EXAMPLES.items():
        assert key_map.to_internal(original) == name
    renamed = read(internal)
    require_complete(renamed)
    assert renamed.naming == "diffusers" and renamed.tensors.keys() == stableavatar().keys()


@pytest.mark.parametrize(
    "name",
    [
        "vocal_projector.proj_model.proj.weight", "vocal_projector.blocks.1.ffn.2.bias",
        "blocks.7.cross_attn.v_vocal.weight", "img_emb.proj.1.bias",
    ],
)  # fmt: skip
def test_each_tensor_is_needed_and_no_other(name: str) -> None:
    shapes = stableavatar()
    shape = shapes.pop(name)
    with pytest.raises(UnusableWeights, match="1 tensor is missing"):
        require_complete(read(shapes))
    with pytest.raises(UnusableWeights, match="unknown tensor has no place"):
        require_complete(read(stableavatar() | {"vocal_projector.text_embedding.weight": shape}))


def test_a_projector_without_its_blocks_is_not_complete() -> None:
    """No other tensor says that there are any."""
    inside = "vocal_projector.blocks."
    shapes = {name: shape for name, shape in stableavatar().items() if not name.startswith(inside)}
    with pytest.raises(UnusableWeights, match=r"34 tensors are missing, vocal_projector\.blocks\.0"):
        require_complete(read(shapes))


def without_last_block() -> Shapes:
    return {name: shape for name, shape in stableavatar().items() if ".blocks.1." not in name[15:]}


def test_a_projector_without_its_last_block_is_not_complete() -> None:
    """Every published network has two, and the tensors of the first do not say so."""
    held = read(without_last_block())
    with pytest.raises(UnusableWeights, match=r"17 tensors are missing, vocal_projector\.blocks\.1"):
        require_complete(held)
    shown = lines(describe(held))
    assert any("17 tensors missing" in line for line in shown)
    assert any(line.startswith("missing") and "vocal_projector.blocks.1.modulation" in line for line in shown)


BLOCKS = [(1, 1, True), (2, 2, True), (2, 1, False), (1, 2, False), (3, 3, True), (0, 3, True), (3, 2, False)]


@pytest.mark.parametrize("where", ["config", "model_config", "metadata"])
@pytest.mark.parametrize(("stated", "there", "fits"), BLOCKS)
def test_another_number_of_blocks_is_believed_where_it_is_stated(
    stated: int, there: int, fits: bool, where: str
) -> None:
    """0: nothing is stated; more than published may be there then."""
    shapes = without_last_block()
    block = {name: shape for name, shape in shapes.items() if name.startswith("vocal_projector.blocks.0")}
    for number in range(1, there):
        shapes |= {name.replace("blocks.0", f"blocks.{number}"): shape for name, shape in block.items()}
    held = read(shapes, where, {"vocal_layers": stated} if stated else {})
    assert (not held.missing and not held.unknown) == fits
    assert held.layout.constructor(held.sizes)["vocal_layers"] == (stated or there)


@pytest.mark.parametrize("where", ["config", "model_config", "metadata"])
def test_heads_of_the_projector_are_those_that_are_stated(where: str) -> None:
    """No tensor tells them."""
    assert read(stableavatar()).layout.constructor(read(stableavatar()).sizes)["vocal_heads"] == 8
    held = read(stableavatar(), where, {"vocal_heads": 12})
    assert held.layout.constructor(held.sizes)["vocal_heads"] == 12
    for value in (7, 10**9):
        with pytest.raises(UnusableWeights, match="vocal_heads"):
            read(stableavatar(), where, {"vocal_heads": value})
    with pytest.raises(UnusableWeights, match="vocal_layers is stated as 1000000"):
        read(stableavatar(), where, {"vocal_layers": 10**6})


def test_what_is_stated_goes_with_the_weights_and_what_is_assumed_does_not() -> None:
    """A guess would outrank, once written, what another file states."""
    assert stated_network(read(stableavatar())) == {}
    for where in ("config", "metadata"):
        held = read(stableavatar(), where, {"vocal_heads": 12, "vocal_layers": 2})
        assert stated_network(held) == {"vocal_heads": 12, "vocal_layers": 2}
        assert json.loads(file_metadata(held, (), {})["avatarctl.network"]) == stated_network(held)


def test_a_lora_that_was_made_for_other_heads() -> None:
    target = "vocal_projector.blocks.0.cross_attn.q"
    pair: Shapes = {f"{target}.lora_A.weight": (4, 1536), f"{target}.lora_B.weight": (1536, 4)}
    lora = read(pair, "metadata", {"vocal_heads": 12})
    merged = merge_adapter(read(stableavatar()), lora)
    assert merged.sizes.vocal_heads == 12 and stated_network(merged) == {"vocal_heads": 12}
    with pytest.raises(UnusableWeights, match=r"made for vocal_heads 12, and the base .* has 8"):
        merge_adapter(read(stableavatar(), "config", {"vocal_heads": 8}), lora)


def test_inspection_shows_the_audio_layers() -> None:
    facts = describe(read(stableavatar()))
    assert (facts["vocal_layers"], facts["vocal_heads"], facts["vocal_hidden_dim"]) == (2, 8, None)
    (network,) = [line for line in lines(facts) if line.startswith("network")]
    assert "audio tokens 768, layers of their projector 2, its heads 8" in network
    as_part = [each for each in facts["loaders"] if each["loader"] == "avatarctl infer --weights"]
    assert [each["reason"] for each in as_part] == ["as dit=PATH"], "there are no adapters of this family"


def test_a_projector_of_another_width_is_refused() -> None:
    """Its modulation is the transformer's own (spec/stableavatar.md a.1): widths are equal."""
    with pytest.raises(UnusableWeights, match=r"final_proj\.weight has shape"):
        read(stableavatar() | {"vocal_projector.final_head.final_proj.weight": (768, 768)})
