"""A move that fails in the middle: the finished part stays, and the next job knows nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from avatarctl.cli import app
from avatarctl.pipelines.infer import load, write_video
from avatarctl.placement import units
from tests.helpers_video import count_frames
from tests.placement.test_modes import BLOCKS, CHUNKS, made, plan_of

GROUP = ("memory.mode=group", "memory.group_blocks=2")
PASSES_OF_ONE_CHUNK = 1 + 2
"""Over the blocks: keys and values of the text, two steps."""


def fails(monkeypatch: pytest.MonkeyPatch, at: int, error: Exception) -> None:
    """The copy number `at`, counted from 0; those behind it work again."""
    copied, count = units._copied, iter(range(1 << 30))

    def failing(flat: Tensor, device: torch.device) -> Tensor:
        if next(count) == at:
            raise error
        return copied(flat, device)

    monkeypatch.setattr(units, "_copied", failing)


def test_the_finished_part_stays_and_the_next_job_is_as_if_nothing_had_been(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the second group of a step of the second chunk, while the first is still there: with the same
    networks, and with others of the same process."""
    plan = plan_of(*CHUNKS, *GROUP)
    modules: Any = load(plan)
    groups = BLOCKS[CHUNKS] // 2
    with monkeypatch.context() as patched:
        fails(patched, groups * PASSES_OF_ONE_CHUNK + 2, RuntimeError("the bus is gone"))
        with pytest.raises(RuntimeError, match="the bus is gone"):
            write_video(plan, tmp_path / "a.mp4", modules=modules)
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial.mp4"]
    assert count_frames(tmp_path / "a.partial.mp4") == 9
    expected = made(plan_of(*CHUNKS))
    assert torch.equal(made(plan, modules), expected)
    assert torch.equal(made(plan), expected)
    assert modules.loads == ["text", "vae", "audio", "dit", "text", "dit"], (
        "small ones stay, large ones change"
    )


def test_a_device_that_goes_away_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fails(monkeypatch, 2, torch.AcceleratorError("CUDA error: device lost\nCompile with ..."))
    words = ["infer", "--memory", "group", "--steps", "1", "--out", str(tmp_path / "a.mp4")]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 4 and not list(tmp_path.iterdir())
    assert ended.stderr.splitlines()[-1].startswith(
        "error: runtime.device: the device failed or went away: CUDA error: device lost ("
    )
