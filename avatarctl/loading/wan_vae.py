"""Names and sizes of `Wan2.1_VAE.pth`, as diffusers' `AutoencoderKLWan` wants them.

The release counts residual blocks and resamplers of a coder in one row; diffusers keeps that row in the
encoder and sorts the decoder's by level, so that the names depend on the sizes. These come from shapes alone
(spec/omniavatar.md c).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from avatarctl.errors import UnusableWeights
from avatarctl.weights.key_map import KeyMap

__all__ = ["VaeSizes", "read_vae_sizes", "vae_key_map"]

Shape = tuple[int, ...]

_DOWN: Final = "encoder.downsamples"
_MOST_BLOCKS: Final = 64
"""Blocks in the row of a coder beyond which a file is absurd; the release has 11 and 15."""

_IN_CODER: Final = (("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"))
_IN_BLOCK: Final = (
    ("residual.0.", "norm1."), ("residual.2.", "conv1."), ("residual.3.", "norm2."),
    ("residual.6.", "conv2."), ("shortcut.", "conv_shortcut."), ("", ""),
)  # fmt: skip
_MIDDLE: Final = ("resnets.0", "attentions.0", "resnets.1")


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


def vae_key_map(sizes: VaeSizes) -> KeyMap:
    """The release's names and those of diffusers, for a VAE of these sizes."""
    rules = [("conv1.{rest}", "quant_conv.{rest}"), ("conv2.{rest}", "post_quant_conv.{rest}")]
    for coder in ("encoder", "decoder"):
        rules += [(f"{coder}.{a}.{{rest}}", f"{coder}.{b}.{{rest}}") for a, b in _IN_CODER]
        for place, block in enumerate(_MIDDLE):
            rules += _block(f"{coder}.middle.{place}", f"{coder}.mid_block.{block}")
    rules += _block("encoder.downsamples.{n}", "encoder.down_blocks.{n}")
    row = [f"resnets.{place}" for place in range(sizes.num_res_blocks + 1)] + ["upsamplers.0"]
    for level in range(len(sizes.dim_mult)):
        for place, block in enumerate(row, level * len(row)):
            rules += _block(f"decoder.upsamples.{place}", f"decoder.up_blocks.{level}.{block}")
    return KeyMap(tuple(rules))


def _block(original: str, internal: str) -> list[tuple[str, str]]:
    return [(f"{original}.{a}{{rest}}", f"{internal}.{b}{{rest}}") for a, b in _IN_BLOCK]
