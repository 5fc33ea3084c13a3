"""From a training step to the frames that judges look at: the clean latents that it implies, and a window of
their frames, decoded with a gradient.

Sources: spec/omniavatar.md g.5, spec/losses-and-eval.md 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from avatarctl.flow_matching import clean_estimate
from avatarctl.host import HOST
from avatarctl.loading.judges import LossName
from avatarctl.models.vae import WanVae
from avatarctl.models.vae_gradient import decode_with_gradient
from avatarctl.rng import Key, generator
from avatarctl.timeline import SAMPLES_PER_FRAME, pixel_frames
from avatarctl.training.aux_losses import Align, AuxLosses

__all__ = ["LATENT_LIMIT", "AuxBatch", "AuxResult", "AuxStep", "implied_latents", "window_start"]

LATENT_LIMIT: Final = 10.0
"""Clean latents are held to this, either side of 0 (spec/omniavatar.md g.5)."""


def implied_latents(
    noisy: Tensor, velocity: Tensor, sigma: Tensor, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The clean latents x0 = x - sigma v of a prediction, [B, C, T, h, w] in [-10, 10], and the share of
    them that was clipped, which has no gradient, [B].

    sigma: [B], or [B, T]. All in float32: sigma rounded to bfloat16 moves x0 by the noise it leaves in.
    given: bool [B, 1, T, 1, 1], latents that are in `noisy` as they are. They have no noise to be taken off,
    and v was never taught there: x0 is `noisy` itself, without a gradient, and they are no part of the share.
    """
    wide = torch.promote_types(velocity.dtype, torch.float32)
    noisy = noisy.to(wide)
    implied = clean_estimate(noisy, velocity.to(wide), sigma)
    clipped = implied.detach().abs() > LATENT_LIMIT
    held = implied.clamp(-LATENT_LIMIT, LATENT_LIMIT)
    if given is None:
        return held, clipped.flatten(1).float().mean(1)
    free = (~given).expand_as(clipped)
    share = (clipped & free).flatten(1).sum(1) / free.flatten(1).sum(1).clamp(min=1)
    return torch.where(given, noisy, held), share


def window_start(clip_frames: int, frames: int, seed: int, *key: Key) -> int:
    """First pixel frame of a window of `frames` in a clip, drawn by the key alone; 0 where the window is the
    clip, or `frames` is 0.

    A window begins where a latent frame does, at 0 or 4 k + 1, so that none is decoded for a part of it. One
    more ends with the clip, wherever it begins: else its last frames would never be judged.
    """
    if not frames:
        return 0
    last = clip_frames - frames
    starts = sorted({0, *range(1, last + 1, 4), last})
    drawn = torch.randint(len(starts), (), generator=generator(seed, "auxiliary window", *key))
    return starts[int(drawn)]


@dataclass(frozen=True)
class AuxBatch:
    """What the auxiliary losses need of a micro-batch.

    noisy, velocity, clean: [B, C, T, h, w], normalised latents; velocity with a gradient. Where latents are
              given, both `clean` and `noisy` are what the network was given, noise of `train.prefix_noise`
              included: both clips are decoded behind the same frames, so they differ by the prediction alone.
              Latents of the file beside them would hold that noise against a network that did not make it.
    sigma:    [B] or [B, T], float32, on the host: a sample above `aux.max_sigma` is not decoded, and a device
              that was asked for its numbers would have to be waited for.
    waveform: [B, 640 (4 T - 3)] float32 at 16 kHz, the audio of the whole clips; None without.
    keys:     of each sample the seed and the key of its draws (step, slot), which decide its window alone.
    align:    of each sample, how its frames become aligned faces; None where they are.
    given:    bool [B, 1, T, 1, 1], true for latents that are given; None where none are.
    """

    noisy: Tensor
    velocity: Tensor
    sigma: Tensor
    clean: Tensor
    waveform: Tensor | None
    keys: Sequence[tuple[int, tuple[Key, ...]]]
    align: Sequence[Align] | None = None
    given: Tensor | None = None


@dataclass(frozen=True)
class AuxResult:
    """losses: by name, unweighted, [B], 0 for a sample that was not judged; total: their weighted sum, [B].
    seen: of the J samples that were judged, losses and mean cosine, [J] each, nothing for J = 0: zeros of the
    others are no losses; numbers: of all, the share of clipped latents and whether each was judged, [B].
    """

    losses: dict[LossName, Tensor]
    total: Tensor
    seen: dict[str, Tensor]
    numbers: dict[str, Tensor]


