"""Dimensions and the name of a network, from tensor shapes alone; sources: weights/layouts.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from avatarctl.errors import UnusableWeights
from avatarctl.weights.layout import Sizes, WeightLayout
from avatarctl.weights.layouts import CLIP_WIDTH, WAN
from avatarctl.weights.weight_file import Kind

__all__ = ["MOST_LAYERS", "read_sizes", "variant_of"]

MOST_LAYERS: Final = 1000
"""More blocks, or heads, than any network has."""

_VOCAL: Final = "vocal_projector.proj_model"

_SIZE_NAMES: Final = {(1536, 30): "1.3B", (5120, 40): "14B", (3072, 30): "5B"}

Shape = tuple[int, ...]


def read_sizes(shapes: Mapping[str, Shape], names: Iterable[str]) -> Sizes:
    """Sizes of a network.

    shapes: weights that are there whole or changed by a LoRA pair, under original names; names: all of them
    and what else is changed. Raises UnusableWeights for shapes that no Wan transformer has.
    """
    names = list(names)
    layers = _count(r"blocks", names)
    if with_audio := _count(r"audio_cond_projs", names):
        # One projection for each layer that takes audio: L // 2 - 1 of them.
        layers = layers if layers // 2 - 1 >= with_audio else 2 * (with_audio + 1)
    images = any("_img" in name for name in names)

    def dimension(axis: int, *candidates: str) -> int:
        for candidate in candidates:
            for name in (candidate.format(index) for index in range(layers if "{}" in candidate else 1)):
                shape = shapes.get(name)
                if shape is not None:
                    if len(shape) <= axis:
                        raise UnusableWeights(f"{name} has shape {list(shape)}")
                    return shape[axis]
        return 0

    width = dimension(
        0, "patch_embedding.weight", "blocks.{}.self_attn.q.weight", "blocks.{}.self_attn.k.weight",
        "blocks.{}.self_attn.v.weight", "blocks.{}.self_attn.o.weight", "blocks.{}.cross_attn.q.weight",
        "blocks.{}.cross_attn.k.weight", "blocks.{}.cross_attn.v.weight", "blocks.{}.cross_attn.o.weight",
        "blocks.{}.ffn.2.weight", "audio_cond_projs.0.weight", "blocks.{}.norm3.weight",
        "blocks.{}.self_attn.norm_q.weight", "blocks.{}.cross_attn.norm_q.weight",
        "blocks.{}.cross_attn.k_vocal.weight", "blocks.{}.cross_attn.v_vocal.weight",
        "vocal_projector.final_head.final_proj.weight",
    ) or dimension(1, "blocks.{}.ffn.0.weight")  # fmt: skip
    return Sizes(
        width=width,
        ffn=dimension(0, "blocks.{}.ffn.0.weight") or dimension(1, "blocks.{}.ffn.2.weight"),
        layers=layers,
        in_channels=dimension(1, "patch_embedding.weight"),
        out_channels=dimension(0, "head.head.weight") // 4,
        text_dim=dimension(1, "text_embedding.0.weight"),
        freq_dim=dimension(1, "time_embedding.0.weight"),
        image_dim=dimension(1, "img_emb.proj.1.weight", "img_emb.proj.3.weight")
        or (CLIP_WIDTH if images else 0),
        audio_hidden_size=dimension(0, "audio_proj.proj.weight"),
        audio_input_dim=dimension(1, "audio_proj.proj.weight") // 4,
        vocal_dim=dimension(1, f"{_VOCAL}.proj.weight", f"{_VOCAL}.proj_1.weight"),
        vocal_hidden_dim=dimension(0, f"{_VOCAL}.proj_1.weight") or dimension(1, f"{_VOCAL}.proj_2.weight"),
        vocal_layers=_count(r"vocal_projector\.blocks", names),
        vocal_ffn=dimension(0, "vocal_projector.blocks.0.ffn.0.weight"),
    )


def _count(row: str, names: list[str]) -> int:
    """One more than the highest number in a row of layers. Raises UnusableWeights for one that would make the
    table of expected tensors endless."""
    pattern = re.compile(rf"{row}\.(\d+)\..*")
    found = [match[1] for name in names if (match := pattern.fullmatch(name))]
    if any(len(number) > len(str(MOST_LAYERS)) or int(number) >= MOST_LAYERS for number in found):
        raise UnusableWeights(f"a block has number {max(found, key=len)[:20]}; no model has that many")
    return 1 + max(map(int, found), default=-1)


def variant_of(kind: Kind, layout: WeightLayout, sizes: Sizes) -> str:
    """What people call this network: `TITLE 14B, 33 channels`, `LoRA for Wan 2.1 T2V 1.3B`."""
    width = f"width {sizes.width}" if sizes.width else "unknown width"
    layers = f"{sizes.layers} layer{'' if sizes.layers == 1 else 's'}"
    size = _SIZE_NAMES.get((sizes.width, sizes.layers)) or f"of {width}, {layers}"
    if layout is not WAN:
        channels = f", {sizes.in_channels} channels" if sizes.in_channels else ""
        name = f"{layout.title} {size}{channels}"
        return f"adapter of {name}" if kind == "adapter" else name
    name = _plain(size, sizes, kind)
    return f"LoRA for {name}" if kind == "adapter" else name


def _plain(size: str, sizes: Sizes, kind: Kind) -> str:
    if kind == "adapter" and not sizes.in_channels:
        return f"Wan {'I2V ' if sizes.image_dim else ''}{size}"
    if (sizes.in_channels, sizes.out_channels) == (48, 48):
        return f"Wan 2.2 TI2V {size}"
    if sizes.in_channels == 16:
        twin = " (or one expert of Wan 2.2 T2V A14B, which has the same shapes)" if size == "14B" else ""
        return f"Wan 2.1 T2V {size}{twin}"
    if sizes.in_channels == 36:
        return f"Wan 2.1 I2V {size}" if sizes.image_dim else f"Wan 2.2 I2V {size}, one expert"
    return f"Wan {size} with {sizes.in_channels} input channels, no audio layers"
