"""The Wan VAE: pixels in [-1, 1] on one side, normalised latents on the other.

This is the only place that normalises latents: z = (mean of the posterior - mean) / std per channel
(spec/omniavatar.md c). Nothing is tiled.

On a CPU in float32 a loaded VAE convolves by oneDNN, see `fast_on_cpu`.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from torch import Tensor, nn

__all__ = ["StreamingDecoder", "WanVae", "fast_on_cpu"]


class WanVae(nn.Module):
    """`AutoencoderKLWan` behind the `VideoCodec` protocol."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, [1, C, 1, 1, 1]."""
        values = (self.vae.config.latents_mean, self.vae.config.latents_std)
        mean, std = torch.tensor(values, device=like.device, dtype=like.dtype)
        return rearrange(mean, "c -> 1 c 1 1 1"), rearrange(std, "c -> 1 c 1 1 1")

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.vae.parameters()).device

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


def fast_on_cpu(codec: WanVae) -> WanVae:
    """The same codec; on a CPU its 3-D convolutions go to oneDNN, with weights in the order that it wants.

    For one small clip PyTorch chooses an unoptimised convolution of its own: with a batch of 1 where channels
    x frames x rows is at most 20480, which is most of a decoder that takes one latent frame at a time
    (spec/cartoon-world.md 6). oneDNN, which it takes for all larger ones, is three times as fast, and sums in
    another order: pixels differ from recorded ones by up to 2e-5, in a range of 2. docs/benchmarks.md states
    both. Half precision on a CPU is slower than this, 100 times where the processor has no instructions
    for it.
    """
    if codec.device.type == "cpu" and torch.backends.mkldnn.is_available():
        for module in codec.modules():
            if isinstance(module, nn.Conv3d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
                module._conv_forward = MethodType(_convolve, module)  # type: ignore[method-assign]
    return codec


def _convolve(self: nn.Conv3d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `nn.Conv3d._conv_forward`."""
    plain = type(input) is Tensor and input.dtype == torch.float32  # oneDNN takes no fake tensors
    if plain and input.device.type == "cpu" and not isinstance(self.padding, str):
        convolved: Tensor = torch.mkldnn_convolution(
            input, weight, bias, self.padding, self.stride, self.dilation, self.groups
        )
        return convolved
    return nn.Conv3d._conv_forward(self, input, weight, bias)


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
        frames, done = None, 0
        total = 4 * hidden.shape[2] - (3 if self._first else 0)
        for index in range(hidden.shape[2]):
            latent = hidden[:, :, index : index + 1]
            decoded = vae.decoder(latent, feat_cache=self._caches, feat_idx=[0], first_chunk=self._first)
            self._first = False
            if frames is None:
                batch, colours, _, height, width = decoded.shape
                frames = decoded.new_empty((batch, colours, total, height, width), dtype=torch.float32)
            frames[:, :, done : done + decoded.shape[2]] = decoded
            done += decoded.shape[2]
        if frames is None:
            raise ValueError("there is no latent frame to decode")
        return frames.clamp_(-1, 1)
