"""Names and sizes of `Wan2.1_VAE.pth`, as diffusers' `AutoencoderKLWan` wants them.

The release counts residual blocks and resamplers of a coder in one row; diffusers keeps that row in the
encoder and sorts the decoder's by level. The arithmetic needs the number of blocks per level, so it cannot be
a `KeyMap`. Sizes come from shapes alone (spec/omniavatar.md c).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from avatarctl.errors import UnusableWeights

__all__ = ["VaeSizes", "internal_name", "original_name", "read_vae_sizes"]

Shape = tuple[int, ...]

_DOWN: Final = "encoder.downsamples"
_MOST_BLOCKS: Final = 64
"""Blocks in the row of a coder beyond which a file is absurd; the release has 11 and 15."""

_OUTSIDE: Final = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_IN_CODER: Final = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_IN_BLOCK: Final = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_MIDDLE: Final = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


@dataclass(frozen=True)
class VaeSizes:
    """Arguments of `AutoencoderKLWan`.

    dim_mult: width of each level over base_dim; temporal: for each step down, whether it halves time.
    """

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal: tuple[bool, ...]


def read_vae_sizes(shapes: Mapping[str, Shape]) -> VaeSizes:
    """Sizes by original names. Raises UnusableWeights where the row of blocks makes no encoder."""
    base_dim, z_dim = _first_side(shapes, "encoder.conv1.weight"), _first_side(shapes, "conv2.weight")
    levels: list[list[int]] = [[]]  # output width of each residual block
    temporal = []
    for index in range(_MOST_BLOCKS):
        if f"{_DOWN}.{index}.residual.6.weight" in shapes:
            levels[-1].append(_first_side(shapes, f"{_DOWN}.{index}.residual.6.weight"))
        elif f"{_DOWN}.{index}.resample.1.weight" in shapes:
            temporal.append(f"{_DOWN}.{index}.time_conv.weight" in shapes)
            levels.append([])
        else:
            break
    counts, widths = {len(level) for level in levels}, [level[-1] for level in levels if level]
    if len(counts) != 1 or counts == {0} or any(width % base_dim for width in widths):
        raise UnusableWeights(
            f"{_DOWN} has {', '.join(str(len(level)) for level in levels)} residual blocks by level; "
            "a Wan VAE has the same number in each"
        )
    multiples = tuple(width // base_dim for width in widths)
    return VaeSizes(base_dim, z_dim, multiples, counts.pop(), tuple(temporal))


def _first_side(shapes: Mapping[str, Shape], name: str) -> int:
    shape = shapes.get(name)
    if not shape or shape[0] < 1:
        raise UnusableWeights(f"{name} is missing or has no size: this is no Wan VAE")
    return shape[0]


def internal_name(name: str, num_res_blocks: int) -> str | None:
    """diffusers' name of an original one, None where the release has no such name."""
    if match := re.fullmatch(r"(conv[12])\.(\w+)", name):
        return f"{_OUTSIDE[match[1]]}.{match[2]}"
    if not (match := re.fullmatch(r"(encoder|decoder)\.(.+)\.(\w+)", name)):
        return None
    coder, inner, leaf = match.groups()
    if inner in _IN_CODER:
        return f"{coder}.{_IN_CODER[inner]}.{leaf}"
    if match := re.fullmatch(r"middle\.([012])\.(.+)", inner):
        return f"{coder}.mid_block.{_MIDDLE[match[1]]}.{_IN_BLOCK.get(match[2], match[2])}.{leaf}"
    if match := re.fullmatch(r"(down|up)samples\.(\d{1,3})\.(.+)", inner):
        block = _IN_BLOCK.get(match[3], match[3])
        if coder == "encoder":
            return f"encoder.down_blocks.{match[2]}.{block}.{leaf}"
        # num_res_blocks + 1 blocks and a resampler make a level.
        level, place = divmod(int(match[2]), num_res_blocks + 2)
        which = f"resnets.{place}" if place <= num_res_blocks else "upsamplers.0"
        return f"decoder.up_blocks.{level}.{which}.{block}.{leaf}"
    return None


def original_name(name: str, num_res_blocks: int) -> str | None:
    """The release's name of one of diffusers', None where there is none: the other way of `internal_name`."""
    if match := re.fullmatch(r"(quant_conv|post_quant_conv)\.(\w+)", name):
        return f"{_key(_OUTSIDE, match[1])}.{match[2]}"
    if not (match := re.fullmatch(r"(encoder|decoder)\.(.+)\.(\w+)", name)):
        return None
    coder, inner, leaf = match.groups()
    if inner in _IN_CODER.values():
        return f"{coder}.{_key(_IN_CODER, inner)}.{leaf}"
    if match := re.fullmatch(r"mid_block\.(resnets\.[01]|attentions\.0)\.(.+)", inner):
        return f"{coder}.middle.{_key(_MIDDLE, match[1])}.{_key(_IN_BLOCK, match[2])}.{leaf}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.(.+)", inner):
        return f"{coder}.downsamples.{match[1]}.{_key(_IN_BLOCK, match[2])}.{leaf}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", inner):
        place = int(match[3]) if match[2] == "resnets" else num_res_blocks + 1
        row = int(match[1]) * (num_res_blocks + 2) + place
        return f"{coder}.upsamples.{row}.{_key(_IN_BLOCK, match[4])}.{leaf}"
    return None


def _key(names: Mapping[str, str], value: str) -> str:
    """Of the name that stands for `value`; `value` itself where none does."""
    return next((key for key, each in names.items() if each == value), value)
