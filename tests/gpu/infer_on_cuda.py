"""What only a CUDA device can show of `infer`; run by hand: `python tests/gpu/infer_on_cuda.py`.

Compares the built-in model on the GPU with the CPU (same noise by construction), tries every attention
kernel, and reports peak device memory. Prints one table; exits 1 when a comparison fails.
"""

from __future__ import annotations

import sys

import torch

from avatarctl.demo.sample import sample_picture, sample_sound
from avatarctl.errors import ExtraMissing
from avatarctl.pipelines.infer import generate
from avatarctl.pipelines.job import Job, check_job
from avatarctl.registry import configure, find_model

ROW = find_model("cartoon-i2v")
# float32 matmuls on tensor cores (TF32) stay off by default, so float32 must agree closely; bfloat16 rounds
# every activation to 8 bits and the untrained network amplifies it over steps and chunks.
LIMITS = {"float32": 1e-2, "bfloat16": 0.5}


def frames(*settings: str) -> torch.Tensor:
    job = Job(sample_picture(), sample_sound(2.0), "a person is talking", "")
    plan = check_job(configure(*settings), ROW, job, lambda event: None)
    return torch.cat([block.pixels.cpu() for block in generate(ROW, job, plan)], dim=1)


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked")
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| dtype | attention | mean difference from CPU float32 | limit | peak MB |")
    print("|---|---|---|---|---|")
    expected = frames("runtime.device=cpu")
    failed = False
    for dtype, limit in LIMITS.items():
        for kernel in ("auto", "native", "flash", "flash3", "sage"):
            torch.cuda.reset_peak_memory_stats()
            try:
                got = frames("runtime.device=cuda", f"runtime.dtype={dtype}", f"runtime.attention={kernel}")
            except ExtraMissing as missing:
                print(f"| {dtype} | {kernel} | {missing} | | |")
                continue
            difference = (got - expected).abs().mean().item()
            failed |= not difference <= limit
            peak = torch.cuda.max_memory_allocated() / 1e6
            print(f"| {dtype} | {kernel} | {difference:.3g} | {limit} | {peak:.0f} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
