"""A VAE and a family that are watched while they work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.family import Condition, Decoder, Prepared, VideoCodec


@dataclass
class WatchedDecoder:
    """pushed: the latents of each call, and the frames that came of them."""

    decoder: Decoder
    pushed: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def push(self, latents: Tensor) -> Tensor:
        frames = self.decoder.push(latents)
        self.pushed.append((latents.clone(), frames.clone()))
        return frames


@dataclass
class WatchedCodec:
    """The real one, unchanged. coded: the videos that it coded; decoders: those that it gave, in order."""

    real: VideoCodec
    coded: list[Tensor] = field(default_factory=list)
    decoders: list[WatchedDecoder] = field(default_factory=list)

    def encode(self, video: Tensor) -> Tensor:
        self.coded.append(video.clone())
        return self.real.encode(video)

    def decoder(self) -> Decoder:
        self.decoders.append(WatchedDecoder(self.real.decoder()))
        return self.decoders[-1]


@dataclass
class Witness(OmniAvatar):
    """The family, noting the condition of every chunk; its network predicts nothing."""

    seen: list[Condition] = field(default_factory=list)

    def prepare(self, dit: nn.Module, condition: Condition, branches: Any, state: Any) -> Prepared:
        self.seen.append(condition)
        return Prepared(shared=None, branch={})

    def predict(self, dit: nn.Module, x: Tensor, t: Tensor, prepared: Any, branches: Any, **_: Any) -> Any:
        return {name: torch.zeros_like(x) for name in branches}
