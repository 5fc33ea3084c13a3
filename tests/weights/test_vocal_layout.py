"""A network that hears in cross-attention: names, shapes and counts (spec/stableavatar.md a.2, b.2, b.3)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from avatarctl.errors import UnusableWeights
from avatarctl.weights.checkpoint import Checkpoint
from avatarctl.weights.describe import describe, lines
from avatarctl.weights.files.source import RawWeights
from avatarctl.weights.recognise import recognise, require_complete
from avatarctl.weights.tensors import ArrayTensor
from tests.weights.published_tables import Shapes, linear, wan

EXAMPLES = {
    "blocks.0.cross_attn.k_vocal.weight": "blocks.0.attn2.vocal_k.weight",
    "blocks.1.cross_attn.v_vocal.bias": "blocks.1.attn2.vocal_v.bias",
    "blocks.1.cross_attn.norm_k_img.weight": "blocks.1.attn2.norm_added_k.weight",
    "img_emb.proj.4.bias": "condition_embedder.image_embedder.norm2.bias",
    "vocal_projector.blocks.0.norm3.weight": "vocal_projector.blocks.0.norm3.weight",
}


def vocal(width: int, layers: int, hidden: int = 0) -> Shapes:
    """What the family adds; hidden: between the two layers of the 14B projection."""
    shapes: Shapes = {}
    for i in range(layers):
        for name in ("k_vocal", "v_vocal"):
            shapes |= linear(f"blocks.{i}.cross_attn.{name}", width, width)
    projector = "vocal_projector.proj_model"
    steps = (("proj_1", "norm_1", hidden, 768), ("proj_2", "norm_2", width, hidden))
    for proj, norm, outputs, inputs in steps if hidden else (("proj", "norm", width, 768),):
        shapes[f"{projector}.{proj}.weight"] = (outputs, inputs)
        shapes[f"{projector}.{norm}.weight"] = shapes[f"{projector}.{norm}.bias"] = (outputs,)
    for j in range(2):
        block = f"vocal_projector.blocks.{j}"
        shapes[f"{block}.modulation"] = (1, 6, width)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (width,)
        for letter in "qkvo":
            shapes |= linear(f"{block}.cross_attn.{letter}", width, width)
        for letter in "qk":
            shapes[f"{block}.cross_attn.norm_{letter}.weight"] = (width,)
        shapes |= linear(f"{block}.ffn.0", 2 * width, width) | linear(f"{block}.ffn.2", width, 2 * width)
    shapes["vocal_projector.final_head.modulation"] = (1, 2, width)
    return shapes | linear("vocal_projector.final_head.final_proj", width, width)


def published() -> Shapes:
    """transformer3d-square.pt and its twin."""
    return wan(1536, 8960, 30, 36, image=1280) | vocal(1536, 30)


def read(shapes: Shapes) -> Checkpoint:
    zero = np.zeros((), np.float32)
    tensors = {name: ArrayTensor(np.broadcast_to(zero, shape), "F32") for name, shape in shapes.items()}
    path = Path("x.safetensors")
    return recognise(RawWeights(path, (path,), "safetensors", tensors))


def test_the_published_model() -> None:
    shapes = published()
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (1143, 1_747_426_112)  # spec 0
    held = read(shapes)
    require_complete(held)
    assert held.variant == "StableAvatar 1.3B, 36 channels" and held.heads == 12
    sizes = held.sizes
    assert (sizes.vocal_dim, sizes.vocal_hidden_dim, sizes.vocal_layers, sizes.vocal_ffn) == (768, 0, 2, 3072)


def test_the_14b_layout_is_told_from_its_tensors() -> None:
    shapes = wan(5120, 13_824, 40, 36, image=1280) | vocal(5120, 40, hidden=2048)
    own = [math.prod(shape) for name, shape in shapes.items() if name.startswith("vocal_projector.")]
    assert round(sum(own) / 1e6, 1) == 457.9  # b.3
    held = read(shapes)
    require_complete(held)
    assert held.sizes.vocal_hidden_dim == 2048
    assert held.layout.constructor(held.sizes)["vocal_hidden_dim"] == 2048
    assert "vocal_hidden_dim" not in held.layout.constructor(read(published()).sizes)


def test_names_of_the_network_and_back() -> None:
    key_map = read(published()).layout.key_map
    internal = key_map.rename_to_internal(published())
    assert key_map.rename_to_original(internal) == published()
    for original, name in EXAMPLES.items():
        assert key_map.to_internal(original) == name
    renamed = read(internal)
    require_complete(renamed)
    assert renamed.naming == "diffusers" and renamed.tensors.keys() == published().keys()


@pytest.mark.parametrize(
    "name",
    [
        "vocal_projector.proj_model.proj.weight", "vocal_projector.blocks.1.ffn.2.bias",
        "blocks.7.cross_attn.v_vocal.weight", "img_emb.proj.1.bias",
    ],
)  # fmt: skip
def test_each_tensor_is_needed_and_no_other(name: str) -> None:
    shapes = published()
    shape = shapes.pop(name)
    with pytest.raises(UnusableWeights, match="1 tensor is missing"):
        require_complete(read(shapes))
    with pytest.raises(UnusableWeights, match="unknown tensor has no place"):
        require_complete(read(published() | {"vocal_projector.text_embedding.weight": shape}))


def test_a_projector_without_its_blocks_is_not_complete() -> None:
    """No other tensor says that there are any."""
    shapes = {name: shape for name, shape in published().items() if ".blocks." not in name}
    shapes |= {name: shape for name, shape in published().items() if not name.startswith("vocal_projector.")}
    with pytest.raises(UnusableWeights, match=r"34 tensors are missing, vocal_projector\.blocks\.0"):
        require_complete(read(shapes))


def test_inspection_shows_what_hears() -> None:
    facts = describe(read(published()))
    assert facts["vocal_layers"] == 2 and facts["vocal_hidden_dim"] is None
    (network,) = [line for line in lines(facts) if line.startswith("network")]
    assert "sound tokens 768, layers of their projector 2" in network
    as_part = [each for each in facts["loaders"] if each["loader"] == "avatarctl infer -o model.weights"]
    assert [each["reason"] for each in as_part] == ["as dit=PATH"], "there are no adapters of this family"


def test_a_projector_of_another_width_is_refused() -> None:
    """Its modulation is the transformer's own (a.1): widths are equal."""
    with pytest.raises(UnusableWeights, match=r"final_proj\.weight has shape"):
        read(published() | {"vocal_projector.final_head.final_proj.weight": (768, 768)})
