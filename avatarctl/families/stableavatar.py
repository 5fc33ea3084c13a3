"""StableAvatar: an image and a voice -> windows over the whole video, cross-faded in every step.

Specification: spec/stableavatar.md c, d, e, f, g. Every window starts from the same image, as the first of
its frames and as CLIP tokens, and gets its own audio. The audio adapter in the network sees latents and time
step: a window's audio is encoded once, the network listens again in every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

from avatarctl.conditioning.channels import MASK4_KEEP, first_frame_channels
from avatarctl.conditioning.geometry import nearest_shape
from avatarctl.conditioning.windows import WindowPlan, blend_weights, plan_windows
from avatarctl.config import RunConfig
from avatarctl.errors import UsageError
from avatarctl.events import Notice
from avatarctl.families.offers import OF_A_SOURCE, require_offered
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
from avatarctl.sampling.guidance import audio_first, combine, native
from avatarctl.timeline import FPS, latent_frames, pixel_frames

if TYPE_CHECKING:
    from torch import Tensor, nn

    from avatarctl.models.stableavatar import PreparedStable

__all__ = ["StableAvatar"]

_LATENT_CHANNELS = 16
_PIXELS_PER_LATENT = 8
_PIXELS_PER_TOKEN = 2 * _PIXELS_PER_LATENT  # patches of 2 x 2

# Video tokens up to which a step of a small network is faster as one batch; beyond, it needs more memory and
# nothing is gained. Measured on a CPU, see docs/benchmarks.md.
_BATCHED_TOKENS = 512

# (height, width) of the published checkpoints (spec/stableavatar.md f).
_PUBLISHED_SIZES = ((512, 512), (480, 832), (832, 480))

# What each branch reads: a prompt, and of audio the job's, encoded silence, or nothing at all, not even
# what the audio adapter makes of the latents. None: as `sampling.null_audio` says.
_TEXT: Final[Mapping[str, Literal["prompt", "negative"]]] = {
    "full": "prompt", "negative": "negative", "silent_negative": "negative", "silent": "prompt",
    "unpaired": "prompt",
}  # fmt: skip
_AUDIO: Final[Mapping[str, Literal["audio", "silence", "nothing"] | None]] = {
    "full": "audio", "negative": "audio", "silent_negative": None, "silent": "silence", "unpaired": "nothing",
}  # fmt: skip


@dataclass
class _State:
    """One job: what stays the same in every window. Keys and values, rotary tables, channels and the
    projection of silence are computed when they are first needed."""

    masked_video: Tensor  # [1, 16, F, h, w], of the longest window
    image: Tensor  # [1, 257, width]
    text: dict[str, Tensor]  # prompt, negative: [1, text_len, width]
    overlap: int  # latent frames, as asked
    blend: Literal["uniform", "log"]
    null_audio: Literal["silence", "nothing"]
    batched: bool
    padded: int | None  # latent frames that short windows are padded to, as published; None: never
    image_ready: PreparedStable | None = None
    text_ready: dict[str, PreparedStable] = field(default_factory=dict)
    rotary: dict[int, Tensor] = field(default_factory=dict)  # by latent frames
    channels: dict[int, Tensor] = field(default_factory=dict)  # by latent frames, [1, 20, T, h, w]
    silence: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by tokens, latent frames


@dataclass(frozen=True)
class _Encoded:
    """masked_video [B, 16, T, h, w]; tokens [B, L, A]; image [B, 257, width]."""

    masked_video: Tensor
    tokens: Tensor
    text: Mapping[str, Tensor]
    image: Tensor


class StableAvatar:
    """The `Family` of all rows with `family: stableavatar`. Holds nothing."""

    name = "stableavatar"

    def conventions(self, cfg: RunConfig) -> Conventions:
        """What a file of this family must agree on."""
        assert cfg.sampling.shift is not None
        return Conventions(
            audio_offset=0, mask_keep=MASK4_KEEP, hole=0.0, fps=FPS, sigma_shift=cfg.sampling.shift
        )

    def takes(self, cfg: RunConfig) -> Literal["image", "video"]:
        """An image; there is no other published model."""
        return "image"

    def frame_size(self, image: tuple[int, int], cfg: RunConfig) -> tuple[int, int]:
        """Height and width of the video for an image of (height, width), where neither is asked for."""
        return nearest_shape(image, _PUBLISHED_SIZES)

    def notices(self, cfg: RunConfig) -> tuple[str, ...]:
        """Where a run differs from what its settings suggest."""
        lines = []
        if cfg.sampling.guidance_rule == "native":
            lines.append("guidance native is our reading of the paper, unverified against unpublished code")
        if cfg.model.compat == "reference":
            lines.append("compat reference: up to four frames of audio at the end have no video")
            if cfg.sampling.latents_dtype != "bfloat16":
                lines.append(
                    "compat reference: latents are float32; --latents-dtype bfloat16 rounds them as published"
                )
        return tuple(lines)

    def plan(self, samples: int, cfg: RunConfig) -> VideoPlan:
        """Windows for `samples` at 16 kHz; needs output.width and output.height. Raises UsageError for
        settings that this family has not."""
        self._require_offered(cfg)
        windows = _windows(samples, cfg)
        if cfg.long_video.strategy == "off" and windows.count > 1:
            frames = pixel_frames(windows.window)
            raise UsageError(
                f"the audio fills {windows.video_frames} frames and one window holds {frames} "
                f"({frames / FPS:g} s)",
                where="long_video.strategy",
                fix="add --long-video fused",
            )
        height, width = cfg.output.height, cfg.output.width
        assert height is not None and width is not None
        return VideoPlan(
            kind="fused",
            spans=windows.spans,
            count=windows.count,
            frames=windows.video_frames,
            shape=(_LATENT_CHANNELS, height // _PIXELS_PER_LATENT, width // _PIXELS_PER_LATENT),
        )

    def _require_offered(self, cfg: RunConfig) -> None:
        require_offered(
            cfg,
            self.name,
            choices={
                "long_video.strategy": ("off", "fused"),
                "model.compat": ("none", "reference"),
                "model.channels": (36,),
                "model.audio_offset": (0,),
            },
            without=(
                "long_video.carry", "long_video.max_tokens", "long_video.max_size", "long_video.audio_window",
                *OF_A_SOURCE,
            ),
        )  # fmt: skip
        if cfg.model.compat == "reference":
            published = {"sampling.guidance_rule": ("cfg",), "sampling.null_audio": ("zero_context",)}
            require_offered(cfg, f"{self.name} under compat reference", choices=published)
        if cfg.sampling.guidance_rule == "native" and cfg.sampling.null_audio != "zero_context":
            raise UsageError(
                "audio native guidance decides itself what audio its branches get",
                where="sampling.null_audio",
            )

    def guidance(self, cfg: RunConfig) -> Guidance:
        """The scales and the rule of a run."""
        assert cfg.sampling.guidance_scale is not None
        return Guidance(
            cfg.sampling.guidance_scale, cfg.sampling.audio_guidance_scale, cfg.sampling.guidance_rule
        )

    def sigmas(self, steps: int, shift: float) -> Tensor:
        from avatarctl.flow_matching import double_shifted_sigmas

        return double_shifted_sigmas(steps, shift)

    def open(self, modules: Modules, inputs: Inputs, cfg: RunConfig) -> _State:
        from avatarctl.models.encode import encode_prompt

        assert modules.image is not None and inputs.image is not None
        windows = _windows(inputs.samples, cfg)
        published = cfg.model.compat == "reference"
        full = latent_frames(_length(cfg))
        if published and windows.latent_frames <= full:
            inputs.emit(Notice("compat reference: the published script has no result for so short audio"))
        prompts = {"prompt": inputs.prompt, "negative": inputs.negative_prompt}
        texts = dict.fromkeys(_TEXT[branch] for branch in self.branches(self.guidance(cfg), 0))
        height, width = inputs.image.shape[2:]
        video = inputs.image.new_zeros((1, 3, pixel_frames(windows.window), height, width))
        video[:, :, 0] = inputs.image
        return _State(
            masked_video=modules.vae.encode(video),
            image=modules.image.encode(inputs.image),
            text={
                name: encode_prompt(modules.text, prompts[name], modules.device, inputs.emit)
                for name in texts
            },
            overlap=windows.overlap,
            blend=cfg.long_video.blend,
            null_audio="silence" if cfg.sampling.null_audio == "projected_silence" else "nothing",
            batched=_batched(windows.window, (height, width), cfg),
            padded=full if published else None,
        )

    def encode(self, modules: Modules, inputs: Inputs, span: Span, state: _State, carry: Carry) -> _Encoded:
        from avatarctl.models.encode import window_tokens

        return _Encoded(
            masked_video=state.masked_video[:, :, : span.frames],
            tokens=window_tokens(
                modules.audio,
                inputs.waveform,
                span.audio,
                samples=inputs.samples,
                device=modules.device,
            ),
            text=state.text,
            image=state.image,
        )

    def build_condition(self, encoded: _Encoded) -> Condition:
        return Condition(
            channels=first_frame_channels(encoded.masked_video),
            clean=None,
            fixed_mask=None,
            audio={"tokens": encoded.tokens},
            text=encoded.text,
            extra={"image": encoded.image},
        )

    def noise_key(self, span: Span, inputs: Inputs) -> tuple[tuple[int, ...], int]:
        return (inputs.job,), span.start

    def branches(self, guidance: Guidance, step: int) -> tuple[str, ...]:
        return tuple(_weights(guidance))

    def prepare(
        self, dit: nn.Module, condition: Condition, branches: Sequence[str], state: _State
    ) -> Prepared:
        """The window's own audio, projected and cut; everything else is the same in every window."""
        assert condition.channels is not None
        frames = condition.channels.shape[2]
        if frames not in state.channels:
            channels = state.channels[frames] = condition.channels
            state.rotary[frames] = dit(
                mode="prepare", grid=tuple(channels.shape[2:]), device=channels.device
            ).rotary
        if state.image_ready is None:
            state.image_ready = dit(mode="prepare", image=condition.extra["image"])
        for name in {_TEXT[branch] for branch in branches} - state.text_ready.keys():
            state.text_ready[name] = dit(mode="prepare", text=condition.text[name])
        vocals = self._vocals(dit, condition.audio["tokens"], frames, branches, state)
        ready = {
            branch: replace(
                state.text_ready[_TEXT[branch]],
                image=state.image_ready.image,
                vocal=vocals[_AUDIO[branch] or state.null_audio],
                rotary=state.rotary[frames],
            )
            for branch in branches
        }
        return Prepared(shared=state.channels[frames], branch=ready)

    def _vocals(
        self, dit: nn.Module, tokens: Tensor, frames: int, branches: Sequence[str], state: _State
    ) -> dict[str, Tensor | None]:
        """The audio of the branches, by name; two branches with the same audio share one tensor."""
        wanted = {_AUDIO[branch] or state.null_audio for branch in branches}
        pixels = pixel_frames(state.padded or frames)
        vocals: dict[str, Tensor | None] = {"nothing": None}
        if "audio" in wanted:
            vocals["audio"] = dit(mode="prepare", vocal=tokens, frames=pixels).vocal
        if "silence" in wanted:
            key = (tokens.shape[1], frames)
            if key not in state.silence:
                silence = dit(mode="prepare", vocal=tokens.new_zeros(tokens.shape), frames=pixels)
                state.silence[key] = silence.vocal
            vocals["silence"] = state.silence[key]
        return vocals

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

        velocities: dict[str, Tensor] = dit(
            torch.cat([x, prepared.shared], dim=1),
            t,
            {name: prepared.branch[name] for name in branches},
            mode="denoise",
            padded_frames=state.padded,
            batched=state.batched,
        )
        return {name: velocity.float() for name, velocity in velocities.items()}

    def combine(self, velocities: Mapping[str, Tensor], guidance: Guidance, step: int) -> Tensor:
        return combine(velocities, _weights(guidance))

    def fuse(self, new: Tensor, written: Tensor, span: Span, step: int, state: _State) -> Tensor:
        """The earlier window owns the first shared frame, the later one the last; in the first step, and
        without an overlap, the later one owns them all (spec/stableavatar.md e.2)."""
        import torch

        shared = written.shape[2]
        if shared == 0 or step == 0 or state.overlap == 0:
            return new
        later = new.new_tensor(blend_weights(shared, state.blend)).view(1, 1, -1, 1, 1)
        blended = later * new[:, :, :shared] + (1 - later) * written
        return torch.cat([blended, new[:, :, shared:]], dim=2)

    def advance(self, modules: Modules, state: _State, span: Span, latents: Tensor, pixels: Tensor) -> Carry:
        return None

    def decoder(self, modules: Modules, state: _State) -> Decoder:
        return modules.vae.decoder()


def _weights(guidance: Guidance) -> dict[str, float]:
    return native(guidance) if guidance.rule == "native" else audio_first(guidance)


def _batched(frames: int, size: tuple[int, int], cfg: RunConfig) -> bool:
    """Whether the branches of a step run as one batch; frames: latent, of a window; size: height, width."""
    if cfg.sampling.batch_branches is not None:
        return cfg.sampling.batch_branches
    rows, columns = (length // _PIXELS_PER_TOKEN for length in size)
    return frames * rows * columns <= _BATCHED_TOKENS


def _length(cfg: RunConfig) -> int:
    """Pixel frames of a window."""
    assert cfg.long_video.num_frames is not None
    return cfg.long_video.num_frames


def _windows(samples: int, cfg: RunConfig) -> WindowPlan:
    overlap = 0 if cfg.long_video.strategy == "off" else cfg.long_video.overlap_frames  # one window has none
    assert overlap is not None
    return plan_windows(
        samples,
        length=_length(cfg),
        overlap=overlap,
        published=cfg.model.compat == "reference",
    )
