"""The decoder of the Wan VAE as a row of cells: one latent frame goes through one after the other, and each
keeps what its own causal convolutions need of the frame before.

The library's decoder does the same in one call, with one list of caches. Cells make it possible to bring back
one cell's activations and caches at a time (models/vae_gradient.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanUpBlock,
)
from torch import Tensor, nn

from avatarctl.models.recompute import again

if TYPE_CHECKING:
    from avatarctl.models.vae import WanVae

__all__ = ["Cache", "Cell", "decoder_cells"]

Cache = Any
"""What a causal convolution kept of the frame before: a tensor, the library's word for a first frame, or None
before it."""


@dataclass(frozen=True)
class Cell:
    """run: (one frame's tensor, the caches, which it replaces) -> what the next cell gets; slots: caches."""

    run: Callable[[Tensor, list[Cache]], Tensor]
    slots: int


def decoder_cells(vae: WanVae) -> list[Cell]:
    """From one normalised latent frame [B, C, 1, h, w] to its pixel frames, float32 [B, 3, 1 or 4, 8h, 8w].

    Raises TypeError for the decoder of another VAE than Wan 2.1's.
    """
    network: Any = vae.vae
    decoder = network.decoder

    def enter(latents: Tensor, caches: list[Cache]) -> Tensor:
        mean, std = vae._statistics(latents)
        hidden = network.post_quant_conv((latents * std + mean).to(vae._dtype))
        return _causal(decoder.conv_in, hidden, caches, 0)

    def leave(hidden: Tensor, caches: list[Cache]) -> Tensor:
        normed = decoder.nonlinearity(decoder.norm_out(hidden))
        pixels = _causal(decoder.conv_out, normed, caches, 0)
        return pixels.to(torch.promote_types(pixels.dtype, torch.float32))

    middle = decoder.mid_block
    cells = [Cell(enter, 1), _residual(middle.resnets[0])]
    for attention, block in zip(middle.attentions, middle.resnets[1:], strict=True):
        cells += [_whole(attention), _residual(block)]
    for up in decoder.up_blocks:
        if not isinstance(up, WanUpBlock):
            raise TypeError(f"a decoder with {type(up).__name__} is not the one of Wan 2.1")
        cells += [_residual(block) for block in up.resnets]
        cells += [_resample(each) for each in up.upsamplers or ()]
    return [*cells, Cell(leave, 1)]


def _causal(convolution: WanCausalConv3d, x: Tensor, caches: list[Cache], slot: int) -> Tensor:
    """A convolution behind the last two frames that it saw, as the library's blocks do it."""
    before = caches[slot]
    kept = x[:, :, -2:].clone()
    if kept.shape[2] < 2 and before is not None:
        kept = torch.cat([before[:, :, -1:], kept], dim=2)
    caches[slot] = kept
    made: Tensor = convolution(x, before)
    return made


def _residual(block: WanResidualBlock) -> Cell:
    """Its two halves are made again one by one: a half is what is alive at the top of the decoder.

    Where nothing stands beside them, the input goes through the first: three gradients of it are then added
    in the order of the library's block, and come out the same to the bit.
    """
    passes = isinstance(block.conv_shortcut, nn.Identity)

    def first(x: Tensor, before: Cache) -> tuple[Tensor, ...]:
        caches = [before]
        made = _causal(block.conv1, block.nonlinearity(block.norm1(x)), caches, 0)
        return (made, caches[0], x.view_as(x)) if passes else (made, caches[0])

    def second(x: Tensor, before: Cache) -> tuple[Tensor, ...]:
        caches = [before]
        made = _causal(block.conv2, block.nonlinearity(block.norm2(x)), caches, 0)
        return made, caches[0]

    def run(x: Tensor, caches: list[Cache]) -> Tensor:
        hidden, caches[0], *same = again(first, x, caches[0])
        hidden, caches[1] = again(second, hidden, caches[1])
        beside: Tensor = same[0] if same else block.conv_shortcut(x)
        return hidden + beside

    return Cell(run, 2)


def _resample(module: WanResample) -> Cell:
    slots = int(module.mode == "upsample3d")
    return Cell(lambda x, caches: module(x, feat_cache=caches, feat_idx=[0]), slots)


def _whole(module: nn.Module) -> Cell:
    return Cell(lambda x, caches: module(x), 0)
