"""What the public trainer states for a step of OmniAvatar 14B, beside ours with its savings switched off.

    python tests/bench/published_memory.py        about four minutes of one core

49 channels, 512x512, 81 frames, rank 128, the second optimizer step, live bytes counted on fake tensors. Each
row has what the row before has, and one saving less. The published figures are peaks on a card, with what
its allocator keeps; how that trainer decodes is known from its code alone (spec/omniavatar.md g.5,
spec/losses-and-eval.md 4.2).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from reporting import print_table

from avatarctl.loading.built_in import build_on_meta
from avatarctl.profiling.training import profile_training
from avatarctl.registry import configure, find_model

MODEL = "omniavatar-14b"
COMMON = (f"model.name={MODEL}", "model.channels=49", "model.audio_offset=0", "runtime.dtype=bfloat16")
JUDGED = "aux.losses=sync,lpips,trepa"
FRAMES = "memory.vae_gradient=checkpoint"


def live(*words: str) -> int:
    return profile_training(find_model(MODEL), configure(*COMMON, *words)).live_bytes


def encoders() -> int:
    """Bytes of those that the public trainer keeps: text in bfloat16, audio in float32."""
    parts: Any = build_on_meta(find_model(MODEL))
    dtypes = {"text": torch.bfloat16, "audio": torch.float32}
    return sum(
        each.numel() * dtype.itemsize for part, dtype in dtypes.items() for each in parts[part].parameters()
    )


def main() -> int:
    kept = encoders()
    flow, judged, by_frame = live(), live(JUDGED), live(JUDGED, FRAMES)
    told = (
        ("flow loss alone, as ours", flow, None),
        ("and text and audio encoder stay on the card", flow + kept, 61),
        ("all losses, as ours", judged, None),
        ("and the decoder keeps a state for each latent frame", by_frame, 134),
        ("and text and audio encoder stay on the card", by_frame + kept, 146),
    )
    rows = []
    for what, size, published in told:
        gigabytes = size / 1e9
        off = "" if published is None else f"{published - gigabytes:+.1f}"
        rows.append((what, f"{gigabytes:.1f}", "" if published is None else str(published), off))
    print_table(
        "published_memory: predicted, GB (10^9 bytes)",
        ("a training step of 14B", "counted", "published, about", "unexplained"),
        rows,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
