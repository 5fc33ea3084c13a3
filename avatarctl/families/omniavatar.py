"""OmniAvatar: an image and a voice -> chunks of video, audio added to the tokens of early blocks.

Specification: spec/omniavatar.md a, b, f. Chunks overlap in pixel frames; the image's latent is the
reference of every chunk, and the first latent frames of a chunk are given (the image, then the tail of the
chunk before).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from avatarctl.conditioning.channels import MASK_KEEP, condition_channels, prefix_mask
from avatarctl.conditioning.chunks import ChunkPlan, plan_chunks
from avatarctl.conditioning.geometry import choose_bucket, chunk_frames
from avatarctl.config import RunConfig
from avatarctl.errors import UsageError
from avatarctl.families.offers import require_offered
from avatarctl.family import (
    Carry,
    Condition,
    Conventions,
    Decoder,
    Guidance,
    Inputs,
    Modules,
    Prepared,
    Span,
    VideoPlan,
)
from avatarctl.sampling.guidance import combine, text_first
from avatarctl.timeline import FPS, SAMPLES_PER_FRAME, frames_of_samples, reference_frames_of_samples

if TYPE_CHECKING:
    from torch import Tensor, nn

    from avatarctl.models.encode import AudioFeatures
    from avatarctl.models.omniavatar import PreparedTensors

__all__ = ["OmniAvatar"]

_LATENT_CHANNELS = 16
_PIXELS_PER_LATENT = 8
_SHORTEST_CHUNK = 5
_BRANCH_TEXT = {"full": "prompt", "silent": "prompt", "negative": "negative"}


@dataclass
class _State:
    """One job: what stays the same in every chunk, computed when it is first needed."""

    reference: Tensor  # [1, 16, 1, h, w]
    features: AudioFeatures
    overlap: int
    text: dict[str, Tensor]  # prompt, negative: [1, text_len, width]
    text_ready: dict[str, PreparedTensors] = field(default_factory=dict)
    silence_ready: PreparedTensors | None = None
    rotary: Tensor | None = None


@dataclass(frozen=True)
class _Encoded:
    """reference [B, 16, 1, h, w]; given [B, 16, k, h, w]; audio [B, L, A]; frames: latent frames."""

    reference: Tensor
    given: Tensor
    audio: Tensor
    text: Mapping[str, Tensor]
    frames: int


class OmniAvatar:
    """The `Family` of all rows with `family: omniavatar`. Holds nothing."""

    name = "omniavatar"

    def conventions(self, cfg: RunConfig) -> Conventions:
        """What a file of this family must agree on."""
        assert cfg.model.audio_offset is not None and cfg.sampling.shift is not None
        return Conventions(
            audio_offset=cfg.model.audio_offset,
            mask_keep=MASK_KEEP,
            hole=0.0,
            fps=FPS,
            sigma_shift=cfg.sampling.shift,
        )

    def frame_size(self, image: tuple[int, int], cfg: RunConfig) -> tuple[int, int]:
        """Height and width of the video for an image of (height, width), where neither is asked for."""
        return choose_bucket(*image, cfg.long_video.max_size or 720)

    def notices(self, cfg: RunConfig) -> tuple[str, ...]:
        """Where a run differs from what its settings suggest."""
        if cfg.model.compat != "reference":
            return ()
        lines = [
            "compat reference: the VAE is not tiled, as the published script tiles it",
            "compat reference: all audio is encoded in one piece, so memory grows with its length",
        ]
        if self.guidance(cfg).audio != cfg.sampling.audio_guidance_scale:
            lines.append("compat reference: audio guidance is dropped, as text guidance is 1")
        return tuple(lines)

    def plan(self, samples: int, cfg: RunConfig) -> VideoPlan:
        """Chunks for `samples` at 16 kHz; needs output.width and output.height."""
        require_offered(
            cfg,
            self.name,
            choices={
                "long_video.strategy": ("off", "chunks"),
                "long_video.carry": (None, "pixels"),
                "model.channels": (33,),
            },
            without=(
                "long_video.schedule", "long_video.blend", "sampling.guidance_rule", "sampling.null_audio",
                "sampling.batch_branches", "sampling.latents_dtype",
            ),
        )  # fmt: skip
        chunks = self._chunks(samples, cfg)
        height, width = cfg.output.height, cfg.output.width
        assert height is not None and width is not None
        if cfg.long_video.strategy == "off" and chunks.count > 1:
            window = f"{chunks.length} ({chunks.length / FPS:g} s)"
            raise UsageError(
                f"the audio fills {chunks.video_frames} frames and one window holds {window}",
                where="long_video.strategy",
                fix="add --chunked",
            )
        return VideoPlan(
            kind="chunks",
            spans=chunks.spans,
            count=chunks.count,
            frames=chunks.video_frames,
            shape=(_LATENT_CHANNELS, height // _PIXELS_PER_LATENT, width // _PIXELS_PER_LATENT),
        )

    def _chunks(self, samples: int, cfg: RunConfig) -> ChunkPlan:
        reference = cfg.model.compat == "reference"
        long_video, output = cfg.long_video, cfg.output
        assert output.height is not None and output.width is not None
        length = long_video.num_frames
        if length is None:
            assert long_video.max_tokens is not None
            length = chunk_frames(long_video.max_tokens, output.height, output.width)
            if length < _SHORTEST_CHUNK:
                raise UsageError(
                    f"{long_video.max_tokens} tokens do not hold {_SHORTEST_CHUNK} frames of "
                    f"{output.width}x{output.height}",
                    where="long_video.max_tokens",
                    fix="give more tokens or a smaller --size",
                )
        overlap = 1 if long_video.strategy == "off" else long_video.overlap_frames  # one window has none
        assert overlap is not None and cfg.model.audio_offset is not None
        return plan_chunks(
            reference_frames_of_samples(samples) if reference else frames_of_samples(samples),
            length=length,
            overlap=overlap,
            offset=cfg.model.audio_offset,
        )

    def guidance(self, cfg: RunConfig) -> Guidance:
        """The scales of a run. The reference drops audio guidance when text guidance is 1
        (spec/omniavatar.md f.5)."""
        text, audio = cfg.sampling.guidance_scale, cfg.sampling.audio_guidance_scale
        assert text is not None
        if cfg.model.compat == "reference" and text == 1:
            audio = None
        return Guidance(text, audio)

    def sigmas(self, steps: int, shift: float) -> Tensor:
        from avatarctl.flow_matching import shifted_sigmas

        return shifted_sigmas(steps, shift)

    def open(self, modules: Modules, inputs: Inputs, cfg: RunConfig) -> _State:
        from avatarctl.models.encode import AudioFeatures, encode_prompt
        from avatarctl.models.text import clean_prompt

        chunks = self._chunks(inputs.samples, cfg)
        text = {
            "prompt": encode_prompt(modules.text, clean_prompt(inputs.prompt), modules.device, inputs.emit)
        }
        if any(_BRANCH_TEXT[name] == "negative" for name in text_first(self.guidance(cfg))):
            negative = clean_prompt(inputs.negative_prompt)
            text["negative"] = encode_prompt(modules.text, negative, modules.device, inputs.emit)
        whole = cfg.model.compat == "reference"
        state = _State(
            reference=modules.vae.encode(inputs.image.unsqueeze(2)),
            features=AudioFeatures(
                modules.audio,
                inputs.waveform,
                samples=inputs.samples,
                mean=inputs.mean,
                variance=inputs.variance,
                frames=chunks.padded_frames,
                window_seconds=None if whole else cfg.long_video.audio_window,
                device=modules.device,
            ),
            overlap=chunks.overlap,
            text=text,
        )
        _ready_text(modules.dit, state, text)
        return state

    def encode(self, modules: Modules, inputs: Inputs, span: Span, state: _State, carry: Carry) -> _Encoded:
        """carry: the last pixel frames of the chunk before, [1, 3, overlap, H, W]; None for the first."""
        first, last = (sample // SAMPLES_PER_FRAME for sample in span.audio)
        return _Encoded(
            reference=state.reference,
            given=state.reference if carry is None else modules.vae.encode(carry),
            audio=state.features.rows(first, last),
            text=state.text,
            frames=span.frames,
        )

    def build_condition(self, encoded: _Encoded) -> Condition:
        given = encoded.given.shape[2]
        mask = prefix_mask(encoded.reference, encoded.frames, given)
        batch, channels, _, height, width = encoded.reference.shape
        clean = encoded.reference.new_zeros((batch, channels, encoded.frames, height, width))
        clean[:, :, :given] = encoded.given
        return Condition(
            channels=condition_channels(encoded.reference, mask),
            clean=clean,
            fixed_mask=mask[..., :1, :1] == MASK_KEEP,
            audio={"features": encoded.audio},
            text=encoded.text,
        )

    def noise_key(self, span: Span, inputs: Inputs) -> tuple[tuple[int, ...], int]:
        return (inputs.job, span.index), 0

    def branches(self, guidance: Guidance, step: int) -> tuple[str, ...]:
        return tuple(text_first(guidance))

    def prepare(
        self, dit: nn.Module, condition: Condition, branches: Sequence[str], state: _State
    ) -> Prepared:
        """Audio residuals of this chunk. Text keys and values, the residual of silence and the rotary
        table are the same in every chunk: computed once per job and kept in the state."""
        from avatarctl.models.omniavatar import PreparedTensors

        assert condition.channels is not None
        features = condition.audio["features"]
        if state.rotary is None:
            channels = condition.channels
            state.rotary = dit(mode="prepare", grid=tuple(channels.shape[2:]), device=channels.device).rotary
        texts = {_BRANCH_TEXT[branch] for branch in branches}
        _ready_text(dit, state, {name: condition.text[name] for name in texts})
        if state.silence_ready is None and set(branches) - {"full"}:
            state.silence_ready = dit(mode="prepare", audio=features.new_zeros(features.shape))
        spoken = dit(mode="prepare", audio=features) if "full" in branches else None
        ready: dict[str, Any] = {}
        for branch in branches:
            audio = spoken if branch == "full" else state.silence_ready
            assert audio is not None
            ready[branch] = PreparedTensors(
                text=state.text_ready[_BRANCH_TEXT[branch]].text, audio=audio.audio, rotary=state.rotary
            )
        return Prepared(shared=condition.channels, branch=ready)

    def predict(
        self,
        dit: nn.Module,
        x: Tensor,
        t: Tensor,
        prepared: Prepared,
        branches: Sequence[str],
        *,
        span: Span,
        step: int,
        state: _State,
    ) -> dict[str, Tensor]:
        import torch

        inputs = torch.cat([x, prepared.shared], dim=1)
        ready = {name: prepared.branch[name] for name in branches}
        velocities: dict[str, Tensor] = dit(inputs, t, ready, mode="denoise")
        return {name: velocity.float() for name, velocity in velocities.items()}

    def combine(self, velocities: Mapping[str, Tensor], guidance: Guidance, step: int) -> Tensor:
        return combine(velocities, text_first(guidance))

    def advance(self, modules: Modules, state: _State, span: Span, latents: Tensor, pixels: Tensor) -> Carry:
        """The tail in pixels: published behaviour, coded again by the next chunk."""
        return pixels[:, :, -state.overlap :].clone()

    def decoder(self, modules: Modules, state: _State) -> Decoder:
        return modules.vae.decoder()


def _ready_text(dit: nn.Module, state: _State, text: Mapping[str, Tensor]) -> None:
    """Keys and values of the texts that have none yet."""
    for name in text.keys() - state.text_ready.keys():
        state.text_ready[name] = dit(mode="prepare", text=text[name])
