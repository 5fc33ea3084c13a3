"""The OmniAvatar diffusion transformer: Wan 2.1 text-to-video plus additive audio residuals.

Specification: spec/omniavatar.md a. Internal names are those of diffusers; exported files carry the original
ones (weights/wan.py plus `audio_proj.*` and `audio_cond_projs.*`, which keep their names).

Shapes: B batch, C input channels (33, 49 or 65), T latent frames, h x w latent size, L = 4T - 3 pixel
frames, A audio width, D model width, P = layers // 2 - 1 audio projections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from avatarctl.models.wan_blocks import AvatarAttnProcessor, AvatarBlock, KeyValue, without_padding
from avatarctl.models.wan_transformer import AvatarTransformer, Embedded

__all__ = ["AudioPack", "OmniAvatarTransformer", "PreparedTensors"]


class AudioPack(nn.Module):
    """Four consecutive audio frames -> one vector per latent frame (spec/omniavatar.md a.4)."""

    def __init__(self, audio_width: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(4 * audio_width, hidden_size)
        self.norm_out = nn.LayerNorm(hidden_size)  # eps 1e-5, unlike every other norm of the model

    def forward(self, features: Tensor) -> Tensor:
        """[B, 4 T, A] -> [B, T, hidden]; frame-major, channel-minor inside a group."""
        return self.norm_out(self.proj(rearrange(features, "b (t four) a -> b t (four a)", four=4)))


@dataclass(frozen=True)
class PreparedTensors:
    """Results of `mode="prepare"`; None where nothing was asked for.

    text: keys and values per block; audio: [B, P, T, D]; rotary: complex64 [1, S, 1, d / 2].
    """

    text: tuple[KeyValue, ...] | None = None
    audio: Tensor | None = None
    rotary: Tensor | None = None


@dataclass(frozen=True)
class _Branch:
    """What differs between guidance branches: rotary complex64 [1, S, 1, d / 2], audio [B, P, T, D], and
    text [B, S_text, D] with its bias or the keys and values of each block."""

    rotary: Tensor
    audio: Tensor
    text: Tensor | None = None
    text_bias: Tensor | None = None
    key_values: Sequence[KeyValue] | None = None


class ResidualBlock(AvatarBlock):
    """A block that adds an audio residual to its input.

    The residual is an argument, not state on a hook: gradient checkpointing recomputes the block and must
    find it again (spec/building-blocks.md 1).
    """

    def compute(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb: Tensor | None,
        rotary_emb: Tensor | None,
        audio_residual: Tensor | None = None,
        text_key_value: KeyValue | None = None,
        text_bias: Tensor | None = None,
        only: str | None = None,
    ) -> Tensor | KeyValue:
        """hidden_states [B, S, D]; encoder_hidden_states [B, S_text, D]; temb [B, 6, D];
        audio_residual [B, T, D], the same for every token of a latent frame; text_bias [B, 1, 1, S_text].

        only="kv" returns the text keys and values of this block and nothing else: under FSDP2 a block's
        parameters exist only inside its own forward.
        """
        if only == "kv":
            assert encoder_hidden_states is not None
            return AvatarAttnProcessor.key_value(self.attn2, encoder_hidden_states)
        if audio_residual is not None:
            by_frame = rearrange(hidden_states, "b (t s) d -> b t s d", t=audio_residual.shape[1])
            residual = rearrange(audio_residual, "b t d -> b t 1 d").type_as(hidden_states)
            hidden_states = rearrange(by_frame + residual, "b t s d -> b (t s) d")
        assert temb is not None and rotary_emb is not None
        return self.modulated(
            hidden_states, temb, rotary_emb, encoder_hidden_states, text_bias, key_value=text_key_value
        )


class OmniAvatarTransformer(AvatarTransformer):
    """prepare: text keys and values, audio residuals, rotary table."""

    _no_split_modules: ClassVar = ["ResidualBlock"]
    _repeated_blocks: ClassVar = ["ResidualBlock"]
    _keep_in_fp32_modules: ClassVar = ["time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"]
    _skip_layerwise_casting_patterns: ClassVar = [
        "patch_embedding", "condition_embedder", "norm", "lora", "audio_proj", "audio_cond_projs",
    ]  # fmt: skip

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 33,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        audio_input_dim: int = 10752,
        audio_hidden_size: int = 32,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            rope_max_seq_len=1,  # the parent's table is replaced
        )
        width = num_attention_heads * attention_head_dim
        self.adopt_blocks(ResidualBlock)
        self.audio_proj = AudioPack(audio_input_dim, audio_hidden_size)
        self.audio_cond_projs = nn.ModuleList(
            nn.Linear(audio_hidden_size, width) for _ in range(num_layers // 2 - 1)
        )

    def _raw(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, audio: Tensor
    ) -> Tensor:
        """hidden_states [B, C, T, h, w], timestep [B] in 0..1000, encoder_hidden_states [B, S, text_dim],
        audio [B, L, A] -> velocity [B, 16, T, h, w]. Samples of a batch are independent."""
        rows, bias = without_padding(encoder_hidden_states)
        text = self.condition_embedder.text_embedder(rows.to(self._compute_dtype))
        _, _, frames, height, width = hidden_states.shape
        rotary = self._rotary_table((frames, height, width), hidden_states.device)
        run = _Branch(rotary, self._audio_residuals(audio), text, bias)
        return self._run(self._embed(hidden_states, timestep), [run])[0]

    def _prepare(
        self,
        text: Tensor | None = None,
        audio: Tensor | None = None,
        grid: tuple[int, int, int] | None = None,
        device: torch.device | None = None,
    ) -> PreparedTensors:
        """text [B, S, text_dim], audio [B, L, A], grid = latent (T, h, w) of latents on `device`; each
        optional."""
        key_values = None
        if text is not None:
            context = self.condition_embedder.text_embedder(text.to(self._compute_dtype))
            # hidden_states stands in for an argument that `only` never reads.
            key_values = tuple(block(context, context, None, None, only="kv") for block in self.blocks)
        return PreparedTensors(
            text=key_values,
            audio=None if audio is None else self._audio_residuals(audio),
            rotary=None if grid is None else self._rotary_table(grid, device),
        )

    def _denoise(
        self, hidden_states: Tensor, timestep: Tensor, prepared: Mapping[str, PreparedTensors]
    ) -> dict[str, Tensor]:
        """As `_raw`, from prepared tensors, for every guidance branch: they share latents and timestep, so
        these are embedded once."""
        branches = []
        for ready in prepared.values():
            if ready.text is None or ready.audio is None or ready.rotary is None:
                raise ValueError("denoise needs prepared text, audio and rotary tensors")
            branches.append(_Branch(ready.rotary, ready.audio, key_values=ready.text))
        velocities = self._run(self._embed(hidden_states, timestep), branches)
        return dict(zip(prepared, velocities, strict=True))

    def _audio_residuals(self, audio: Tensor) -> Tensor:
        """[B, L, A] -> [B, P, T, D]. The first frame is repeated to fill the first latent's group of four:
        latent 0 gets frame 0 alone, latent g >= 1 the frames 4g - 3 .. 4g."""
        audio = audio.to(self.audio_proj.proj.weight.dtype)
        packed = self.audio_proj(torch.cat([audio[:, :1].expand(-1, 3, -1), audio], dim=1))
        return torch.stack([projection(packed) for projection in self.audio_cond_projs], dim=1)

    def _run(self, embedded: Embedded, branches: Sequence[_Branch]) -> list[Tensor]:
        """Blocks, head, patches back to latents: [B, 16, T, h, w] for each branch, which share tokens and
        time. Block by block, not branch by branch: a block that waits on the host comes once."""
        frames = embedded.grid[0]
        for branch in branches:
            if branch.audio.shape[2] != frames:
                # Any divisor of the token count would be accepted below, and audio would meet other frames.
                raise ValueError(f"audio of {branch.audio.shape[2]} latent frames for a video of {frames}")
        tokens, modulation = [embedded.tokens] * len(branches), embedded.modulation
        for index, block in enumerate(self.blocks):
            has_audio = 2 <= index <= len(self.blocks) // 2
            calls = [
                (
                    each,
                    branch.text,
                    modulation,
                    branch.rotary,
                    branch.audio[:, index - 2] if has_audio else None,
                    None if branch.key_values is None else branch.key_values[index],
                    branch.text_bias,
                )
                for each, branch in zip(tokens, branches, strict=True)
            ]
            tokens.clear()
            tokens = self._through(block, calls)
        return [self._unembed(each, embedded) for each in tokens]
