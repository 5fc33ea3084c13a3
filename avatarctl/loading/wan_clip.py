"""Names and sizes of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`, as transformers'
`CLIPVisionModel` wants them.

The file holds the image tower as `visual.*` and a text tower, which no video model reads; of the image tower
they read all layers but the last. Queries, keys and values of a layer lie in one matrix, in this order.
Names: modules/clip.py of Wan 2.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from avatarctl.errors import UnusableWeights
from avatarctl.files.tensors import StoredTensor
from avatarctl.weights.key_map import KeyMap
from avatarctl.weights.sizes import MOST_LAYERS
from avatarctl.weights.transforms import part_of

__all__ = ["CLIP_VISION", "ClipSizes", "internal_tensors", "read_clip_sizes"]

HEADS: Final = 16
"""Of ViT-H/14; no tensor tells."""
_PUBLISHED: Final = (1280, 32)
"""Width and layers of ViT-H/14 (modules/clip.py of Wan 2.1): a file that lost its last layer looks like a
whole one of a smaller tower."""

_LAYER: Final = "encoder.layers.{n}"
CLIP_VISION: Final = KeyMap(
    (
        ("visual.cls_embedding", "embeddings.class_embedding"),
        ("visual.pos_embedding", "embeddings.position_embedding.weight"),
        ("visual.patch_embedding.weight", "embeddings.patch_embedding.weight"),
        ("visual.pre_norm.{rest}", "pre_layrnorm.{rest}"),  # transformers' spelling
        ("visual.transformer.{n}.norm1.{rest}", f"{_LAYER}.layer_norm1.{{rest}}"),
        *(
            ("visual.transformer.{n}.attn.to_qkv.{rest}", f"{_LAYER}.self_attn.{letter}_proj.{{rest}}")
            for letter in "qkv"
        ),
        ("visual.transformer.{n}.attn.proj.{rest}", f"{_LAYER}.self_attn.out_proj.{{rest}}"),
        ("visual.transformer.{n}.norm2.{rest}", f"{_LAYER}.layer_norm2.{{rest}}"),
        ("visual.transformer.{n}.mlp.0.{rest}", f"{_LAYER}.mlp.fc1.{{rest}}"),
        ("visual.transformer.{n}.mlp.2.{rest}", f"{_LAYER}.mlp.fc2.{{rest}}"),
    )
)
"""Of a matrix that holds three, `to_internal` tells the first."""
_FUSED: Final = ".attn.to_qkv."
_LAYER_NUMBER: Final = re.compile(r"visual\.transformer\.(\d+)\.", re.ASCII)
_UNREAD: Final = ("visual.head", "visual.post_norm.weight", "visual.post_norm.bias")
"""What makes of the last layer a point in the space that images and texts share."""


@dataclass(frozen=True)
class ClipSizes:
    """Arguments of `models.clip.clip_config`: image_size, patch_size in pixels of a side; num_hidden_layers
    counts the layers that are read."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int


def read_clip_sizes(tensors: Mapping[str, StoredTensor]) -> ClipSizes:
    """Sizes by the names of the file. Raises UnusableWeights where these make no image tower."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        tensor = tensors.get(name)
        if tensor is None or len(tensor.info.shape) != dimensions or 0 in tensor.info.shape:
            raise UnusableWeights(f"{name} is missing or has no size: this is no image tower of CLIP")
        return tensor.info.shape

    width, _, _, patch = shape("visual.patch_embedding.weight", 4)
    side = math.isqrt(max(shape("visual.pos_embedding", 3)[1] - 1, 0))
    ffn, _ = shape("visual.transformer.0.mlp.0.weight", 2)
    layers = _last_layer(tensors)
    if width == _PUBLISHED[0] and layers + 1 != _PUBLISHED[1]:
        raise UnusableWeights(
            f"visual.transformer has {layers + 1} layers; the image tower of this width has {_PUBLISHED[1]}"
        )
    if width % HEADS:
        raise UnusableWeights(f"{HEADS} heads do not divide the width {width} of the image tower")
    return ClipSizes(width, ffn, layers, HEADS, side * patch, patch)


def _last_layer(tensors: Mapping[str, StoredTensor]) -> int:
    """Number of the last layer, which is not read. Raises UnusableWeights for one that would make the
    network endless."""
    found = [match[1] for name in tensors if (match := _LAYER_NUMBER.match(name))]
    last = max(found, key=lambda number: (len(number), number), default="0")
    if len(last) > len(str(MOST_LAYERS)) or int(last) >= MOST_LAYERS:
        raise UnusableWeights(f"visual.transformer has a layer {last[:20]}; no image tower has that many")
    return int(last)


def internal_tensors(tensors: Mapping[str, StoredTensor], sizes: ClipSizes) -> dict[str, StoredTensor]:
    """What is read of the image tower, by the names of transformers. Raises UnusableWeights for tensors that
    are divided or joined there and have another shape than these sizes need."""
    named: dict[str, StoredTensor] = {}
    width, places = sizes.hidden_size, (sizes.image_size // sizes.patch_size) ** 2 + 1
    # Both have a leading dimension of 1 in the file.
    embeddings = {"visual.cls_embedding": (1, 1, width), "visual.pos_embedding": (1, places, width)}
    last = f"visual.transformer.{sizes.num_hidden_layers}."
    for name, tensor in tensors.items():
        if not name.startswith("visual.") or name.startswith(last) or name in _UNREAD:
            continue
        internal = CLIP_VISION.to_internal(name) or name
        if name in embeddings:
            _require_shape(name, tensor, embeddings[name])
            kept = tuple(side for side in tensor.info.shape if side != 1)
            named[internal] = part_of(tensor, 0, kept)
        elif _FUSED in name:
            _require_shape(name, tensor, (3 * width, width) if name.endswith("weight") else (3 * width,))
            rows, *inputs = tensor.info.shape
            shape = (rows // 3, *inputs)
            for place, letter in enumerate("qkv"):
                target = internal.replace("q_proj", f"{letter}_proj")
                named[target] = part_of(tensor, place * math.prod(shape), shape)
        else:
            named[internal] = tensor
    return named


def _require_shape(name: str, tensor: StoredTensor, wanted: tuple[int, ...]) -> None:
    if tensor.info.shape != wanted:
        raise UnusableWeights(
            f"{name} has shape {list(tensor.info.shape)}; the rest of the file needs {list(wanted)}"
        )
