"""What the log says of auxiliary losses is of the samples that were judged, however a step is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from avatarctl.data.training_set import TrainingSample
from avatarctl.training.aux_losses import AuxLosses
from avatarctl.training.trainer import Trainer
from tests.repeats import repeats


class Halved(nn.Module):
    """In place of the transformer: what it is given, times a number."""

    def forward(self, x: Tensor, *_: Tensor, mode: str) -> Tensor:
        return x[:, :16] * self.weight

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))


class Told(AuxLosses):
    """Judges who look at nothing but the number of the first frame, which a test has drawn."""

    def __call__(  # type: ignore[override]
        self, frames: Tensor, real: Tensor, waveform: Tensor | None, first_frame: Sequence[int], align: object
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        value = frames.mean((1, 2, 3, 4)) * 0 + torch.tensor([start + 1.0 for start in first_frame])
        return {"lpips": value}, {"sync_cosine": value.detach() / 100}


def logged(trainer: Trainer) -> tuple[dict[str, float], float]:
    """Numbers of a step, and the gradient of the one weight."""
    trainer.network.dit = Halved()
    assert trainer.aux is not None
    trainer.aux.losses.__class__ = Told
    trainer.aux._decode = lambda latents, starts, frames: latents[:, :3, :1]  # type: ignore[method-assign]
    numbers = trainer.accumulate([s for s in trainer.data.read(range(4)) if isinstance(s, TrainingSample)])
    gradient = trainer.network.dit.weight.grad
    assert gradient is not None
    return numbers, float(gradient)


def test_the_log_is_of_the_judged_samples_however_a_step_is_cut(trainer_of: Callable[..., Trainer]) -> None:
    words = ("aux.losses=lpips", "aux.frames=5", "aux.max_sigma=0.85")
    found = [
        logged(trainer_of(*words, f"train.batch_size={size}", f"train.gradient_accumulation={4 // size}"))
        for size in repeats([4, 2], [1])
    ]
    numbers = found[0][0]
    assert 0 < numbers["judged"] < 1, "some samples are judged, and some not"
    assert numbers["lpips"] >= 1, "a sample that was not judged has no loss of 0"
    assert numbers["sync_cosine"] == pytest.approx(numbers["lpips"] / 100)
    for others, gradient in found[1:]:
        assert others == pytest.approx(numbers, rel=1e-5) and set(others) == set(numbers)
        assert gradient == pytest.approx(found[0][1], rel=1e-4)


def test_a_step_without_a_judged_sample_says_nothing_of_losses(trainer_of: Callable[..., Trainer]) -> None:
    words = ("aux.losses=lpips", "aux.max_sigma=0.000001", "train.batch_size=4")
    numbers, _ = logged(trainer_of(*words))
    assert numbers["judged"] == 0 and not {"lpips", "sync_cosine"} & set(numbers)