class AuxStep:
    """Auxiliary losses of a micro-batch from what the network predicted. host: where `memory.vae_gradient
    offload` lets caches of the decoder wait."""

    def __init__(self, losses: AuxLosses, vae: WanVae, host: torch.device = HOST) -> None:
        self.losses, self._vae, self._host = losses, vae, host
        self._limit = float(np.float32(losses.settings.max_sigma))  # as sigmas are rounded

    @property
    def held(self) -> list[nn.Module]:
        """All that it holds."""
        return [self._vae, *self.losses.networks]

    def __call__(self, batch: AuxBatch) -> AuxResult:
        """Raises UnusableAudio (exit 3) for the sync loss without audio."""
        with torch.autocast(batch.velocity.device.type, enabled=False):
            return self._step(batch)

    def _step(self, batch: AuxBatch) -> AuxResult:
        sigma = batch.sigma.to(batch.noisy.device)
        implied, clipped = implied_latents(batch.noisy, batch.velocity, sigma, batch.given)
        chosen, starts = self._choose(batch, pixel_frames(implied.shape[2]))
        judged = torch.tensor(chosen, dtype=torch.long).to(implied.device)
        decoded = torch.zeros_like(clipped).index_fill(0, judged, 1.0)
        numbers, seen = {"clipped": clipped, "judged": decoded}, {}
        nothing = implied.sum() * 0  # of the graph, so that a step without a judged sample has a gradient
        losses = {name: nothing + implied.new_zeros(len(implied)) for name in self.losses.names}
        if chosen:
            found, cosines = self._judge(batch, implied, chosen, starts)
            losses = {
                name: losses[name].index_put((judged,), loss.to(implied)) for name, loss in found.items()
            }
            seen = {name: loss.detach() for name, loss in found.items()} | cosines
        return AuxResult(losses, self.losses.total(losses), seen, numbers)

    def _choose(self, batch: AuxBatch, clip: int) -> tuple[list[int], list[int]]:
        """Which samples are judged, and where in a clip of `clip` pixel frames the window of each begins.
        Nothing else here depends on numbers: whoever counts memory without any says them."""
        highest = [max(own) if isinstance(own, list) else own for own in batch.sigma.tolist()]
        chosen = [index for index, sigma in enumerate(highest) if sigma <= self._limit]
        keys = [batch.keys[index] for index in chosen]
        return chosen, [window_start(clip, self.losses.settings.frames, seed, *key) for seed, key in keys]

    def _judge(
        self, batch: AuxBatch, implied: Tensor, chosen: Sequence[int], starts: Sequence[int]
    ) -> tuple[dict[LossName, Tensor], dict[str, Tensor]]:
        """Of the samples with these numbers."""
        count, judged = self.losses.settings.frames or pixel_frames(implied.shape[2]), list(chosen)
        frames = self._decode(implied[judged], starts, count)
        with torch.no_grad():
            # Decoded as well, not the frames of the file: nobody is to be blamed for what the VAE loses.
            real = self._decode(batch.clean[judged].to(implied), starts, count)
        audio = None if batch.waveform is None else _audio(batch.waveform[judged], starts, count)
        align = None if batch.align is None else [batch.align[index] for index in chosen]
        return self.losses(frames, real, audio, starts, align)

    def _decode(self, latents: Tensor, starts: Sequence[int], frames: int) -> Tensor:
        """[B, 3, frames, H, W]; together where all windows are the same, which a CPU does faster."""
        mode, host = self.losses.settings.vae_gradient, self._host
        if len(set(starts)) == 1:
            return decode_with_gradient(self._vae, latents, starts[0], frames, mode, host)
        return torch.cat([
            decode_with_gradient(self._vae, one, start, frames, mode, host)
            for one, start in zip(latents.split(1), starts, strict=True)
        ])  # fmt: skip


def _audio(waveform: Tensor, starts: Sequence[int], frames: int) -> Tensor:
    """The samples of exactly these frames, [B, 640 frames]."""
    pieces = zip(waveform, starts, strict=True)
    return torch.stack([
        clip[start * SAMPLES_PER_FRAME : (start + frames) * SAMPLES_PER_FRAME] for clip, start in pieces
    ])  # fmt: skip
