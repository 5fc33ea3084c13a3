"""How fast the built-in VAE is on a CPU: PyTorch's own choice of convolution, oneDNN, half precision.

    python tests/bench/cpu_convolution.py [--half]

Milliseconds per frame of 33 frames of 64x64, best of 3, and the largest difference of a pixel to float32 as
PyTorch convolves, in a range of 2. --half takes minutes on processors without bfloat16 instructions.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable

import torch
from reporting import print_table

from avatarctl.demo.sample import sample_audio, sample_image
from avatarctl.events import silent
from avatarctl.models.vae import WanVae
from avatarctl.pipelines.infer import load
from avatarctl.pipelines.job import Job, check_job
from avatarctl.registry import configure, find_model

FRAMES, LATENTS = 33, 9


def best(call: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Milliseconds per frame, and the result."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - began)
    return 1000 * min(times[1:]) / FRAMES, result


def main() -> int:
    cfg, row = configure("model.name=cartoon-i2v"), find_model("cartoon-i2v")
    plan = check_job(cfg, row, Job(sample_image(), sample_audio(0.2), "", ""), silent)
    fast = load(plan, ("vae",)).vae
    assert isinstance(fast, WanVae)
    plain = copy.deepcopy(fast)
    for module in plain.modules():
        if isinstance(module, torch.nn.Conv3d):
            del module._conv_forward  # the instance's own, so that the class's is used again
            module.weight.data = module.weight.data.contiguous()
    cases = {"float32 as PyTorch convolves": plain, "float32 by oneDNN (what runs)": fast}
    if "--half" in sys.argv:
        cases["bfloat16 as PyTorch convolves"] = copy.deepcopy(plain).bfloat16()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, LATENTS, 8, 8, generator=generator)
    video = torch.rand(1, 3, FRAMES, 64, 64, generator=generator) * 2 - 1
    rows, first = [], None
    for name, codec in cases.items():
        decoding, pixels = best(lambda codec=codec: codec.decode(latents))
        encoding, _ = best(lambda codec=codec: codec.encode(video))
        first = pixels if first is None else first
        rows.append(
            (name, f"{decoding:.1f}", f"{encoding:.1f}", f"{float((pixels - first).abs().max()):.1e}")
        )
    print_table("cpu_convolution: the VAE on this CPU", ("", "decode", "encode", "difference"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
