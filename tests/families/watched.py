"""A VAE that is watched while it works."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from avatarctl.family import Decoder, VideoCodec


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
