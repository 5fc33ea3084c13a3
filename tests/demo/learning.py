"""A fresh transformer that learns to talk from the built-in VAE and audio encoder, by the trainer of `train`
and small enough for a test; and the same without what it should learn from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import save

from avatarctl.atomic import atomic_write_bytes
from avatarctl.conditioning.masking import mouth_mask
from avatarctl.data.training_set import TrainingSample
from avatarctl.demo import benchmark as scores
from avatarctl.demo.clips import HELD_OUT
from avatarctl.demo.making import drawn_set
from avatarctl.demo.making.audio_learner import feature_statistics
from avatarctl.demo.making.drawn_set import DrawnSet
from avatarctl.demo.making.transformers import settings_of, shipped_weights, train_transformer, write_start
from avatarctl.errors import AvatarctlError
from avatarctl.events import silent
from avatarctl.families import family_named
from avatarctl.loading.modules import SomeModules, load_parts
from avatarctl.loading.sources import find_sources
from avatarctl.registry import Row, find_model

Audio = Literal["own", "exchanged", "none"]

FRAMES = 17
CLIPS = 200
LAYERS = 4
"""In place of the row's six: two thirds of the work of a step."""
_FIRST_SEED = 100_000
_SETTINGS: dict[str, Any] = {
    "train__max_steps": 380,
    "train__batch_size": 8,
    "train__learning_rate": 5e-3,
    "train__warmup_steps": 20,
    "train__ema": 0.98,
    "train__mouth_weight": 10.0,
    "train__prefix_frames": (1,),
    "train__prefix_noise": 0.0,
    "data__num_frames": FRAMES,
    "data__references": 0,
    "checkpoint__every": 10_000,
}


class Exchanged(DrawnSet):
    """Each clip of a step with the audio of the one before it."""

    def read(self, places: Iterable[int]) -> Iterator[TrainingSample | AvatarctlError]:
        held = list(super().read(places))
        for index, sample in enumerate(held):
            other = held[index - 1]
            assert isinstance(sample, TrainingSample) and isinstance(other, TrainingSample)
            yield replace(sample, tensors=self._with(sample, other.tensors["audio_features"]))

    def _with(self, sample: TrainingSample, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**sample.tensors, "audio_features": features}


class Cut(Exchanged):
    """Clips whose audio never arrives."""

    def _with(self, sample: TrainingSample, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**sample.tensors, "audio_features": torch.zeros_like(features)}


_DATA: dict[Audio, type[DrawnSet]] = {"own": DrawnSet, "exchanged": Exchanged, "none": Cut}


def learnt(folder: Path, audio: Audio = "own", **more: Any) -> Row:
    """The row of a model that learnt from `CLIPS` clips. more: settings, their dots two underscores."""
    row, device = find_model("cartoon-i2v"), torch.device("cpu")
    sizes = {**row.network["dit"], "num_layers": LAYERS}
    values = {**row.defaults, "long_video.num_frames": FRAMES, "long_video.overlap_frames": 1}
    row = replace(row, network={**row.network, "dit": sizes}, defaults=values)
    family: Any = family_named(row.family)
    Image.fromarray(mouth_mask()).save(folder / "mask.png")
    resolved = settings_of("i2v", row, 1, **{**_SETTINGS, "data__mask": str(folder / "mask.png"), **more})
    parts: Any = ("text", "vae", "audio")
    loaded = load_parts(row, find_sources(row, resolved.cfg.model), None, resolved.cfg, parts, device, silent)
    modules: Any = SomeModules(parts, loaded.get, device)
    write_start(folder / "start.safetensors", row, 1, *feature_statistics(modules.audio, 30))
    seeds, cfg = range(_FIRST_SEED, _FIRST_SEED + CLIPS), resolved.cfg
    data = _DATA[audio](folder / "clips", seeds, family, cfg, cfg, lambda: modules, "test", silent)
    data.make(lambda: False)
    started = replace(row, path=str(folder / "start.safetensors"))
    last = train_transformer("i2v", started, resolved, data, folder / "run", silent, lambda: False)
    trained = {name: tensor.contiguous() for name, tensor in shipped_weights(last, row).items()}
    atomic_write_bytes(folder / "trained.safetensors", save(trained))
    return replace(row, path=str(folder / "trained.safetensors"))


def scored(row: Row, clips: int) -> tuple[float, float]:
    """r of mouths with the audio that they were made with, and with another clip's, over held-out clips of
    33 frames, two chunks each."""
    found = scores.benchmark("i2v", row, range(HELD_OUT + 3000, HELD_OUT + 3000 + clips))
    return found["r_opening"]["mean"], found["r_shuffled"]["mean"]


def short() -> dict[Any, dict[str, Any]]:
    """What is replaced meanwhile so that little is drawn: attributes by module."""
    return {drawn_set: {"UTTERANCE": 33}, scores: {"_FRAMES": {**scores._FRAMES, "i2v": 33}}}
