"""What our Wan transformers share around their blocks: one entrance with modes, tokens and time, the head.

Shapes: B batch, C input channels, T latent frames, h x w latent size, S video tokens in (frame, row, column)
order, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from einops import rearrange
from torch import Tensor, nn

from avatarctl.models.wan_blocks import AvatarBlock, ComplexRotaryEmbedding

__all__ = ["AvatarTransformer", "Embedded"]


@dataclass(frozen=True)
class Embedded:
    """What all guidance branches of a step share: tokens [B, S, D], time vector [B, D] (head) and its
    projection [B, 6, D] (blocks), grid of tokens (frames, rows, columns)."""

    tokens: Tensor
    time: Tensor
    modulation: Tensor
    grid: tuple[int, int, int]


class AvatarTransformer(WanTransformer3DModel):
    """One `forward`, three modes, because a sharded model may be entered only through its forward.

    raw      everything from the raw condition in one pass: training, parity
    prepare  what no sampling step changes
    denoise  one step from prepared tensors, all guidance branches

    A family writes the three; its constructor calls `adopt_blocks` after the parent's.
    """

    _supports_gradient_checkpointing = True
    _cp_plan = None  # the parent's plan splits a cos/sin pair that this model does not have

    def adopt_blocks(self, block_class: type[AvatarBlock]) -> None:
        """Make the parent's blocks a family's own, and the rotary table ours."""
        self.rope = ComplexRotaryEmbedding(self.config.attention_head_dim)
        for block in self.blocks:
            block_class.adopt(block)

    def forward(self, *args: Any, mode: Literal["raw", "prepare", "denoise"] = "raw", **kwargs: Any) -> Any:
        """Dispatches to `raw`, `prepare` or `denoise`; arguments are theirs."""
        modes: dict[str, Callable[..., Any]] = {
            "raw": self._raw,
            "prepare": self._prepare,
            "denoise": self._denoise,
        }
        if mode not in modes:
            raise ValueError(f"mode is one of {', '.join(modes)}, not {mode!r}")
        return modes[mode](*args, **kwargs)

    def _raw(self, *args: Any, **kwargs: Any) -> Tensor:
        """A family's network defines this mode and the next two: what they take differs."""
        raise NotImplementedError

    def _prepare(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _denoise(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    @property
    def _compute_dtype(self) -> torch.dtype:
        """Of the frozen weights, if some are trained: the head's is never among those that are kept wider."""
        return self.proj_out.weight.dtype

    def _rotary_table(self, grid: tuple[int, int, int], device: torch.device | None) -> Tensor:
        """complex64 [1, S, 1, d / 2] for latents (T, h, w), on the device of these latents."""
        tokens = tuple(n // p for n, p in zip(grid, self.config.patch_size, strict=True))
        return self.rope(tokens, device)

    def _embed(self, hidden_states: Tensor, timestep: Tensor) -> Embedded:
        """Latents and condition channels [B, C, T, h, w] as tokens, timesteps [B] as modulation."""
        embedder = self.condition_embedder
        time = embedder.timesteps_proj(timestep.float())
        with torch.autocast(hidden_states.device.type, enabled=False):  # float32, in training too
            time = embedder.time_embedder(time.to(embedder.time_embedder.linear_1.weight.dtype))
        # As exact as its own weights: rounded where a family casts the projection, float32 where it does not.
        time = time.to(embedder.time_proj.weight.dtype)
        patches = self.patch_embedding(hidden_states.to(self.patch_embedding.weight.dtype))
        return Embedded(
            tokens=rearrange(patches, "b d t h w -> b (t h w) d").contiguous().to(self._compute_dtype),
            time=time,
            modulation=embedder.time_proj(embedder.act_fn(time)).unflatten(1, (6, -1)),
            grid=tuple(patches.shape[2:]),
        )

    def _checkpointed(self, module: nn.Module, *arguments: Any) -> Tensor:
        """A call whose activations are computed again for the backward pass, if the model is set to.

        Positional arguments only: hooks of offloading look them up by position."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, *arguments)
        return module(*arguments)

    def _through(self, block: nn.Module, calls: list[tuple[Any, ...]]) -> list[Tensor]:
        """A block for each call's arguments: one, or the branches of a step, in one entry, which lets go of
        the arguments of one before the next."""
        if len(calls) == 1:
            return [self._checkpointed(block, *calls[0])]
        results: list[Tensor] = block(each=calls)
        return results

    def _unembed(self, tokens: Tensor, embedded: Embedded) -> Tensor:
        """The head, then patches back to latents [B, 16, T, h, w]; tokens behind the grid are dropped."""
        frames, rows, columns = embedded.grid
        tokens = tokens[:, : math.prod(embedded.grid)]
        shift, scale = (self.scale_shift_table + embedded.time.unsqueeze(1)).chunk(2, dim=1)
        tokens = (self.norm_out(tokens.float()) * (1 + scale) + shift).to(self._compute_dtype)
        patch_t, patch_h, patch_w = self.config.patch_size
        return rearrange(
            self.proj_out(tokens),
            "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)",
            t=frames,
            h=rows,
            w=columns,
            pt=patch_t,
            ph=patch_h,
            pw=patch_w,
        )
