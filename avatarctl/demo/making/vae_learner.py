"""The Wan VAE of the cartoon world, from nothing (spec/cartoon-world.md 3, 9).

What it takes on a CPU: the posterior's mean with a fixed noise instead of a drawn sample, kernels that begin
by looking at the newest frame only, Muon for the convolutions, and clips as long as those decoded later:
causal caches reach further back than a short clip. Of long clips only the last frames are learnt from; those
before fill the caches.

Shapes: B clips, F = 4 T - 3 pixel frames, T latent frames; pixels in [-1, 1]; latents not normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from avatarctl.conditioning.masking import HOLE, keep_map, mask_tensor, mouth_mask
from avatarctl.demo.clips import Clip, clip
from avatarctl.demo.faces import SIZE
from avatarctl.demo.making.learning import Moved, seeded
from avatarctl.demo.making.muon import Muon
from avatarctl.demo.mouth_meter import correlation, measure_mouth, mouth_window
from avatarctl.models.vae import WanVae, fast_on_cpu
from avatarctl.rng import generator, stable_hash
from avatarctl.timeline import latent_frames

__all__ = ["VaeLearner", "latent_statistics", "to_bytes", "to_pixels"]

_LATENT_NOISE: Final = 0.1
_ADAM_RATE: Final = 2e-3
_MASKED: Final = 0.2  # of clips, whose mouth is erased: video to video has to code them as well
_NOT_MATRICES: Final = ("conv_in", "conv_out", "quant_conv")
_SEEDS: Final = 900_000  # of training; those up to HELD_OUT are for scores while it learns
_WATCHED: Final = 990_000
_STATISTICS: Final = 950_000  # first seed that moments of latents are taken over

Shapes = tuple[tuple[float, int, int, int], ...]
"""(share, clips, frames, frames before them) of the kinds of batch of a part of the schedule."""

_SHORT: Final[Shapes] = ((0.10, 12, 1, 0), (0.35, 4, 5, 0), (0.40, 3, 9, 0), (0.15, 2, 17, 0))
_LONG: Final[Shapes] = ((0.10, 12, 1, 0), (0.65, 2, 17, 0), (0.25, 2, 33, 0))
_LONGER: Final[Shapes] = (
    (0.10, 12, 1, 0), (0.35, 2, 17, 0), (0.35, 2, 33, 0),
    (0.07, 2, 16, 17), (0.07, 2, 16, 33), (0.06, 2, 16, 65),
)  # fmt: skip


class VaeLearner:
    """sizes: the constructor arguments of the VAE; steps: of the whole schedule; watched: (frames, clips)
    that it is scored on."""

    title = "VAE"

    def __init__(
        self,
        sizes: Mapping[str, Any],
        seed: int,
        steps: int,
        score_every: int,
        watched: tuple[tuple[int, int], ...] = ((33, 12), (81, 4)),
    ) -> None:
        self.seed, self.steps, self.score_every, self._watched = seed, steps, score_every, watched
        self.vae = _fresh(sizes, seed)
        self._codec = fast_on_cpu(WanVae(self.vae))
        matrices = [
            parameter
            for name, parameter in self.vae.named_parameters()
            if parameter.ndim >= 4 and parameter.shape[0] > 1 and name.endswith("weight")
            if not any(part in name for part in _NOT_MATRICES)
        ]
        chosen = set(map(id, matrices))
        self._others = [each for each in self.vae.parameters() if id(each) not in chosen]
        adam = torch.optim.AdamW(self._others, lr=_ADAM_RATE, betas=(0.9, 0.98), weight_decay=0)
        self._moved = Moved({"vae": self.vae}, [Muon(matrices), adam])
        self._weight = torch.from_numpy(1 + 2 * mouth_window(SIZE)).float()
        self._keep = keep_map(mask_tensor(mouth_mask()), (SIZE, SIZE))[0, 0]

    def step(self, number: int) -> float:
        """L1 + 3 MSE, the mouth weighed three times, and a penalty of latents that grow beyond variance 1."""
        self.vae.train()
        video, before, noise = self._batch(number)
        latents, made = self._coded(video, before, noise)
        error = made - video[:, :, before:]
        loss = ((error.abs() + 3 * error.square()) * self._weight).mean()
        loss = loss + 1e-3 * (latents.square().mean() - 1).clamp(min=0)
        progress = number / self.steps
        rate = min(1.0, (number + 1) / 20) * min(1.0, 2 * (1 - progress) + 0.01)
        self._moved.move(loss, rate, self._others)
        return float(loss.detach())

    def score(self) -> dict[str, float]:
        """PSNR in dB, and r of the mouth's height and its true opening, by the frames of a clip."""
        self.vae.eval()
        found: dict[str, float] = {}
        for frames, count in self._watched:
            clips = [clip(_WATCHED + frames * 100 + k, frames) for k in range(count)]
            psnr, last, r = reconstruction(self.vae, clips)
            found |= {f"psnr_{frames}": psnr, f"psnr_last_{frames}": last, f"r_{frames}": r}
        return {name: round(value, 4) for name, value in found.items()}

    def good_enough(self, score: Mapping[str, float]) -> bool:
        wanted = {"psnr_33": 29.0, "r_33": 0.98, "psnr_81": 26.0}
        return all(score.get(name, 0.0) >= least for name, least in wanted.items())

    def tensors(self) -> dict[str, Tensor]:
        return self._moved.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._moved.load(tensors)

    def _batch(self, number: int) -> tuple[Tensor, int, Tensor]:
        """Clips of a step [B, 3, F, 64, 64], how many of their frames only fill the caches, and the noise of
        the latents that are learnt from."""
        rng = np.random.default_rng(stable_hash(self.seed, "vae batch", number))
        progress = number / self.steps
        kinds = _SHORT if progress < 0.25 else _LONG if progress < 0.6 else _LONGER
        _, count, frames, before = kinds[rng.choice(len(kinds), p=[share for share, *_ in kinds])]
        drawn = [clip(int(seed), before + frames).frames for seed in rng.integers(0, _SEEDS, count)]
        video = to_pixels(drawn)
        for index in range(count):
            if rng.random() < _MASKED:
                first = int(rng.random() < 0.5)
                video[index, :, first:] = torch.where(self._keep > 0, video[index, :, first:], HOLE)
        learnt = latent_frames(before + frames) - latent_frames(before)
        shape = (count, 16, learnt, SIZE // 8, SIZE // 8)
        noise = torch.randn(shape, generator=generator(self.seed, "vae noise", number))
        return video, before, _LATENT_NOISE * noise

    def _coded(self, video: Tensor, before: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of the frames behind `before`, and these frames again, both with a gradient."""
        encoding, decoding = _Caches(self.vae, "encoder"), _Caches(self.vae, "decoder")
        if before:
            with torch.no_grad():
                _decoded(self.vae, _encoded(self.vae, video[:, :, :before], encoding), decoding)
        latents = _encoded(self.vae, video[:, :, before:], encoding)
        return latents, _decoded(self.vae, latents + noise, decoding)


class _Caches:
    """What the causal convolutions of one side keep of the frames before; first: nothing yet."""

    def __init__(self, vae: AutoencoderKLWan, side: str) -> None:
        self.values: list[Any] = [None] * vae._cached_conv_counts[side]
        self.first = True


def _encoded(vae: AutoencoderKLWan, video: Tensor, caches: _Caches) -> Tensor:
    """The next frames [B, 3, F, H, W] of a clip -> means [B, 16, T, H / 8, W / 8]."""
    starts = (0, *range(1, video.shape[2], 4)) if caches.first else range(0, video.shape[2], 4)
    parts = []
    for start in starts:
        stop = start + (1 if caches.first else 4)
        parts.append(vae.encoder(video[:, :, start:stop], feat_cache=caches.values, feat_idx=[0]))
        caches.first = False
    return vae.quant_conv(torch.cat(parts, 2))[:, : vae.config.z_dim]


def _decoded(vae: AutoencoderKLWan, latents: Tensor, caches: _Caches) -> Tensor:
    """The next latents [B, 16, T, h, w] of a clip -> pixels [B, 3, F, 8 h, 8 w], not clamped."""
    hidden = vae.post_quant_conv(latents)
    parts = []
    for t in range(hidden.shape[2]):
        one = hidden[:, :, t : t + 1]
        decoded = vae.decoder(one, feat_cache=caches.values, feat_idx=[0], first_chunk=caches.first)
        parts.append(decoded)
        caches.first = False
    return torch.cat(parts, 2)


def _fresh(sizes: Mapping[str, Any], seed: int) -> AutoencoderKLWan:
    """Initialised for training: 3 x 3 x 3 kernels look at the newest frame."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}
    with seeded("cartoon vae", seed):
        vae = AutoencoderKLWan(**plain)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size == (3, 3, 3):
                module.weight[:, :, 2] *= 1.7
                module.weight[:, :, :2] *= 0.1
    return vae


def to_pixels(frames: list[np.ndarray]) -> Tensor:
    """Clips uint8 [F, H, W, 3] -> [B, 3, F, H, W] in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3)
    return stacked.to(torch.float32).contiguous() / 127.5 - 1


def to_bytes(pixels: Tensor) -> np.ndarray:
    """[B, 3, F, H, W] in [-1, 1] -> uint8 [B, F, H, W, 3]."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().numpy()


def reconstruction(vae: AutoencoderKLWan, clips: list[Clip]) -> tuple[float, float, float]:
    """PSNR of all frames, of the last ten (both of pixels in [0, 1], in dB), and the mean over clips of r of
    the mouth's measured height and its true opening. Clips of one length."""
    errors, scores = [], []
    for start in range(0, len(clips), 2):
        few = clips[start : start + 2]
        video = to_pixels([each.frames for each in few])
        with torch.no_grad():
            latents = _encoded(vae, video, _Caches(vae, "encoder"))
            made = _decoded(vae, latents, _Caches(vae, "decoder")).clamp(-1, 1)
        errors.append(((made - video) / 2).square().mean((1, 3, 4)))  # [B, F]
        for frames, each in zip(to_bytes(made), few, strict=True):
            scores.append(correlation(measure_mouth(frames)[0], each.speech.opening))
    error = torch.cat(errors)
    return _decibels(error), _decibels(error[:, -10:]), float(np.mean(scores))


def _decibels(error: Tensor) -> float:
    return float(-10 * torch.log10(error.mean()))


def latent_statistics(vae: AutoencoderKLWan, clips: int) -> dict[str, list[float]]:
    """Mean and deviation of the latents per channel, over clips of 33 frames, for the VAE's config."""
    parts = []
    for start in range(0, clips, 4):
        video = to_pixels([clip(_STATISTICS + k, 33).frames for k in range(start, min(start + 4, clips))])
        with torch.no_grad():
            parts.append(_encoded(vae, video, _Caches(vae, "encoder")).transpose(0, 1).flatten(1))
    values = torch.cat(parts, 1)
    return {"latents_mean": values.mean(1).tolist(), "latents_std": values.std(1).tolist()}
