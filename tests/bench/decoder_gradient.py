"""The decoder with a gradient, by `memory.vae_gradient`: bytes on fake tensors at full size, and what each
mode takes of a CPU with a small decoder.

    python tests/bench/decoder_gradient.py

The VAE of Wan 2.1 in float32, as training has it, 81 frames of 512x512, live bytes above its weights; both
include the frames, their gradient and the latents. Target of the leanest mode: 8 GiB. The seconds are of the
built-in VAE, 33 frames of 64x64, a forward and a backward pass, the fastest of three that take turns.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Final, get_args

import torch
from reporting import print_table, verdict

from avatarctl.host import HOST
from avatarctl.live_bytes import LiveBytes
from avatarctl.loading.built_in import build_on_meta, build_random_modules
from avatarctl.models.vae_gradient import VaeGradient, decode_with_gradient
from avatarctl.profiling.fakes import fill, tensor_bytes, tensors
from avatarctl.registry import find_model

MODES: Final[tuple[VaeGradient, ...]] = get_args(VaeGradient)
FRAMES, LATENTS, SIDE = 81, 21, 64
TARGET: Final = 8 * 2**30
TURNS: Final = 3


def bytes_of(mode: VaeGradient) -> tuple[int, int, int]:
    """Between the passes, at most, and at most on the host."""
    vae: Any = build_on_meta(find_model("omniavatar-14b"))["vae"]
    inside = tensors("fake")
    fill(vae, inside, lambda name, old: torch.float32)
    with inside, LiveBytes() as live:
        live.track(vae)
        weights = tensor_bytes(vae)
        latents = torch.zeros(1, 16, LATENTS, SIDE, SIDE, requires_grad=True)
        frames = decode_with_gradient(vae, latents, 0, FRAMES, mode, torch.device("meta"))
        between = live.current - weights
        frames.sum().backward()
        return between, live.peak - weights, live.host_peak


def seconds_of(vae: Any, mode: VaeGradient) -> float:
    latents = torch.zeros(1, 16, 9, 8, 8, requires_grad=True)
    started = time.process_time()
    decode_with_gradient(vae, latents, 0, 33, mode, HOST).sum().backward()
    return time.process_time() - started


def main() -> int:
    vae: Any = build_random_modules(find_model("cartoon-v2v")).vae
    turns = [{mode: seconds_of(vae, mode) for mode in MODES} for _ in range(TURNS)]
    took = {mode: min(turn[mode] for turn in turns) for mode in MODES}
    rows, least = [], 0
    for mode in MODES:
        sizes = bytes_of(mode)
        least = min(least or sizes[1], sizes[1])
        rows.append(
            (mode, *(f"{size / 2**30:.1f} GiB" for size in sizes), f"{took[mode] / took['full']:.2f}")
        )
    print_table(
        f"decoder_gradient: {FRAMES} frames of {8 * SIDE}x{8 * SIDE}, float32, above the weights, predicted",
        ("vae_gradient", "between the passes", "at most", "on the host", "CPU seconds, full = 1"),
        rows,
        f"The leanest takes {least / 2**30:.2f} GiB; target 8: {verdict(least, TARGET)}.",
    )
    return int(least > TARGET)


if __name__ == "__main__":
    sys.exit(main())
