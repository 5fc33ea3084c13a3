"""The judge of the sync loss in the cartoon world: StableSyncNet with small widths, from nothing. It learns
to tell the audio of 16 frames from audio of another time and of another voice (spec/losses-and-eval.md 1).

Frames are drawn, then blurred and darkened by chance, as those that a VAE decodes are softer than drawn ones.
A face of the cartoon world is its own aligned face: detectors of people's faces do not know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avatarctl.conditioning.mel import frame_mel
from avatarctl.demo.clips import Clip, clip
from avatarctl.demo.making.learning import Moved, seeded
from avatarctl.demo.making.vae_learner import to_pixels
from avatarctl.models.stable_syncnet import StableSyncNet
from avatarctl.rng import generator, stable_hash
from avatarctl.timeline import SAMPLES_PER_FRAME

__all__ = ["JudgeLearner", "right_cosines"]

_RATE: Final = 1e-3
_FRAMES: Final = 40
_APART: Final = 5
"""Frames that wrong audio of the same clip is away at least: nearer, nobody could tell."""
_SEEDS: Final = 900_000
_WATCHED: Final = 991_000


class JudgeLearner:
    """sizes: arguments of `StableSyncNet`; clips: of a step; watched: those that it is scored on."""

    title = "judge"

    def __init__(
        self,
        sizes: Mapping[str, Any],
        seed: int,
        steps: int,
        score_every: int,
        clips: int = 16,
        watched: int = 48,
    ) -> None:
        self.seed, self.steps, self.score_every = seed, steps, score_every
        self._clips, self._watched = clips, watched
        with seeded("cartoon judge", seed):
            self.judge = StableSyncNet(**sizes)
        self._parameters = list(self.judge.parameters())
        adam = torch.optim.AdamW(self._parameters, lr=_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        self._moved = Moved({"judge": self.judge}, [adam])

    def step(self, number: int) -> float:
        """Binary cross-entropy of the cosine as the probability that frames and audio fit; of each clip one
        window with its audio, one with that of another time, one with another clip's."""
        rng = np.random.default_rng(stable_hash(self.seed, "judge batch", number))
        clips = [clip(int(seed), _FRAMES) for seed in rng.integers(0, _SEEDS, self._clips)]
        frames, right, wrong = _windows(clips, rng, self.judge.frames)
        frames = _softened(frames, generator(self.seed, "judge frames", number))
        others = right.roll(1, 0)
        of_frames = self.judge.visual_encoder(self.judge.lower_faces(frames).transpose(1, 2).flatten(1, 2))
        audio = torch.cat([right, wrong, others])
        of_audio = self.judge.audio_encoder(frame_mel(audio, self.judge.frames))
        cosines = F.cosine_similarity(of_frames.flatten(1).repeat(3, 1), of_audio.flatten(1), dim=1, eps=1e-8)
        count = self._clips
        fits = torch.cat([torch.ones(count), torch.zeros(2 * count)])
        # As many right ones as wrong ones.
        weight = torch.cat([torch.full((count,), 2.0), torch.ones(2 * count)])
        loss = F.binary_cross_entropy(cosines.clamp(1e-4, 1 - 1e-4), fits, weight)
        progress = number / self.steps
        rate = min(1.0, (number + 1) / 50) * max(0.02, min(1.0, 2 * (1 - progress)))
        self._moved.move(loss, rate, self._parameters)
        return float(loss.detach())

    def score(self) -> dict[str, float]:
        """Share of pairs of unseen clips in which the right audio has the higher cosine."""
        self.judge.eval()
        rng = np.random.default_rng(7)
        clips = [clip(_WATCHED + k, _FRAMES) for k in range(self._watched)]
        found = right_cosines(self.judge, clips, rng)
        self.judge.train()
        return {"accuracy": round(found, 4)}

    def good_enough(self, score: Mapping[str, float]) -> bool:
        return score["accuracy"] >= 0.97

    def tensors(self) -> dict[str, Tensor]:
        return self._moved.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._moved.load(tensors)


@torch.no_grad()
def right_cosines(judge: StableSyncNet, clips: list[Clip], rng: np.random.Generator, times: int = 4) -> float:
    """Share of pairs in which a window's own audio has a higher cosine than audio at least five frames away;
    `times` windows of each clip."""
    better = []
    for _ in range(times):
        frames, right, wrong = _windows(clips, rng, judge.frames)
        lower = judge.lower_faces(frames)
        of_right, of_wrong = (
            F.cosine_similarity(of_frames, of_audio, dim=1)
            for of_frames, of_audio in (
                judge(lower, frame_mel(audio, judge.frames)) for audio in (right, wrong)
            )
        )
        better.append((of_right > of_wrong).float().mean())
    return float(torch.stack(better).mean())


def _windows(clips: list[Clip], rng: np.random.Generator, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """A window of each clip: frames [B, 3, length, 64, 64], its audio and audio of another time [B, n]."""
    frames: list[np.ndarray] = []
    right: list[np.ndarray] = []
    wrong: list[np.ndarray] = []
    last = _FRAMES - length
    for each in clips:
        start = int(rng.integers(0, last + 1))
        others = [at for at in range(last + 1) if abs(at - start) >= _APART]
        other = others[int(rng.integers(len(others)))]
        frames.append(each.frames[start : start + length])
        for into, at in ((right, start), (wrong, other)):
            into.append(each.speech.audio[at * SAMPLES_PER_FRAME : (at + length) * SAMPLES_PER_FRAME])
    audio = (torch.from_numpy(np.stack(each)) for each in (right, wrong))
    return to_pixels(frames), *audio  # type: ignore[return-value]


def _softened(frames: Tensor, chance: torch.Generator) -> Tensor:
    """Blurred by up to 1.5 pixels, and up to a tenth darker or brighter, each clip by its own."""
    softened = []
    for one in frames:
        sigma, gain = torch.rand(2, generator=chance).tolist()
        at = torch.arange(-3, 4, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (at / max(1.5 * sigma, 0.05)) ** 2)
        kernel = kernel / kernel.sum()
        flat = one.transpose(0, 1).flatten(0, 1)[:, None]  # [3 n, 1, H, W]
        flat = F.conv2d(F.pad(flat, (3, 3, 0, 0), "replicate"), kernel.view(1, 1, 1, 7))
        flat = F.conv2d(F.pad(flat, (0, 0, 3, 3), "replicate"), kernel.view(1, 1, 7, 1))
        soft = flat[:, 0].view(one.shape[1], 3, *one.shape[2:]).transpose(0, 1)
        softened.append(((soft + 1) * (0.9 + 0.2 * gain) - 1).clamp(-1, 1))
    return torch.stack(softened)
