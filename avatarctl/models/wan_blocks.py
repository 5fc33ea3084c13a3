"""What the blocks of our Wan transformers share: complex rotary embedding, attention, modulation.

Shapes: B batch, S video tokens in (frame, row, column) order, column fastest, D width, N heads,
d = D / N head width.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from einops import rearrange, repeat
from torch import Tensor, nn

__all__ = ["AvatarAttnProcessor", "AvatarBlock", "ComplexRotaryEmbedding", "KeyValue", "without_padding"]

KeyValue = tuple[Tensor, Tensor]  # keys and values of a context, [B, S', N, d]


class ComplexRotaryEmbedding(nn.Module):
    """Rotary positions of a video grid as unit complex numbers (spec/omniavatar.md a.3 point 5).

    Angles are float64, the table complex64: rounding costs 2.3e-7, while computing angles in float32 would
    cost far more at large positions. There is no buffer, so casting or sharding a model cannot touch it.
    """

    def __init__(self, head_width: int, theta: float = 10_000.0) -> None:
        super().__init__()
        spatial = 2 * (head_width // 6)
        self.axis_widths = (head_width - 2 * spatial, spatial, spatial)
        self.theta = theta

    def forward(self, grid: tuple[int, int, int], device: torch.device | None) -> Tensor:
        """grid (frames, rows, columns) of tokens -> complex64 [1, S, 1, d / 2].

        device: None is torch's default.
        """
        frames, rows, columns = grid
        f, h, w = (self._angles(*axis) for axis in zip(grid, self.axis_widths, strict=True))
        parts = [
            repeat(f, "f c -> 1 (f h w) 1 c", h=rows, w=columns),
            repeat(h, "h c -> 1 (f h w) 1 c", f=frames, w=columns),
            repeat(w, "w c -> 1 (f h w) 1 c", f=frames, h=rows),
        ]
        angles = torch.cat(parts, dim=-1)
        return torch.polar(torch.ones_like(angles), angles).to(device=device, dtype=torch.complex64)

    def _angles(self, length: int, width: int) -> Tensor:
        """float64 [length, width / 2]: position times theta^(-2k / width)."""
        exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
        return torch.outer(torch.arange(length, dtype=torch.float64), self.theta**-exponent)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn adjacent pairs (2j, 2j + 1) of x [B, S, N, d] by the table; float32 inside."""
    pairs = torch.view_as_complex(rearrange(x.float(), "b s n (c two) -> b s n c two", two=2).contiguous())
    return torch.view_as_real(pairs * rotary).flatten(-2).type_as(x)


def without_padding(text: Tensor) -> tuple[Tensor, Tensor | None]:
    """Texts [B, S, W] whose last rows are zero in all of them -> the rows before and one for all of these,
    and the bias [B, 1, 1, S'] of attention that makes the result that of all rows: equal keys weigh as one
    does with the logarithm of their number added.

    Exact up to rounding, and a twentieth of the work for a prompt of a few words in 512 rows. On a CPU only:
    the fast kernels of a GPU take no bias, and a long text costs them little beside a video.
    """
    rows = text.shape[1]
    if text.device.type != "cpu" or type(text) is not Tensor:
        return text, None
    used = int(text.detach().abs().amax((0, 2)).nonzero().amax()) + 1 if text.any() else 0
    if rows - used < 2:
        return text, None
    bias = torch.zeros(text.shape[0], 1, 1, used + 1)
    bias[..., -1] = math.log(rows - used)
    return text[:, : used + 1], bias


class AvatarAttnProcessor:
    """Attention of one `WanAttention`: q and k normalised over the full width, optional rotation, and text
    keys and values that may have been computed before."""

    backend: AttentionBackendName | None = None

    @staticmethod
    def query(attn: WanAttention, hidden_states: Tensor) -> Tensor:
        """Queries [B, S, N, d] of tokens [B, S, D]."""
        return attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))

    @staticmethod
    def key_value(attn: WanAttention, context: Tensor) -> KeyValue:
        """Keys and values of a context [B, S, D]."""
        key = attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1))
        return key, attn.to_v(context).unflatten(2, (attn.heads, -1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries [B, S, N, d] over keys and values [B, S', N, d] -> [B, S, D], on the chosen kernel."""
        out = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self.backend)
        return out.flatten(2, 3).type_as(query)

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        key_value: KeyValue | None = None,
    ) -> Tensor:
        query = self.query(attn, hidden_states)
        if key_value is None:
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            key_value = self.key_value(attn, context)
        key, value = key_value
        if rotary_emb is not None:
            query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        return attn.to_out[0](self.attend(query, key, value, attention_mask))


class AvatarBlock(WanTransformerBlock):
    """A Wan block that a family extends by what its `compute` takes.

    Applied by `block.__class__ = ...` on a built block: same parameters, bit-equal gradients.
    """

    cross_processor: ClassVar[type[AvatarAttnProcessor]] = AvatarAttnProcessor

    def forward(self, *arguments: Any, each: list[tuple[Any, ...]] | None = None, **keywords: Any) -> Any:
        """`compute`; each: the arguments of several calls, emptied meanwhile, whose results come as a list.
        Weights that wait elsewhere come for a forward: for all branches of a step once."""
        if each is None:
            return self.compute(*arguments, **keywords)
        results = []
        while each:
            results.append(self.compute(*each.pop(0)))
        return results

    def compute(self, *arguments: Any, **keywords: Any) -> Any:
        """A family's block defines it."""
        raise NotImplementedError

    @classmethod
    def adopt(cls, block: WanTransformerBlock) -> None:
        block.__class__ = cls
        block.attn1.set_processor(AvatarAttnProcessor())
        block.attn2.set_processor(cls.cross_processor())

    def modulated(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Tensor,
        encoder_hidden_states: Tensor | None,
        bias: Tensor | None = None,
        **cross: Any,
    ) -> Tensor:
        """Self-attention, cross-attention, feed-forward: hidden_states [B, S, D], temb [B, 6, D],
        encoder_hidden_states [B, S_text, D]; bias of the cross-attention, [B, 1, 1, S_text]; `cross` goes to
        its processor. Modulation and norms are float32."""
        mixed = self.mixed(hidden_states, temb, rotary_emb)
        return self.conditioned(mixed, temb, encoder_hidden_states, bias, **cross)

    def mixed(self, hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor) -> Tensor:
        """Self-attention: no text, image or audio has a part in it."""
        shift, scale, gate, *_ = (self.scale_shift_table + temb.float()).chunk(6, dim=1)
        normed = (self.norm1(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
        attended = self.attn1(normed, None, None, rotary_emb)
        return (hidden_states.float() + attended * gate).type_as(hidden_states)

    def conditioned(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        encoder_hidden_states: Tensor | None,
        bias: Tensor | None = None,
        **cross: Any,
    ) -> Tensor:
        """Cross-attention and feed-forward, behind `mixed`."""
        *_, shift2, scale2, gate2 = (self.scale_shift_table + temb.float()).chunk(6, dim=1)
        normed = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, bias, None, **cross)

        normed = (self.norm3(hidden_states.float()) * (1 + scale2) + shift2).type_as(hidden_states)
        forwarded = self.ffn(normed)
        return (hidden_states.float() + forwarded.float() * gate2).type_as(hidden_states)
