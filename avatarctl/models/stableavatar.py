"""The StableAvatar diffusion transformer: Wan 2.1 image-to-video with audio in every cross-attention.

Specification: spec/stableavatar.md a, b. Internal names are those of diffusers, with `attn2.vocal_k` and
`attn2.vocal_v` added; the projector keeps its original names.

Shapes: B batch, T latent frames, h x w latent size, S video tokens, D width, N heads, d = D / N, L wav2vec
tokens, F latent frames that the audio is split for (T, or more in the published padding), n audio tokens of
a latent frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from einops import rearrange
from torch import Tensor, nn

from avatarctl.models.vocal_projector import VocalProjector
from avatarctl.models.wan_blocks import AvatarAttnProcessor, AvatarBlock, KeyValue
from avatarctl.models.wan_transformer import AvatarTransformer, Embedded

__all__ = ["PreparedStable", "StableAvatarTransformer"]

_PER_LATENT = 4  # pixel frames


@dataclass(frozen=True)
class PreparedStable:
    """Results of `mode="prepare"`; None where nothing was asked for.

    text, image: keys and values per block; vocal: windows of projected audio [B, F, n, D], None for silence
    (a context of zeros); rotary: complex64 [1, S, 1, d / 2].
    """

    text: tuple[KeyValue, ...] | None = None
    image: tuple[KeyValue, ...] | None = None
    vocal: Tensor | None = None
    rotary: Tensor | None = None


@dataclass(frozen=True)
class _Pass:
    """One branch, or several stacked: vocal as blocks take it; text and image as tokens, or in `readies` for
    every block. is_mixed: the tokens are behind the first block's self-attention."""

    embedded: Embedded
    vocal: Tensor | None
    text: Tensor | None = None
    image: Tensor | None = None
    readies: Sequence[PreparedStable] = ()
    is_mixed: bool = False


