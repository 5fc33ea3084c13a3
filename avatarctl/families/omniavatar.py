"""OmniAvatar: an image or a video, and a voice -> chunks of video, audio added to the tokens of early blocks.

Specification: spec/omniavatar.md a, b, f, g.3. Chunks overlap in pixel frames; the latent of the image, or of
the source's first frame, is the reference of every chunk, and the first latent frames of a chunk are given
(the image, then the tail of the chunk before). With 49 channels it is shown what a chunk of the source holds
outside the mask, with 65 also other frames of the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from avatarctl.conditioning.channels import MASK_KEEP, condition_channels, given_frames, mask_channel
from avatarctl.conditioning.chunks import ChunkPlan, plan_chunks
from avatarctl.conditioning.geometry import choose_bucket, chunk_frames
from avatarctl.conditioning.masking import HOLE, MaskRule, reference_range
from avatarctl.config import RunConfig
from avatarctl.errors import UsageError
from avatarctl.families.offers import OF_A_SOURCE, require_offered
from avatarctl.families.omniavatar_objective import Encoded, Objective
from avatarctl.families.omniavatar_preparation import Preparation
from avatarctl.family import (
    Carry,
    Condition,
    Conventions,
    Decoder,
    Guidance,
    Inputs,
    Modules,
    Prepared,
    Source,
    Span,
    VideoPlan,
)
from avatarctl.sampling.guidance import combine, text_first
from avatarctl.timeline import (
    FPS,
    SAMPLES_PER_FRAME,
    frames_of_samples,
    pixel_frames,
    reference_frames_of_samples,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from avatarctl.models.encode import AudioFeatures
    from avatarctl.models.omniavatar import PreparedTensors

__all__ = ["OmniAvatar"]

_LATENT_CHANNELS = 16
_PIXELS_PER_LATENT = 8
_SHORTEST_CHUNK = 5
_IMAGE_CHANNELS: Final = 33
_SEQUENCE_CHANNELS: Final = 65
_BRANCH_TEXT = {"full": "prompt", "silent": "prompt", "negative": "negative"}


@dataclass
class _SourceState:
    """A source and what of it stays the same.

    keep [1, 1, H, W] and keep_latent [1, 1, h, w] of 0 and 1; wants_sequence: whether the model is shown a
    reference sequence; sequence: the last one, with the frames that it is of.
    """

    source: Source
    rule: MaskRule
    keep: Tensor
    keep_latent: Tensor
    wants_sequence: bool
    sequence: tuple[tuple[int, int], Tensor] | None = None


@dataclass
class _State:
    """One job: what stays the same in every chunk, computed when it is first needed."""

    reference: Tensor  # [1, 16, 1, h, w]
    features: AudioFeatures
    overlap: int
    text: dict[str, Tensor]  # prompt, negative: [1, text_len, width]
    source: _SourceState | None = None
    text_ready: dict[str, PreparedTensors] = field(default_factory=dict)
    silence_ready: PreparedTensors | None = None
    rotary: Tensor | None = None


class OmniAvatar(Objective, Preparation):
    """The `Family` of all rows with `family: omniavatar`. Holds nothing."""

    name = "omniavatar"

    def conventions(self, cfg: RunConfig) -> Conventions:
        """What a file of this family must agree on."""
        assert cfg.model.audio_offset is not None and cfg.sampling.shift is not None
        return Conventions(
            audio_offset=cfg.model.audio_offset,
            mask_keep=MASK_KEEP,
            hole=HOLE,
            fps=FPS,
            sigma_shift=cfg.sampling.shift,
        )

    def takes(self, cfg: RunConfig) -> Literal["image", "video"]:
        """A video where the network has channels for it."""
        return "image" if cfg.model.channels == _IMAGE_CHANNELS else "video"

    def frame_size(self, image: tuple[int, int], cfg: RunConfig) -> tuple[int, int]:
        """Height and width of the video for an image of (height, width), where neither is asked for: the
        bucket of its shape. A source is fitted to the size of the clips that its model learnt from."""
        if self.takes(cfg) == "video":
            assert cfg.data.height is not None and cfg.data.width is not None
            return cfg.data.height, cfg.data.width
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
        self._require_offered(cfg)
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

    def _require_offered(self, cfg: RunConfig) -> None:
        of_video = self.takes(cfg) == "video"
        require_offered(
            cfg,
            self.name,
            choices={
                "long_video.strategy": ("off", "chunks"),
                "long_video.carry": (None, "pixels"),
                "model.channels": (33, 49, 65),
            },
            without=(
                "long_video.schedule", "long_video.blend", "sampling.guidance_rule", "sampling.null_audio",
                "sampling.batch_branches", "sampling.latents_dtype", *(() if of_video else OF_A_SOURCE),
            ),
        )  # fmt: skip
        if of_video:
            # Frame k of the source is driven by audio frame k, as the public trainer's models learnt it.
            choices = {"model.compat": ("none", "fork"), "model.audio_offset": (0,)}
            require_offered(cfg, f"{self.name} on a video", choices=choices)

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
            opening=1 if self.takes(cfg) == "image" or cfg.data.mask_rule == "first_keep" else 0,
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
        from avatarctl.models.encode import AudioFeatures, encode_prompt, frames_tensor
        from avatarctl.models.text import clean_prompt

        chunks = self._chunks(inputs.samples, cfg)
        text = {
            "prompt": encode_prompt(modules.text, clean_prompt(inputs.prompt), modules.device, inputs.emit)
        }
        if any(_BRANCH_TEXT[name] == "negative" for name in text_first(self.guidance(cfg))):
            negative = clean_prompt(inputs.negative_prompt)
            text["negative"] = encode_prompt(modules.text, negative, modules.device, inputs.emit)
        whole = cfg.model.compat == "reference"
        source = None if inputs.source is None else _open_source(inputs.source, modules, cfg)
        if source is not None:
            first = frames_tensor(source.source.frames.read(0, 1), modules.device)
        else:
            assert inputs.image is not None
            first = inputs.image.unsqueeze(2)
        state = _State(
            reference=modules.vae.encode(first),
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
            source=source,
        )
        _ready_text(modules.dit, state, text)
        return state

    def encode(self, modules: Modules, inputs: Inputs, span: Span, state: _State, carry: Carry) -> Encoded:
        """carry: the last pixel frames of the chunk before, [1, 3, overlap, H, W]; None for the first."""
        first, last = (sample // SAMPLES_PER_FRAME for sample in span.audio)
        given = modules.vae.encode(carry) if carry is not None else state.reference if span.fixed else None
        source = state.source
        return Encoded(
            reference=state.reference,
            given=given,
            counts=(0 if given is None else given.shape[2],),
            audio=state.features.rows(first, last),
            text=state.text,
            frames=span.frames,
            keep=None if source is None else source.keep_latent,
            masked=None if source is None else _masked(modules, source, span, carry),
            sequence=_sequence(modules, source, span) if source and source.wants_sequence else None,
        )

    def build_condition(self, encoded: Encoded) -> Condition:
        reference = encoded.reference
        batch, channels, _, height, width = reference.shape
        given = given_frames(encoded.counts, encoded.frames, reference.device)
        keep = reference.new_zeros((batch, 1, height, width)) if encoded.keep is None else encoded.keep
        clean = reference.new_zeros((batch, channels, encoded.frames, height, width))
        if encoded.given is not None:
            clean[:, :, : encoded.given.shape[2]] = encoded.given
        return Condition(
            channels=condition_channels(
                reference, mask_channel(given, keep.to(reference.dtype)), encoded.masked, encoded.sequence
            ),
            clean=clean,
            fixed_mask=given,
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


def _open_source(source: Source, modules: Modules, cfg: RunConfig) -> _SourceState:
    from avatarctl.conditioning.masking import keep_map

    height, width = cfg.output.height, cfg.output.width
    assert height is not None and width is not None
    keep = source.keep.to(modules.device)
    return _SourceState(
        source=source,
        rule=cfg.data.mask_rule,
        keep=keep_map(keep, (height, width)),
        keep_latent=keep_map(keep, (height // _PIXELS_PER_LATENT, width // _PIXELS_PER_LATENT)),
        wants_sequence=cfg.model.channels == _SEQUENCE_CHANNELS,
    )


def _masked(modules: Modules, state: _SourceState, span: Span, carry: Carry) -> Tensor:
    """Latents of what the span shows of the source outside the hole: [1, 16, T, h, w]."""
    from avatarctl.models.encode import source_latents

    first = 4 * span.start
    frames = state.source.frames.read(first, first + pixel_frames(span.frames))
    made = source_latents(modules.vae, frames, state.keep, state.rule, wanted=("masked",), given=carry)
    return made["masked"]


def _sequence(modules: Modules, state: _SourceState, span: Span) -> Tensor:
    """The reference sequence of a span, [1, 16, T, h, w]. The same frames are coded once."""
    from avatarctl.models.encode import reference_latents

    reader = state.source.reference or state.source.frames
    first = 4 * span.start
    where = reference_range(reader.frames, first, pixel_frames(span.frames))
    if state.sequence is None or state.sequence[0] != where:
        state.sequence = (
            where,
            reference_latents(modules.vae, reader.read(*where), span.frames, modules.device),
        )
    return state.sequence[1]
