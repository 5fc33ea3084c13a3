"""The encoder of VideoMAE v2, whose features of a clip TREPA compares (spec/losses-and-eval.md 3.1 and 3.2).

Names of parameters are those of the published file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["PUBLISHED_VIDEOMAE", "VideoMae", "VideoMaeSizes", "sinusoids"]

_EPS: Final = 1e-6


class VideoMaeSizes(TypedDict):
    """Arguments of `VideoMae`, besides the classes of its head.

    image_size, patch_size: pixels of a side; frames, tubelet: of a clip, and of a token.
    """

    image_size: int
    patch_size: int
    frames: int
    tubelet: int
    width: int
    depth: int
    heads: int
    mlp_width: int


PUBLISHED_VIDEOMAE: Final = VideoMaeSizes(
    image_size=224, patch_size=14, frames=16, tubelet=2, width=1408, depth=40, heads=16, mlp_width=6144
)
"""ViT-g/14, 1.01 billion parameters (spec/losses-and-eval.md 3.2)."""


class VideoMae(nn.Module):
    """recompute: activations of a block are made again in the backward pass instead of kept."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        frames: int,
        tubelet: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        classes: int = 174,
    ) -> None:
        super().__init__()
        self.image_size, self.frames, self.tubelet = image_size, frames, tubelet
        self.recompute = False
        sides = (tubelet, patch_size, patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, width, sides, stride=sides)})
        self.blocks = nn.ModuleList(_Block(width, heads, mlp_width) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(width, eps=_EPS)
        self.head = nn.Linear(width, classes)  # of the classes of its training, in the file and not used here

    def pixels(self, frames: Tensor) -> Tensor:
        """[B, 3, n, H, W] in [-1, 1] -> what the encoder is given, [B, 3, n, S, S] in [0, 1].

        Bicubic without antialiasing, and no mean and deviation of ImageNet: as TREPA is published.
        """
        size = (self.image_size, self.image_size)
        flat = rearrange(frames, "b c n h w -> (b n) c h w")
        resized = F.interpolate(flat, size=size, mode="bicubic", align_corners=False)
        return rearrange((resized / 2 + 0.5).clamp(0, 1), "(b n) c h w -> b c n h w", b=len(frames))

    def forward(self, frames: Tensor) -> Tensor:
        """[B, 3, n, H, W] in [-1, 1] -> features [B, width]; an odd last frame is not seen."""
        x = self.patch_embed["proj"](self.pixels(frames))
        x = x + self._positions(x)
        x = rearrange(x, "b d t h w -> b (t h w) d")
        for block in self.blocks:
            x = self._call(block, x)
        return self.fc_norm(x.mean(dim=1))

    def _positions(self, x: Tensor) -> Tensor:
        """For tokens [B, d, t, h, w]: the fixed table, stretched in time for clips of another length."""
        _, width, length, height, across = x.shape
        table = sinusoids(self.frames // self.tubelet * height * across, width).to(x)
        table = rearrange(table, "(t h w) d -> 1 d t h w", h=height, w=across)
        if length == table.shape[2]:
            return table
        # The published factor: a tenth more, lest rounding drop a step; positions are taken by it.
        factor = ((length + 0.1) / table.shape[2], 1.0, 1.0)
        return F.interpolate(table, scale_factor=factor, mode="trilinear", align_corners=False)

    def _call(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.recompute and x.requires_grad:
            again: Tensor = checkpoint(block, x, use_reentrant=False)
            return again
        return block(x)


@functools.lru_cache(maxsize=2)
def sinusoids(places: int, width: int) -> Tensor:
    """Positions, float32 [places, width]: angle p / 10000^(2 floor(j / 2) / width), sine in even columns and
    cosine in odd ones (spec/losses-and-eval.md 3.2)."""
    column = torch.arange(width, dtype=torch.float64)
    place = torch.arange(places, dtype=torch.float64)
    angle = place[:, None] / 10_000 ** (2 * (column // 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_width), "fc2": nn.Linear(mlp_width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        hidden: Tensor = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + hidden


class _Attention(nn.Module):
    """Queries and values have a bias, keys none."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        mixed = F.linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(mixed, "b l (three h d) -> three b h l d", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(rearrange(out, "b h l d -> b l (h d)"))
        return projected
