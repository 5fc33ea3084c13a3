"""The wav2vec 2.0 encoder of the cartoon world, from nothing: it learns which symbol is spoken in each frame,
and is frozen then, as the published encoder is a recogniser that stays frozen (spec/cartoon-world.md 4).

Shapes: B voices, F pixel frames, A features per frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Wav2Vec2Config

from avatarctl.demo.making.learning import Moved, seeded
from avatarctl.demo.voices import SYMBOLS, Speech, speech
from avatarctl.models.wav2vec import FrameWav2Vec2, normalise_waveform
from avatarctl.rng import stable_hash

__all__ = ["AudioLearner", "feature_statistics"]

_RATE: Final = 2e-3
_LENGTHS: Final = (33, 49, 97)
_VOICES: Final = 32  # of 33 frames in a step; fewer of longer ones
_NOISE: Final = (-4.0, -1.5)  # powers of ten, of what is added, relative to the voice
_SEEDS: Final = 900_000
_WATCHED: Final = 990_000
_STATISTICS: Final = 950_000  # first seed that moments of features are taken over

_NOTHING_RANDOM: Final[Mapping[str, Any]] = {
    "hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0,
    "final_dropout": 0.0, "layerdrop": 0.0, "apply_spec_augment": False,
}  # fmt: skip


class AudioLearner:
    """sizes: arguments of `Wav2Vec2Config`; watched: voices that it is scored on."""

    title = "audio encoder"

    def __init__(
        self, sizes: Mapping[str, Any], seed: int, steps: int, score_every: int, watched: int = 32
    ) -> None:
        self.seed, self.steps, self.score_every, self._watched = seed, steps, score_every, watched
        with seeded("cartoon audio", seed):
            self.encoder = FrameWav2Vec2(Wav2Vec2Config(**{**sizes, **_NOTHING_RANDOM}))
            self._head = nn.Linear(sizes["hidden_size"], len(SYMBOLS))
        parts: dict[str, nn.Module] = {"encoder": self.encoder, "head": self._head}
        self._parameters = [each for part in parts.values() for each in part.parameters()]
        adam = torch.optim.AdamW(self._parameters, lr=_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        self._moved = Moved(parts, [adam])

    def step(self, number: int) -> float:
        rng = np.random.default_rng(stable_hash(self.seed, "audio batch", number))
        frames = int(rng.choice(_LENGTHS))
        seeds = rng.integers(0, _SEEDS, _VOICES * _LENGTHS[0] // frames)
        spoken = [speech(int(seed), frames) for seed in seeds]
        voices = np.stack([each.audio for each in spoken])
        loud = voices.std(1, keepdims=True) * 10 ** rng.uniform(*_NOISE, (len(voices), 1))
        logits = self._logits((voices + loud * rng.standard_normal(voices.shape)).astype(np.float32), frames)
        loss = F.cross_entropy(logits.flatten(0, 1), _symbols(spoken).flatten())
        rate = min(1.0, (number + 1) / 30) * max(0.02, 1 - number / self.steps)
        self._moved.move(loss, rate, self._parameters)
        return float(loss.detach())

    def score(self) -> dict[str, float]:
        """Share of frames whose symbol is known, of voices that it does not learn from."""
        spoken = [speech(_WATCHED + k, 97) for k in range(self._watched)]
        with torch.no_grad():
            found = self._logits(np.stack([each.audio for each in spoken]), 97).argmax(-1)
        return {"accuracy": round(float((found == _symbols(spoken)).float().mean()), 4)}

    def good_enough(self, score: Mapping[str, float]) -> bool:
        return score["accuracy"] >= 0.985

    def tensors(self) -> dict[str, Tensor]:
        return self._moved.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._moved.load(tensors)

    def _logits(self, voices: np.ndarray, frames: int) -> Tensor:
        """Audio [B, 640 F] -> [B, F, symbols]. The last state on the grid of frames, as
        `FrameWav2Vec2.features` has it, but with a gradient."""

        def to_frames(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return F.interpolate(output, size=frames, mode="linear", align_corners=True)

        handle = self.encoder.feature_extractor.register_forward_hook(to_frames)
        try:
            states = self.encoder(_normalised(voices)).last_hidden_state
        finally:
            handle.remove()
        logits: Tensor = self._head(states)
        return logits


def feature_statistics(encoder: FrameWav2Vec2, voices: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the features over voices, each [A]."""
    encoder.eval()
    parts = []
    for start in range(0, voices, 25):
        few = [speech(_STATISTICS + k, 97).audio for k in range(start, min(start + 25, voices))]
        parts.append(encoder.features(_normalised(np.stack(few)), 97).flatten(0, 1))
    seen = torch.cat(parts)
    return seen.mean(0), seen.std(0) + 1e-4


def _normalised(voices: np.ndarray) -> Tensor:
    each = [normalise_waveform(torch.from_numpy(one), float(one.mean()), float(one.var())) for one in voices]
    return torch.stack(each)


def _symbols(spoken: list[Speech]) -> Tensor:
    return torch.from_numpy(np.stack([each.symbol for each in spoken]))
