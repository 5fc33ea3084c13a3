"""Names of the encoders' files, there and back: what is refused is named as it is in the file."""

from __future__ import annotations

import numpy as np
import pytest

from avatarctl.errors import UnusableWeights
from avatarctl.files.tensors import ArrayTensor, StoredTensor
from avatarctl.loading import wan_clip, wan_vae
from tests.pipelines import tiny_release as tiny
from tests.pipelines import tiny_stable_release as stable


def test_every_name_of_the_vae_comes_back() -> None:
    shapes = tiny.vae_shapes(tiny.TINY.vae_base)
    names = wan_vae.vae_key_map(wan_vae.read_vae_sizes(shapes))
    internal = {name: names.to_internal(name) for name in shapes}
    assert None not in internal.values() and len(set(internal.values())) == len(shapes) > 100
    for name, inner in internal.items():
        assert inner is not None and names.to_original(inner) == name
    assert names.to_original("odd") is None


def test_every_name_of_the_image_tower_comes_back() -> None:
    tensors = clip_tensors()
    sizes = wan_clip.read_clip_sizes(tensors)
    named = wan_clip.internal_tensors(tensors, sizes)
    back = {wan_clip.CLIP_VISION.to_original(name) for name in named}
    last = f"visual.transformer.{stable.CLIP_LAYERS - 1}."
    read = {name for name in tensors if name.startswith("visual.") and not name.startswith(last)}
    assert back == read - {"visual.head", "visual.post_norm.weight", "visual.post_norm.bias"}
    assert len(named) == len(back) + 4 * (stable.CLIP_LAYERS - 1), "queries, keys and values lie in one"
    assert wan_clip.CLIP_VISION.to_original("odd") is None


def clip_tensors() -> dict[str, StoredTensor]:
    zero = np.zeros((), np.float32)
    return {
        name: ArrayTensor(np.broadcast_to(zero, shape), "F32") for name, shape in stable.clip_shapes().items()
    }


@pytest.mark.parametrize("number", ["1000", "9" * 30])
def test_a_layer_that_would_make_the_tower_endless(number: str) -> None:
    name = f"visual.transformer.{number}.norm1.weight"
    with pytest.raises(UnusableWeights, match="no image tower has that many"):
        wan_clip.read_clip_sizes(clip_tensors() | {name: ArrayTensor(np.zeros(1, np.float32), "F32")})


@pytest.mark.parametrize(("last", "whole"), [(31, True), (30, False), (32, False)])
def test_a_tower_of_the_published_width_has_its_layers(last: int, whole: bool) -> None:
    """A file that lost its last layer has the names of a smaller tower, and would give other features."""
    shapes = {
        "visual.patch_embedding.weight": (1280, 3, 14, 14),
        "visual.pos_embedding": (1, 257, 1280),
        "visual.transformer.0.mlp.0.weight": (5120, 1280),
        f"visual.transformer.{last}.norm1.weight": (1280,),
    }
    zero = np.zeros((), np.float32)
    tensors = {name: ArrayTensor(np.broadcast_to(zero, shape), "F32") for name, shape in shapes.items()}
    if whole:
        assert wan_clip.read_clip_sizes(tensors).num_hidden_layers == 31
    else:
        with pytest.raises(UnusableWeights, match=f"has {last + 1} layers; .* has 32"):
            wan_clip.read_clip_sizes(tensors)
