"""What is encoded while training is kept where there is room, and is the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from avatarctl.data import training_set
from avatarctl.data.training_set import TrainingSample, TrainingSet
from avatarctl.events import silent
from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.registry import configure, find_model

TURNS = (0, 1, 1, 0, 1)


def read(data: Path, *words: str, turns: tuple[int, ...] = TURNS) -> list[TrainingSample]:
    cfg = configure(
        "model.name=cartoon-v2v", f"data.path={data}", "data.width=32", "data.height=32",
        "data.num_frames=9", *words,
    )  # fmt: skip
    made = TrainingSet(cfg, find_model("cartoon-v2v"), OmniAvatar(), silent)  # type: ignore[arg-type]
    made.check()
    made.prepare()
    return [sample for sample in made.read(turns) if isinstance(sample, TrainingSample)]


@pytest.mark.parametrize(("room", "encodings"), [(None, 2), ("one", 4), (0, 5)])
def test_a_sample_is_encoded_once_where_there_is_room(
    room: int | str | None, encodings: int, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers stand in for what encoders say, other ones in each call."""
    calls: list[int] = []

    def encode(self: OmniAvatar, modules: Any, clip: Any, wanted: Any, cfg: Any) -> dict[str, torch.Tensor]:
        shown = {name for name in wanted if name != "text"}
        calls.extend([1] * bool(shown))
        return {name: torch.full((64,), float(len(calls))) for name in wanted}

    monkeypatch.setattr(OmniAvatar, "encode_clip", encode)
    monkeypatch.setattr(OmniAvatar, "constants", lambda *_: {})
    if room is not None:  # three artifacts of 64 numbers of 2 bytes
        monkeypatch.setattr(training_set, "_KEPT_BYTES", 3 * 64 * 2 if room == "one" else room)
    found = read(samples)
    assert len(found) == len(TURNS) and len(calls) == encodings
    if room is None:
        assert [float(sample.tensors["latents"][0]) for sample in found] == [1, 2, 2, 1, 2]


def test_what_is_kept_is_what_is_encoded_anew(samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = read(samples, turns=(0, 0))
    monkeypatch.setattr(training_set, "_KEPT_BYTES", 0)
    for ours, anew in zip(kept, read(samples, "data.workers=1", turns=(0, 0)), strict=True):
        assert ours.name == anew.name and ours.tensors.keys() == anew.tensors.keys()
        assert all(torch.equal(ours.tensors[name], anew.tensors[name]) for name in ours.tensors)
        assert all(tensor.dtype == torch.float32 for tensor in ours.tensors.values())
