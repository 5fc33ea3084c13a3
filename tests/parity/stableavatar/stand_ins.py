"""Settings of recorded runs, and what stands in for encoders and VAE: the recorded tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from avatarctl.config import Input, LongVideo, Model, Output, RunConfig, Sampling
from avatarctl.timeline import latent_frames, pixel_frames

SHIFT = 5.0  # of every recorded run but those of schedules.json, which states its own
BRANCHES = ("silent_negative", "negative", "full")  # in the order of the recorded batch of three


def reference_config(
    *, clip_frames: int, overlap: int, text: float, audio: float, size: tuple[int, int], **sampling: Any
) -> RunConfig:
    """A run under `compat reference`; overlap in latent frames, size (height, width) in pixels."""
    height, width = size
    return RunConfig(
        model=Model(channels=36, audio_offset=0, compat="reference"),
        sampling=Sampling(guidance_scale=text, audio_guidance_scale=audio, shift=SHIFT, **sampling),
        long_video=LongVideo(
            strategy="fused",
            num_frames=clip_frames,
            overlap_frames=pixel_frames(overlap) if overlap else 0,
        ),
        input=Input(fit="stretch"),
        output=Output(width=width, height=height),
    )


@dataclass(frozen=True)
class Text:
    """Recorded contexts [1, text_len, width] by prompt."""

    contexts: Mapping[str, Tensor]

    @property
    def text_len(self) -> int:
        return next(iter(self.contexts.values())).shape[1]

    def tokens(self, prompt: str) -> int:
        return 1

    def encode(self, prompt: str, device: torch.device) -> Tensor:
        return self.contexts[prompt]


@dataclass
class Image:
    """Recorded image tokens; keeps the images it was shown."""

    tokens: Tensor
    shown: list[Tensor] = field(default_factory=list)

    def encode(self, image: Tensor) -> Tensor:
        self.shown.append(image)
        return self.tokens


@dataclass
class Codec:
    """Recorded latents [1, 16, F, h, w] in place of a video, zeros where none are given; keeps the videos it
    was shown. Latents are handed through as pixels."""

    latents: Tensor | None = None
    shown: list[Tensor] = field(default_factory=list)

    def encode(self, video: Tensor) -> Tensor:
        self.shown.append(video)
        batch, _, pixels, height, width = video.shape
        frames = latent_frames(pixels)
        if self.latents is None:
            return torch.zeros(batch, 16, frames, height // 8, width // 8)
        return self.latents[:, :, :frames]

    def decoder(self) -> Codec:
        return self

    def push(self, latents: Tensor) -> Tensor:
        return latents
