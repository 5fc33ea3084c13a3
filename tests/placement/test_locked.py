"""What a card asks of the host, with a stand-in for its runtime: memory that is locked, and events."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from avatarctl.placement import units
from avatarctl.placement.place import in_groups
from avatarctl.placement.units import Moves


class _Runtime:
    """Locks so many buffers, then no more."""

    def __init__(self, room: int) -> None:
        self.room, self.locked, self.asked = room, dict[int, int](), list[int]()

    def cudaHostRegister(self, place: int, size: int, flags: int) -> int:  # noqa: N802
        self.asked.append(size)
        if len(self.locked) == self.room:
            return 2  # out of memory
        self.locked[place] = size
        return 0

    def cudaHostUnregister(self, place: int) -> int:  # noqa: N802
        del self.locked[place]
        return 0


@pytest.fixture
def blocks() -> nn.Module:
    """A network of five."""
    network = nn.Module()
    network.blocks = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(5))
    return network.requires_grad_(False)


def unit(runtime: _Runtime, monkeypatch: pytest.MonkeyPatch, block: nn.Module, moves: Moves) -> Any:
    monkeypatch.setattr(units, "_cuda_runtime", lambda: runtime)
    monkeypatch.setattr(units, "_forget_error", lambda: None)
    return units.Unit("block", [block], torch.device("cuda"), torch.device("cpu"), moves)


def test_exactly_what_waits_is_locked_and_unlocked_again(
    blocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2304 bytes, and no power of two."""
    runtime, moves = _Runtime(room=9), Moves()
    made = unit(runtime, monkeypatch, blocks.blocks[0], moves)
    assert runtime.asked == [24 * 24 * 4] == [made.nbytes] and moves.unpinned_bytes == 0
    assert list(runtime.locked.values()) == runtime.asked
    assert moves.pinned_bytes == moves.host_bytes == made.nbytes
    del made
    gc.collect()
    assert not runtime.locked and moves.pinned_bytes == 0 and moves.pinned_peak == 24 * 24 * 4


def test_what_the_system_does_not_lock_is_counted_and_works(
    blocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, moves = _Runtime(room=1), Moves()
    expected = blocks.blocks[1].weight.clone()
    held = [unit(runtime, monkeypatch, block, moves) for block in blocks.blocks[:2]]
    assert len(runtime.asked) == 2 and moves.unpinned_bytes == 24 * 24 * 4 == moves.host_bytes / 2
    assert moves.pinned_bytes == moves.unpinned_bytes
    held[1].device = torch.device("cpu")
    held[1].arrive()
    assert torch.equal(blocks.blocks[1].weight, expected)


def test_a_copy_begins_when_the_card_is_done_with_the_one_before(
    blocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a program that is far ahead of its card would have memory for many units at once."""
    told: list[str] = []

    class Event:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            told.append(f"done {self.number}")

    numbers = iter(range(9))
    monkeypatch.setattr(units, "_event", lambda device: Event(next(numbers)))
    copied = units._copied
    monkeypatch.setattr(units, "_copied", lambda flat, device: told.append("copy") or copied(flat, device))
    in_groups(blocks, torch.device("cpu"), group=1)
    x = torch.ones(24)
    for block in blocks.blocks:
        x = block(x)
    # The first and the second come at once; each further one when the second before it is not needed.
    assert told == ["copy", "copy", "done 0", "copy", "done 1", "copy", "done 2", "copy", "done 3", "copy"]
