"""When are the three branches of a step faster as one batch?

    python tests/bench/batched_branches.py

A step of StableAvatar over one window of 21 latent frames, random weights, two widths of network: one branch
after another against one batch, by the video tokens that a branch looks at. `sampling.batch_branches` batches
windows of up to 512 tokens by itself: beyond, even the small network no longer gains. An accelerator needs
more tokens to be busy, and may gain from `--batch-branches` beyond; memory for three branches is the price.

One thread; CPU seconds of a step, medians of runs that take turns.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch
from reporting import print_table

from avatarctl.models.stableavatar import PreparedStable, StableAvatarTransformer

FRAMES = 21
SIDES = (4, 6, 8, 10, 16, 24)  # of the latents
NETWORKS = {  # heads, width of a head, blocks, feed-forward
    "width 96, 2 blocks": (4, 24, 2, 192),
    "width 1536, 1 block of the published size": (12, 128, 1, 8960),
}
LONGEST = 1400  # tokens, for the wide network: its steps take seconds
RUNS, SECONDS = 5, 0.5


def network(heads: int, head_dim: int, layers: int, ffn_dim: int) -> StableAvatarTransformer:
    torch.manual_seed(0)
    return StableAvatarTransformer(
        num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, ffn_dim=ffn_dim,
        text_dim=32, image_dim=32, vocal_dim=48,
    ).eval()  # fmt: skip


def branches(dit: StableAvatarTransformer, side: int) -> dict[str, PreparedStable]:
    audio = dit(mode="prepare", vocal=torch.randn(1, 167, 48), frames=4 * FRAMES - 3).vocal
    shared = dit(mode="prepare", image=torch.randn(1, 257, 32), grid=(FRAMES, side, side))
    prompt, negative = (dit(mode="prepare", text=torch.randn(1, 512, 32)).text for _ in range(2))
    return {
        "silent_negative": replace(shared, text=negative),
        "negative": replace(shared, text=negative, vocal=audio),
        "full": replace(shared, text=prompt, vocal=audio),
    }


def seconds(dit: StableAvatarTransformer, side: int) -> dict[bool, float]:
    """CPU seconds of a step, one after another (False) and as one batch (True)."""
    hidden, t, ready = torch.randn(1, 36, FRAMES, side, side), torch.tensor([500.0]), branches(dit, side)
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(RUNS):
        for batched, times in taken.items():
            started, steps = time.process_time(), 0
            while (elapsed := time.process_time() - started) < SECONDS:
                dit(hidden, t, ready, mode="denoise", batched=batched)
                steps += 1
            times.append(elapsed / steps)
    return {batched: statistics.median(times) for batched, times in taken.items()}


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, sizes in NETWORKS.items():
        dit = network(*sizes)
        for side in SIDES:
            tokens = FRAMES * (side // 2) ** 2
            if sizes[1] == 128 and tokens > LONGEST:
                continue
            taken = seconds(dit, side)
            apart, together = taken[False] * 1e3, taken[True] * 1e3
            rows.append((name, tokens, f"{apart:.0f}", f"{together:.0f}", f"{apart / together:.2f}"))
    print_table(
        "batched_branches: three branches of a step, one after another and as one batch",
        ("network", "video tokens of a branch", "one after another, ms", "one batch, ms", "ratio"),
        rows,
    )


if __name__ == "__main__":
    main()
