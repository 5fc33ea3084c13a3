"""A run whose weights alone are too large in every memory mode ends at once, before anything is counted."""

from __future__ import annotations

import time
from typing import Any

import pytest

from avatarctl.cli import memory_mode
from avatarctl.errors import DoesNotFit
from avatarctl.events import silent
from avatarctl.placement.host import HostMemory
from tests.placement.test_modes import CHUNKS, plan_of


def test_no_mode_has_room_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the built-in model: text encoder, VAE and audio encoder, beside the transformer or what is here of
    it; on a CPU what waits counts as well."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("counted")

    monkeypatch.setattr("avatarctl.profiling.inference.profile_inference", never)
    plan = plan_of(*CHUNKS, "runtime.device=cpu")
    parts = {seat.name: seat.weights for seat in plan.seating.seats}
    least = parts["transformer"] + parts["VAE"] + parts["audio encoder"]
    for free, refused in ((least // 2, True), (least - 1, True), (least, False)):
        memory = HostMemory(1 << 40, free, "the container (/sys/fs/cgroup/job/memory.max)")
        monkeypatch.setattr(memory_mode, "host_memory", lambda memory=memory: memory)
        begun = time.process_time()
        if refused:
            with pytest.raises(
                DoesNotFit, match=r"^the container .*weights alone take .* needs the least, and"
            ):
                memory_mode.settled(plan, {}, silent)  # type: ignore[arg-type]
            assert time.process_time() - begun < 1
        else:
            with pytest.raises(AssertionError, match="counted"):
                memory_mode.settled(plan, {}, silent)  # type: ignore[arg-type]
