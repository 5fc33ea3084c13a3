"""StableSyncNet: how well 16 frames of a mouth fit 0.64 s of audio.

Two towers of the same kind end in unit vectors. The last step of both is a ReLU, so that their cosine lies in
0 to 1. Names of parameters are those of the published file.

Sources: spec/losses-and-eval.md 1.1, 1.2 and 1.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["PUBLISHED_SYNCNET", "StableSyncNet", "SyncNetSizes", "TowerSizes"]

Factor = int | Sequence[int]
"""How much smaller a block makes its map: of both sides, or of height and width."""

_GROUPS: Final = 32
_HEADS: Final = 8


class TowerSizes(TypedDict):
    """Arguments of a tower, one entry per residual block in each sequence.

    block_out_channels: multiples of 32; downsample_factors: 1 makes nothing smaller; attn_blocks: 1 where an
    attention block follows.
    """

    in_channels: int
    block_out_channels: Sequence[int]
    downsample_factors: Sequence[Factor]
    attn_blocks: Sequence[int]


class SyncNetSizes(TypedDict):
    """Arguments of `StableSyncNet`."""

    audio_encoder: TowerSizes
    visual_encoder: TowerSizes
    face_size: int


PUBLISHED_SYNCNET: Final = SyncNetSizes(
    audio_encoder=TowerSizes(
        in_channels=1,
        block_out_channels=(32, 64, 128, 256, 512, 1024, 2048),
        downsample_factors=((2, 1), 2, 2, 1, 2, 2, (2, 3)),
        attn_blocks=(0, 0, 0, 1, 1, 0, 0),
    ),
    visual_encoder=TowerSizes(
        in_channels=48,
        block_out_channels=(64, 128, 256, 256, 512, 1024, 2048, 2048),
        downsample_factors=((1, 2), 2, 2, 2, 2, 2, 2, 2),
        attn_blocks=(0, 0, 0, 0, 1, 1, 0, 0),
    ),
    face_size=256,
)
"""The only release: `16_pixel_attn`, 401 million parameters (spec/losses-and-eval.md 1.1)."""


class StableSyncNet(nn.Module):
    """face_size: height and width that an aligned face is brought to before its lower half is taken."""

    def __init__(self, audio_encoder: TowerSizes, visual_encoder: TowerSizes, face_size: int = 256) -> None:
        super().__init__()
        self.audio_encoder = _Tower(**audio_encoder)
        self.visual_encoder = _Tower(**visual_encoder)
        self.face_size = face_size

    @property
    def frames(self) -> int:
        """Video frames that are judged together."""
        return self.visual_encoder.conv_in.in_channels // 3

    def lower_faces(self, frames: Tensor) -> Tensor:
        """Aligned faces [B, 3, n, H, W] in [-1, 1] -> lower halves [B, 3, n, S / 2, S], S = `face_size`.

        Bicubic without antialiasing, as published, whatever the size of the frames.
        """
        size = (self.face_size, self.face_size)
        flat = rearrange(frames, "b c n h w -> (b n) c h w")
        faces = F.interpolate(flat, size=size, mode="bicubic", align_corners=False)
        lower = faces[:, :, self.face_size // 2 :]
        return rearrange(lower, "(b n) c h w -> b c n h w", b=len(frames))

    def forward(self, lower_faces: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors [B, D] of the frames and of the audio.

        lower_faces: [B, 3, frames, S / 2, S]; mel: [B, 1, 80, 52] for 16 frames.
        """
        return self.embed_faces(lower_faces), self.embed_audio(mel)

    def embed_faces(self, lower_faces: Tensor) -> Tensor:
        """Unit vectors [B, D] of the frames alone."""
        return _unit(self.visual_encoder(rearrange(lower_faces, "b c n h w -> b (n c) h w")))

    def embed_audio(self, mel: Tensor) -> Tensor:
        """Unit vectors [B, D] of the audio alone."""
        return _unit(self.audio_encoder(mel))


class _Tower(nn.Module):
    def __init__(
        self,
        in_channels: int,
        block_out_channels: Sequence[int],
        downsample_factors: Sequence[Factor],
        attn_blocks: Sequence[int],
        dropout: float = 0.0,  # stated in the published configuration, and always 0
    ) -> None:
        super().__init__()
        width = block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for out, factor, attention in zip(block_out_channels, downsample_factors, attn_blocks, strict=True):
            self.down_blocks.append(_Residual(width, out, factor))
            if attention:
                self.down_blocks.append(_Attention(out))
            width = out
        self.norm_out = _norm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, D], not negative."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return F.relu(self.norm_out(x)).flatten(1)


class _Residual(nn.Module):
    def __init__(self, width: int, out: int, factor: Factor) -> None:
        super().__init__()
        self.norm1 = _norm(width)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = _norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        down, across = (factor, factor) if isinstance(factor, int) else factor
        self.padding = (int(across == 1), 1, int(down == 1), 1)  # left, right, top, bottom
        smaller = (down, across) != (1, 1)
        self.downsample_conv = nn.Conv2d(out, out, 3, stride=(down, across)) if smaller else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        x = self.conv_shortcut(x) + hidden
        return x if self.downsample_conv is None else self.downsample_conv(F.pad(x, self.padding))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(width)
        self.conv_in = nn.Conv2d(width, width, 1)
        self.norm2 = nn.LayerNorm(width)
        self.attn = _SelfAttention(width)
        self.norm3 = nn.LayerNorm(width)
        net = nn.Sequential(_GatedGelu(width), nn.Identity(), nn.Linear(4 * width, width))
        self.ff = nn.ModuleDict({"net": net})
        self.conv_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        tokens = rearrange(self.conv_in(self.norm1(x)), "b c h w -> b (h w) c")
        tokens = tokens + self.attn(self.norm2(tokens))
        tokens = tokens + self.ff["net"](self.norm3(tokens))
        return x + self.conv_out(rearrange(tokens, "b (h w) c -> b c h w", h=height))


class _SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.to_q, self.to_k, self.to_v)
        q, k, v = (rearrange(layer(x), "b l (h d) -> b h l d", h=_HEADS) for layer in layers)
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")
        return self.to_out[0](mixed)


class _GatedGelu(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


def _unit(vectors: Tensor) -> Tensor:
    """[B, D] with a length of 1. In half precision the guard of the division, 1e-12, would be 0."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, width, eps=1e-6)