class ExactSinusoid(nn.Module):
    """Timesteps [B] -> float32 [B, width], cosines then sines (spec/stableavatar.md a.4 point 3).

    Angles are float64: the parent's float32 is wrong by 2e-5 near t = 1000, more than the rest of the
    network together.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.count = width // 2

    def forward(self, timestep: Tensor) -> Tensor:
        exponent = torch.arange(self.count, dtype=torch.float64, device=timestep.device) / self.count
        angles = torch.outer(timestep.double(), 10_000.0**-exponent)
        return torch.cat([angles.cos(), angles.sin()], dim=1).float()


class ThreefoldAttnProcessor(AvatarAttnProcessor):
    """One query over text, over the image's tokens and over audio; the sum is projected
    (spec/stableavatar.md a.5).

    Three attentions, not one over the joined contexts: each has its own softmax.
    """

    @staticmethod
    def image_key_value(attn: WanAttention, image: Tensor) -> KeyValue:
        """Keys and values of image tokens [B, 257, D]."""
        key = attn.norm_added_k(attn.add_k_proj(image)).unflatten(2, (attn.heads, -1))
        return key, attn.add_v_proj(image).unflatten(2, (attn.heads, -1))

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        key_value: KeyValue | None = None,
        *,
        image: Tensor | None = None,
        image_key_value: KeyValue | None = None,
        vocal: Tensor | None = None,
    ) -> Tensor:
        query = self.query(attn, hidden_states)
        if key_value is None:
            assert encoder_hidden_states is not None
            key_value = self.key_value(attn, encoder_hidden_states)
        if image_key_value is None:
            assert image is not None
            image_key_value = self.image_key_value(attn, image)
        seen = self.attend(query, *key_value) + self.attend(query, *image_key_value)
        return attn.to_out[0](seen + self._vocal_attention(attn, query, vocal))

    def _vocal_attention(self, attn: WanAttention, query: Tensor, vocal: Tensor | None) -> Tensor:
        """Attention to audio [B', G, n, D] of the first B' samples; each of G equal runs of video tokens
        attends to its own n. The other samples attend to a context of zeros: every value is then the bias of
        `vocal_v`, and so is their mean, whatever the keys. Neither keys nor queries are rotated, and the
        keys have no norm."""
        # The bias, through the layer's own forward: weights that wait on the host come for that alone.
        if vocal is None:
            return attn.vocal_v(query.new_zeros(attn.vocal_v.in_features))
        samples, groups = vocal.shape[:2]
        context = rearrange(vocal, "b g n d -> (b g) n d")
        vocals = self.attend(
            rearrange(query[:samples], "b (g s) n d -> (b g) s n d", g=groups),
            attn.vocal_k(context).unflatten(2, (attn.heads, -1)),
            attn.vocal_v(context).unflatten(2, (attn.heads, -1)),
        )
        vocals = rearrange(vocals, "(b g) s d -> b (g s) d", g=groups)
        if samples == len(query):
            return vocals
        nothing = attn.vocal_v(vocals.new_zeros(1, attn.vocal_v.in_features))
        return torch.cat([vocals, nothing.expand(len(query) - samples, *vocals.shape[1:])])


class VocalBlock(AvatarBlock):
    """A block whose cross-attention also reads the image and the audio."""

    cross_processor = ThreefoldAttnProcessor

    @classmethod
    def adopt(cls, block: WanTransformerBlock) -> None:
        super().adopt(block)
        width = block.attn2.inner_dim
        block.attn2.vocal_k = nn.Linear(width, width)
        block.attn2.vocal_v = nn.Linear(width, width)

    def compute(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb: Tensor | None,
        rotary_emb: Tensor | None,
        image: Tensor | None = None,
        vocal: Tensor | None = None,
        text_key_value: KeyValue | None = None,
        image_key_value: KeyValue | None = None,
        only: str | None = None,
        is_mixed: bool = False,
    ) -> Tensor | tuple[KeyValue | None, KeyValue | None]:
        """hidden_states [B, S, D]; encoder_hidden_states [B, S_text, D]; temb [B, 6, D]; image [B, 257, D];
        vocal [B', G, n, D], see `ThreefoldAttnProcessor`.

        only="kv" returns the keys and values of this block for the given of text and image, and nothing
        else, only="mixed" the tokens behind its self-attention, with which is_mixed goes on: under FSDP2 a
        block's parameters exist only inside its own forward.
        """
        if only == "kv":
            text = encoder_hidden_states
            return (
                None if text is None else AvatarAttnProcessor.key_value(self.attn2, text),
                None if image is None else ThreefoldAttnProcessor.image_key_value(self.attn2, image),
            )
        assert temb is not None and rotary_emb is not None
        if not is_mixed:
            hidden_states = self.mixed(hidden_states, temb, rotary_emb)
        if only == "mixed":
            return hidden_states
        return self.conditioned(
            hidden_states,
            temb,
            encoder_hidden_states,
            key_value=text_key_value,
            image=image,
            image_key_value=image_key_value,
            vocal=vocal,
        )


class StableAvatarTransformer(AvatarTransformer):
    """prepare: keys and values of text and image, windows of audio, rotary table. The projector looks at
    the noisy latents and the time step: it runs in every step, once for each audio."""

    _no_split_modules: ClassVar = ["VocalBlock", "ProjectorBlock"]
    _repeated_blocks: ClassVar = ["VocalBlock"]
    # The time vector is modulation in this model's projector too, and is not rounded on its way there.
    _keep_in_fp32_modules: ClassVar = [
        "time_embedder", "time_proj", "scale_shift_table", "modulation",
        "norm1", "norm2", "norm3", "norm", "norm_1", "norm_2",
    ]  # fmt: skip
    _skip_layerwise_casting_patterns: ClassVar = [
        "patch_embedding", "condition_embedder", "norm", "lora", "vocal",
    ]  # fmt: skip

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 36,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int = 1280,
        vocal_dim: int = 768,
        vocal_hidden_dim: int | None = None,
        vocal_heads: int = 8,
        vocal_layers: int = 2,
        vocal_ffn_dim: int | None = None,
    ) -> None:
        """vocal_hidden_dim: width between two projections of audio (14B: 2048), None for a single one.
        vocal_ffn_dim: None for twice the width."""
        width = num_attention_heads * attention_head_dim
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
            image_dim=image_dim,
            added_kv_proj_dim=width,
            rope_max_seq_len=1,  # the parent's table is replaced
        )
        self.adopt_blocks(VocalBlock)
        self.condition_embedder.timesteps_proj = ExactSinusoid(freq_dim)
        self.vocal_projector = VocalProjector(
            vocal_dim,
            width,
            heads=vocal_heads,
            layers=vocal_layers,
            ffn_dim=vocal_ffn_dim or 2 * width,
            eps=eps,
            hidden_dim=vocal_hidden_dim,
        )

    def _raw(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        image: Tensor,
        vocal: Tensor,
        *,
        frames: int | None = None,
        padded_frames: int | None = None,
        clip_level: bool = False,
    ) -> Tensor:
        """hidden_states [B, 36, T, h, w], timestep [B] in 0..1000, encoder_hidden_states [B, S_text,
        text_dim], image [B, 257, image_dim], vocal [B, L, vocal_dim] -> velocity [B, 16, T, h, w]. Samples
        of a batch are independent.

        frames: pixel frames that the audio is split for, 4T - 3 unless given.
        padded_frames: latent frames to which the tokens are filled up with zeros, as the published pipeline
        does with a short window; they are attended, and `frames` then counts them.
        clip_level: every video token attends to the audio of the whole clip.
        """
        embedded = _padded(self._embed(hidden_states, timestep), padded_frames)
        _, _, length, height, width = hidden_states.shape
        if frames is None:
            frames = _PER_LATENT * (padded_frames or length) - 3
        context = self._project(embedded, self.vocal_projector.windows(vocal, frames))
        run = _Pass(
            embedded,
            rearrange(context, "b f n d -> b 1 (f n) d") if clip_level else context,
            text=self._text(encoder_hidden_states),
            image=self._image(image),
        )
        return self._run([run], self._rotary_table((length, height, width), hidden_states.device))[0]

    def _prepare(
        self,
        text: Tensor | None = None,
        image: Tensor | None = None,
        grid: tuple[int, int, int] | None = None,
        vocal: Tensor | None = None,
        frames: int | None = None,
        device: torch.device | None = None,
    ) -> PreparedStable:
        """text [B, S_text, text_dim], image [B, 257, image_dim], grid = latent (T, h, w) of latents on
        `device`, vocal [B, L, vocal_dim] split for `frames` pixel frames (4T - 3 of the grid unless given);
        each optional."""
        texts: tuple[Any, ...] = (None,)
        images: tuple[Any, ...] = (None,)
        if text is not None or image is not None:
            seen = None if image is None else self._image(image)
            context = None if text is None else self._text(text)
            # hidden_states stands in for an argument that `only` never reads.
            given = seen if context is None else context
            pairs = [block(given, context, None, None, seen, only="kv") for block in self.blocks]
            texts, images = zip(*pairs, strict=True)
        if vocal is not None and frames is None:
            if grid is None:
                raise ValueError("audio is split for a number of frames, or for those of a grid")
            frames = _PER_LATENT * grid[0] - 3
        return PreparedStable(
            text=None if text is None else texts,
            image=None if image is None else images,
            vocal=None if vocal is None or frames is None else self.vocal_projector.windows(vocal, frames),
            rotary=None if grid is None else self._rotary_table(grid, device),
        )

    def _denoise(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        prepared: Mapping[str, PreparedStable],
        *,
        padded_frames: int | None = None,
        batched: bool = False,
    ) -> dict[str, Tensor]:
        """As `_raw`, from prepared tensors, for every guidance branch: they share latents, timestep and grid,
        so these are embedded once, the projector runs once for each prepared `vocal` tensor, and the
        self-attention of the first block, before which neither text nor audio is read, runs once.

        batched: one forward pass for all branches, stacked along the batch.
        """
        parts = [part for ready in prepared.values() for part in (ready.text, ready.image, ready.rotary)]
        if any(part is None for part in parts):
            raise ValueError("denoise needs prepared text, image and rotary tensors")
        embedded = _padded(self._embed(hidden_states, timestep), padded_frames)
        contexts: dict[int, Tensor] = {}
        for ready in prepared.values():
            if ready.vocal is not None and id(ready.vocal) not in contexts:
                contexts[id(ready.vocal)] = self._project(embedded, ready.vocal)
        vocals = {name: contexts.get(id(ready.vocal)) for name, ready in prepared.items()}
        table = next(iter(prepared.values())).rotary
        assert table is not None  # checked above
        rotary = _padded_rotary(table, embedded)
        mixed = self.blocks[0](embedded.tokens, None, embedded.modulation, rotary, only="mixed")
        embedded = replace(embedded, tokens=mixed)

        # In a batch those with audio first: blocks give the rest of it no audio.
        order = sorted(prepared, key=lambda name: batched and vocals[name] is None)
        groups = [order] if batched else [[name] for name in order]
        passes = [
            _pass_of(embedded, [prepared[name] for name in names], [vocals[name] for name in names])
            for names in groups
        ]
        made = [part for stacked in self._run(passes, rotary) for part in stacked.chunk(len(groups[0]))]
        velocities = dict(zip(order, made, strict=True))
        return {name: velocities[name] for name in prepared}

    def _text(self, text: Tensor) -> Tensor:
        return self.condition_embedder.text_embedder(text.to(self._compute_dtype))

    def _image(self, image: Tensor) -> Tensor:
        return self.condition_embedder.image_embedder(image.to(self._compute_dtype))

    def _project(self, embedded: Embedded, audio: Tensor) -> Tensor:
        """Windows of audio [B, F, n, D] -> what the blocks attend to, [B, F, n, D]."""
        frames = embedded.tokens.shape[1] // math.prod(embedded.grid[1:])
        if audio.shape[1] != frames:
            # Any divisor of the token count would be accepted below, and audio would meet other frames.
            raise ValueError(f"audio of {audio.shape[1]} latent frames for a video of {frames}")
        return self._checkpointed(
            self.vocal_projector, audio, embedded.tokens, embedded.modulation, embedded.time
        )

    def _run(self, passes: Sequence[_Pass], rotary: Tensor) -> list[Tensor]:
        """Blocks and head: [B, 16, T, h, w] for each pass. Block by block, not pass by pass: a block that
        waits on the host comes once."""
        rotary = _padded_rotary(rotary, passes[0].embedded)
        tokens = [each.embedded.tokens for each in passes]
        for index, block in enumerate(self.blocks):
            calls = [
                (
                    seen,
                    each.text,
                    each.embedded.modulation,
                    rotary,
                    each.image,
                    each.vocal,
                    _stacked([ready.text[index] for ready in each.readies if ready.text]),
                    _stacked([ready.image[index] for ready in each.readies if ready.image]),
                    None,
                    each.is_mixed and index == 0,
                )
                for seen, each in zip(tokens, passes, strict=True)
            ]
            tokens.clear()
            tokens = self._through(block, calls)
        return [self._unembed(seen, each.embedded) for seen, each in zip(tokens, passes, strict=True)]


def _pass_of(embedded: Embedded, readies: Sequence[PreparedStable], vocals: Sequence[Tensor | None]) -> _Pass:
    """Stacked branches, those without audio last, from the tokens behind the first self-attention."""
    if (times := len(readies)) > 1:
        embedded = replace(
            embedded,
            tokens=embedded.tokens.repeat(times, 1, 1),
            time=embedded.time.repeat(times, 1),
            modulation=embedded.modulation.repeat(times, 1, 1),
        )
    given = [context for context in vocals if context is not None]
    return _Pass(embedded, torch.cat(given) if given else None, readies=readies, is_mixed=True)


def _padded(embedded: Embedded, frames: int | None) -> Embedded:
    """Zero tokens for the latent frames up to `frames`; the grid stays that of the video."""
    if frames is None:
        return embedded
    first, rows, columns = embedded.grid
    if frames < first:
        raise ValueError(f"{first} latent frames do not fit into {frames}")
    return replace(embedded, tokens=F.pad(embedded.tokens, (0, 0, 0, (frames - first) * rows * columns)))


def _padded_rotary(rotary: Tensor, embedded: Embedded) -> Tensor:
    """Tokens of the published padding are not rotated: they are turned by nothing."""
    missing = embedded.tokens.shape[1] - rotary.shape[1]
    if not missing:
        return rotary
    return torch.cat([rotary, rotary.new_ones(1, missing, *rotary.shape[2:])], dim=1)


def _stacked(pairs: Sequence[KeyValue]) -> KeyValue | None:
    """Keys and values of several branches as one batch."""
    if len(pairs) < 2:
        return pairs[0] if pairs else None
    if all(pair is pairs[0] for pair in pairs) and len(pairs[0][0]) == 1:
        key, value = pairs[0]  # the same in every branch: seen several times, stored once
        return key.expand(len(pairs), -1, -1, -1), value.expand(len(pairs), -1, -1, -1)
    keys, values = zip(*pairs, strict=True)
    return torch.cat(keys), torch.cat(values)
