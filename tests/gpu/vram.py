"""What `vram-profile` predicts beside what a card says; run by hand: `python tests/gpu/vram.py`.

Networks of published sizes are made on the card, one small number in place of weights, so no file is needed.
Each row is one run of the profiler's own code, once on fake tensors and once on the card: live bytes as
predicted and as counted, what the allocator gave out and what it reserved; then each phase, and what the
largest is made of. Prints the allowance of the worst row; exits 1 where predicted and counted bytes of a run
or a phase differ by more than 2 %. A row that does not fit says so and counts as failed. Unverified until it
ran; meant for 80 GB and more, and eight minutes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch

from avatarctl.profiling.account import ALLOWANCE, Account
from avatarctl.profiling.inference import profile_inference
from avatarctl.profiling.training import profile_training
from avatarctl.registry import configure, find_model

VIDEO = (
    "model.channels=49", "model.audio_offset=0", "data.width=512", "data.height=512", "data.num_frames=81",
)  # fmt: skip
ROWS = (
    ("infer", "omniavatar-14b", ("long_video.num_frames=81",)),
    ("train", "omniavatar-14b", VIDEO),
    ("train", "omniavatar-14b", (*VIDEO, "aux.losses=sync,lpips,trepa")),
)
CLOSE = 0.02


def counted(job: str, model: str, words: tuple[str, ...], mode: Any, device: str) -> Account:
    row, cfg = find_model(model), configure(f"model.name={model}", *words)
    if job == "train":
        return profile_training(row, cfg, mode, device=device)
    cfg = replace(cfg, output=replace(cfg.output, width=512, height=512))
    return profile_inference(row, cfg, mode, device)


def compare(job: str, model: str, words: tuple[str, ...]) -> tuple[bool, float]:
    """Prints one line; whether the prediction was close, and the share that the allocator takes beside it."""
    what = f"| {job} {model}{' with auxiliary losses' if 'aux' in words[-1] else ''} |"
    fake = counted(job, model, words, "fake", "cpu")
    predicted = fake.live_bytes
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        real = counted(job, model, words, "real", "cuda")
    except torch.OutOfMemoryError:
        print(f"{what} {predicted / 2**30:.2f} | out of memory | | |", flush=True)
        return False, 0.0
    live = real.live_bytes
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    shown = " | ".join(f"{size / 2**30:.2f}" for size in (predicted, live, allocated, reserved))
    print(f"{what} {shown} |", flush=True)
    close = abs(live / predicted - 1) <= CLOSE
    for stage, size in real.stages.items():
        told = fake.stages.get(stage, 0)
        close &= abs(told - size) <= CLOSE * size
        print(f"|   {stage} | {told / 2**30:.2f} | {size / 2**30:.2f} | | |", flush=True)
    names = sorted({**fake.components, **real.components})
    parts = [f"{name} {fake.components.get(name, 0)} / {real.components.get(name, 0)}" for name in names]
    print(f"|   at the largest, bytes: {'; '.join(parts)} | | | | |", flush=True)
    return close, reserved / live - 1


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked")
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| run | predicted live GiB | counted live | allocated | reserved |")
    print("|---|---|---|---|---|")
    found = [compare(*row) for row in ROWS]
    worst = max(share for _, share in found)
    print(f"\nallowance that these rows would take: {worst:.3f}; the account has {ALLOWANCE}")
    return int(not all(close for close, _ in found))


if __name__ == "__main__":
    sys.exit(main())
