"""What each memory mode of `infer` costs in time, on the built-in models.

    python tests/bench/memory_modes.py

CPU seconds of `generate` against mode full, medians of runs that take turns, one thread; beside it what was
copied, over the steps. On a CPU a copy is one from memory to memory, and nothing goes on
beside it: an accelerator copies over a slower way while it computes. Networks this small have a copy for
little computation, so that 14B pays less than they do. A network that leaves costs 0.2 s of the garbage
collector once, whatever its size. Two minutes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time
from typing import Any

import torch
from reporting import print_table

from avatarctl.demo.sample import sample_audio, sample_image
from avatarctl.events import silent
from avatarctl.pipelines.infer import generate, load
from avatarctl.pipelines.job import Job, JobPlan, check_job
from avatarctl.profiling.fakes import tensor_bytes
from avatarctl.registry import configure, find_model

MODELS = {"cartoon-i2v": ("long_video.strategy=chunks",), "stableavatar-tiny": ()}
MODES = {
    "`full`": ("memory.mode=full",),
    "`model`": ("memory.mode=model",),
    "`model`, one block away": ("memory.swap_blocks=1",),
    "`group`, 1 block": ("memory.mode=group", "memory.group_blocks=1"),
    "`sequential`": ("memory.mode=sequential",),
}
RUNS, SECONDS, STEPS = 5, 8.0, 4


def plan_of(model: str, *words: str) -> JobPlan:
    cfg = configure(f"model.name={model}", f"sampling.steps={STEPS}", *words)
    job = Job(sample_image(), sample_audio(SECONDS), "a person is talking", "")
    return check_job(cfg, find_model(model), job, silent)


def run(plan: JobPlan) -> tuple[float, float, float]:
    """CPU seconds, bytes copied, and bytes of the transformer."""
    started = time.process_time()
    modules: Any = load(plan)
    for _ in generate(plan, modules=modules):
        pass
    taken = time.process_time() - started
    moves = getattr(modules, "moves", None)
    return taken, moves.copied_bytes if moves else 0, tensor_bytes(modules.dit)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for model, settings in MODELS.items():
        plans = {told: plan_of(model, *settings, *words) for told, words in MODES.items()}
        taken: dict[str, list[float]] = {told: [] for told in plans}
        copied: dict[str, float] = {}
        for turn in range(RUNS + 1):
            for told, plan in plans.items():
                seconds, copied[told], _ = run(plan)
                if turn:  # the first is slower whatever it is
                    taken[told].append(seconds)
        whole = statistics.median(taken["`full`"])
        steps = STEPS * next(iter(plans.values())).video.count
        for told, times in taken.items():
            share = f"{copied[told] / 2**20 / steps:.1f}"
            rows.append((model, told, f"{statistics.median(times) / whole:.2f}", share))
    print_table(
        f"memory_modes: loading and {SECONDS} s of video, {STEPS} steps",
        ("model", "mode", "CPU s, against `full`", "MiB copied for a step"),
        rows,
    )


if __name__ == "__main__":
    main()
