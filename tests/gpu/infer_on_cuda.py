"""What only a CUDA device can show of `infer`; run by hand: `python tests/gpu/infer_on_cuda.py`.

Compares the untrained models, one of each family, on the GPU with the CPU (same noise by construction), tries
every attention kernel, and reports peak device memory. Prints one table; exits 1 when a comparison fails.
"""

from __future__ import annotations

import sys

import torch

from avatarctl.demo.sample import sample_audio, sample_image
from avatarctl.errors import ExtraMissing
from avatarctl.pipelines.infer import generate
from avatarctl.pipelines.job import Job, check_job
from avatarctl.registry import configure, find_model

# By model, the settings that are compared: all branches, and those of fused windows together as well.
MODELS = {
    "cartoon-i2v": ((),),
    "stableavatar-tiny": ((), ("sampling.batch_branches=true", "long_video.schedule=wavefront")),
}
# float32 matmuls on tensor cores (TF32) stay off by default, so float32 must agree closely; bfloat16 rounds
# every activation to 8 bits and the untrained network amplifies it over steps and chunks.
LIMITS = {"float32": 1e-2, "bfloat16": 0.5}


def frames(model: str, *settings: str) -> torch.Tensor:
    row = find_model(model)
    job = Job(sample_image(), sample_audio(2.0), "a person is talking", "")
    plan = check_job(configure(f"model.name={model}", *settings), row, job, lambda event: None)
    return torch.cat([block.pixels.cpu() for block in generate(plan)], dim=1)


def compare(model: str, expected: torch.Tensor, dtype: str, kernel: str, *settings: str) -> bool:
    """Prints one line; whether it is within its limit, or the kernel is not there."""
    what = f"| {model} {' '.join(settings)} | {dtype} | {kernel} |"
    torch.cuda.reset_peak_memory_stats()
    try:
        got = frames(
            model, "runtime.device=cuda", f"runtime.dtype={dtype}", f"runtime.attention={kernel}", *settings
        )
    except ExtraMissing as missing:
        print(f"{what} {missing} | | |")
        return True
    difference = (got - expected).abs().mean().item()
    peak = torch.cuda.max_memory_allocated() / 1e6
    print(f"{what} {difference:.3g} | {LIMITS[dtype]} | {peak:.0f} |")
    return difference <= LIMITS[dtype]


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked")
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| model | dtype | attention | mean difference from CPU float32 | limit | peak MB |")
    print("|---|---|---|---|---|---|")
    kept = True
    for model, variants in MODELS.items():
        expected = frames(model, "runtime.device=cpu")
        for settings in variants:
            for dtype in LIMITS:
                for kernel in ("auto", "native", "flash", "flash3", "sage"):
                    kept &= compare(model, expected, dtype, kernel, *settings)
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
