"""The Wan VAE: pixels in [-1, 1] on one side, normalised latents on the other.

This is the only place that normalises latents: z = (mean of the posterior - mean) / std per channel
(spec/omniavatar.md c). Nothing is tiled.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

__all__ = ["StreamingDecoder", "WanVae"]


class WanVae(nn.Module):
    """`AutoencoderKLWan` behind the `VideoCodec` protocol."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, [1, C, 1, 1, 1]."""
        shape = (1, self.vae.config.z_dim, 1, 1, 1)
        mean = torch.tensor(self.vae.config.latents_mean, device=like.device, dtype=like.dtype)
        std = torch.tensor(self.vae.config.latents_std, device=like.device, dtype=like.dtype)
        return mean.view(shape), std.view(shape)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, 4T - 3, H, W] -> float32 [B, C, T, H/8, W/8]: the mode of the posterior, normalised."""
        posterior = self.vae.encode(video.to(self._dtype)).latent_dist
        latents = posterior.mode().float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def decoder(self) -> StreamingDecoder:
        """A fresh streaming decoder with causal caches of its own."""
        return StreamingDecoder(self)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, T, h, w] -> float32 [B, 3, 4T - 3, 8h, 8w] in [-1, 1], the whole clip at once."""
        return self.decoder().push(latents)


class StreamingDecoder:
    """Decodes one latent frame at a time, bit-identical to decoding the whole clip.

    The causal convolution caches live here rather than in the module: two videos can be decoded side by
    side, and a decoder that is dropped leaves nothing behind.
    """

    def __init__(self, codec: WanVae) -> None:
        self._codec = codec
        self._caches: list[Any] = [None] * codec.vae._cached_conv_counts["decoder"]
        self._first = True

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """[B, C, t, h, w] -> float32 [B, 3, n, 8h, 8w]; the first latent frame of a clip gives one pixel
        frame, every other four."""
        mean, std = self._codec._statistics(latents)
        vae = self._codec.vae
        hidden = vae.post_quant_conv((latents * std + mean).to(self._codec._dtype))
        frames = []
        for index in range(hidden.shape[2]):
            frames.append(
                vae.decoder(
                    hidden[:, :, index : index + 1],
                    feat_cache=self._caches,
                    feat_idx=[0],
                    first_chunk=self._first,
                )
            )
            self._first = False
        return torch.cat(frames, dim=2).float().clamp_(-1, 1)
