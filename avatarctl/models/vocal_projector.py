"""StableAvatar's audio: wav2vec tokens -> one short list of tokens per latent frame, made to fit the noisy
latents and the time step (spec/stableavatar.md b).

Shapes: B batch, L wav2vec tokens, F latent frames, n audio tokens of a latent frame, P video tokens of a
latent frame, V width of the projector, which equals the width D of the transformer: both share modulation.

Names inside are those of the published files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["VocalProjector", "vocal_windows"]

_SHORTEST = 5  # pixel frames: the first window is mirrored from the second
_PER_LATENT = 4  # pixel frames
_MARGIN = 4  # tokens that every window is widened by, on both sides


def vocal_windows(tokens: int, frames: int) -> tuple[Tensor, Tensor]:
    """Which of `tokens` audio tokens each latent frame of `frames` pixel frames gets
    (spec/stableavatar.md b.1).

    Returns indices int64 [F, n] and valid bool [F, n]. Tokens outside the audio are left out, so the others
    stand at the front of the row even where the missing ones would have stood before them. Indices of places
    that are not valid mean nothing, but may be read.

    Raises ValueError for less than 5 pixel frames, which are one latent frame, and for no tokens.
    """
    if frames < _SHORTEST:
        raise ValueError(f"audio is split for {_SHORTEST} pixel frames or more, not {frames}")
    if tokens < 1:
        raise ValueError("there are no audio tokens to split")
    per_frame = tokens / frames
    half = int(per_frame * _PER_LATENT / 2)
    # Latent frame i shows the pixel frames 4i - 3 .. 4i; these are the edges that the published code takes.
    latent = torch.arange(1, (frames - 1) // _PER_LATENT + 1, dtype=torch.float64)
    edges = per_frame * ((latent - 1) * _PER_LATENT + 1) + per_frame * (latent * _PER_LATENT + 1)
    first = (edges / 2).long() - 1 - half
    # Latent frame 0 is one pixel frame, and its window ends where the next begins.
    first = torch.cat([first[:1] - 2 * half, first]) - _MARGIN
    last = first + 2 * half + 2 * _MARGIN
    start = first.clamp(min=0)
    count = last.clamp(max=tokens - 1) - start + 1
    place = torch.arange(2 * half + 2 * _MARGIN + 1)
    return (start[:, None] + place).clamp(max=tokens - 1), place < count[:, None]


class AudioTokens(nn.Module):
    """wav2vec's last hidden state -> tokens of the projector's width, by one projection, or by two where the
    width between them is given (the 14B layout, spec/stableavatar.md b.3)."""

    def __init__(self, audio_dim: int, width: int, hidden_dim: int | None) -> None:
        super().__init__()
        widths = (audio_dim, width) if hidden_dim is None else (audio_dim, hidden_dim, width)
        steps = ("",) if hidden_dim is None else ("_1", "_2")
        self.steps = tuple((f"proj{step}", f"norm{step}") for step in steps)
        for (proj, norm), inputs, outputs in zip(self.steps, widths[:-1], widths[1:], strict=True):
            self.add_module(proj, nn.Linear(inputs, outputs, bias=False))
            self.add_module(norm, nn.LayerNorm(outputs))  # eps 1e-5, unlike the norms of the blocks

    def forward(self, vocal: Tensor) -> Tensor:
        """[B, L, audio_dim] -> [B, L, V] in the dtype of the projections."""
        for proj, norm in self.steps:
            projection: nn.Linear = getattr(self, proj)
            vocal = projection(vocal.to(projection.weight.dtype))
            vocal = getattr(self, norm)(vocal.float()).type_as(vocal)
        return vocal


class LatentAttention(nn.Module):
    """Audio tokens of a latent frame ask the video tokens of the same frame."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(width, eps=eps) for _ in range(2))

    def forward(self, audio: Tensor, latents: Tensor) -> Tensor:
        """audio [B, F, n, V], latents [B, F P, V] -> [B, F, n, V]."""
        batch, frames = audio.shape[:2]
        heads = "b (f s) (h d) -> (b f) h s d"
        query = rearrange(self.norm_q(self.q(audio)), "b f n (h d) -> (b f) h n d", h=self.heads)
        key = rearrange(self.norm_k(self.k(latents)), heads, f=frames, h=self.heads)
        value = rearrange(self.v(latents), heads, f=frames, h=self.heads)
        # PyTorch's own kernel: heads are wider here than in the blocks that kernels are chosen for.
        out = F.scaled_dot_product_attention(query, key, value)
        return self.o(rearrange(out, "(b f) h n d -> b f n (h d)", b=batch))


class ProjectorBlock(nn.Module):
    """A residual scaled by the time step, attention to the latents, feed-forward. No self-attention."""

    def __init__(self, width: int, heads: int, ffn_dim: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(width, eps)
        self.cross_attn = LatentAttention(width, heads, eps)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, width))
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(self, audio: Tensor, latents: Tensor, modulation: Tensor) -> Tensor:
        """audio [B, F, n, V], latents [B, F P, V], modulation [B, 6, V] -> [B, F, n, V]."""
        table = rearrange(self.modulation + modulation.float(), "b six v -> six b 1 1 v")
        shift1, scale1, gate1, shift2, scale2, gate2 = table
        dtype, exact = audio.dtype, audio.float()
        audio = (exact + gate1 * (self.norm1(exact) * (1 + scale1) + shift1)).to(dtype)
        audio = audio + self.cross_attn(self.norm3(audio.float()).to(dtype), latents)
        exact = audio.float()
        forwarded = self.ffn((self.norm2(exact) * (1 + scale2) + shift2).to(dtype))
        return (exact + gate2 * forwarded.float()).to(dtype)


class ProjectorHead(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.final_proj = nn.Linear(width, width)
        self.modulation = nn.Parameter(torch.randn(1, 2, width) / width**0.5)

    def forward(self, audio: Tensor, time: Tensor) -> Tensor:
        """audio [B, F, n, V], time [B, V] -> [B, F, n, V]."""
        shift, scale = rearrange(self.modulation + time.float().unsqueeze(1), "b two v -> two b 1 1 v")
        return self.final_proj((self.norm(audio.float()) * (1 + scale) + shift).type_as(audio))


class VocalProjector(nn.Module):
    """Windows of audio tokens -> what the blocks of the transformer attend to."""

    def __init__(
        self,
        audio_dim: int,
        width: int,
        *,
        heads: int,
        layers: int,
        ffn_dim: int,
        eps: float,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.proj_model = AudioTokens(audio_dim, width, hidden_dim)
        self.blocks = nn.ModuleList(ProjectorBlock(width, heads, ffn_dim, eps) for _ in range(layers))
        self.final_head = ProjectorHead(width, eps)

    def windows(self, vocal: Tensor, frames: int) -> Tensor:
        """vocal [B, L, audio_dim] for `frames` pixel frames -> [B, F, n, V]: what neither step nor latents
        change. Rows for audio that is not there are zero, and are attended like all others."""
        tokens = self.proj_model(vocal)
        indices, valid = (table.to(tokens.device) for table in vocal_windows(vocal.shape[1], frames))
        return tokens[:, indices].masked_fill(~valid.unsqueeze(-1), 0)

    def forward(self, audio: Tensor, latents: Tensor, modulation: Tensor, time: Tensor) -> Tensor:
        """audio [B, F, n, V] of `windows`, latents [B, F P, V] before the first block, modulation [B, 6, V],
        time [B, V] -> [B, F, n, V]."""
        for block in self.blocks:
            audio = block(audio, latents, modulation)
        return self.final_head(audio, time)
