"""The table of docs/memory.md on training: live bytes of two optimizer steps on prepared samples, by phase
and by what holds them, counted on fake tensors by the code of the step.

    python tests/bench/training_memory.py            all rows, three to six minutes of one core
    python tests/bench/training_memory.py small      those whose names hold the word

OmniAvatar 14B with 49 channels at 512x512 and 81 frames. Targets, live: at most 76e9 bytes by default with
all auxiliary losses, 44e9 with what can wait on the host there, 22e9 at rank 32 without auxiliary losses.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from reporting import print_table, verdict

from avatarctl.profiling.account import Account
from avatarctl.profiling.fakes import Mode
from avatarctl.profiling.training import profile_training
from avatarctl.registry import configure, find_model

MODEL = "omniavatar-14b"
COMMON = ("model.channels=49", "model.audio_offset=0", "runtime.dtype=bfloat16", "train.mode=lora")
JUDGED = "aux.losses=sync,lpips,trepa"
LEAN = (
    "memory.vae_gradient=offload", "memory.activation_checkpointing=block_offload",
    "memory.swap_blocks={blocks}", "memory.optimizer_device=cpu",
)  # fmt: skip
FP8 = "memory.base_precision=fp8"
ROWS = {
    "default": ((JUDGED,), 76e9),
    "lean": ((JUDGED, *LEAN), 44e9),
    "eight bits": ((JUDGED, FP8), 76e9),
    "lean, eight bits": ((JUDGED, *LEAN, FP8), 44e9),
    "small, rank 32": (("train.lora_rank=32", *LEAN), 22e9),
}
"""By name: settings, {blocks} being all that the transformer has, and the target in bytes.
`tests/gpu/train.py` measures the same rows on a card."""
PHASES = ("load", "forward", "aux", "aux backward", "backward", "optimizer")


def settings(words: Sequence[str], model: str = MODEL) -> list[str]:
    """Of a row, for one model."""
    blocks = find_model(model).network["dit"]["num_layers"]
    return [f"model.name={model}", *COMMON, *(word.format(blocks=blocks) for word in words)]


def counted(words: Sequence[str], mode: Mode = "fake", device: str = "cpu", model: str = MODEL) -> Account:
    """Two optimizer steps with the settings of a row."""
    return profile_training(find_model(model), configure(*settings(words, model)), mode, device=device)


def main() -> int:
    wanted, kept = " ".join(sys.argv[1:]), True
    rows, notes = [], []
    for name, (words, limit) in ROWS.items():
        if wanted not in name:
            continue
        started = time.process_time()
        account = counted(words)
        live = account.live_bytes
        kept &= live <= limit
        by_phase = [f"{account.stages.get(phase, 0) / 1e9:.1f}" for phase in PHASES]
        totals = [f"{each / 1e9:.1f}" for each in (account.host, live, limit)]
        rows.append([name, *by_phase, *totals, verdict(live, limit)])
        held = sorted(account.components.items(), key=lambda each: -each[1])
        shares = ", ".join(f"{what} {size / 1e9:.1f}" for what, size in held if size >= 5e7)
        seconds = time.process_time() - started
        notes.append(
            f"{name}: {' '.join(settings(words))}; GB at the largest: {shares}; {seconds:.0f} CPU seconds."
        )
    print_table(
        "Memory of training, predicted", ["", *PHASES, "on the host", "live, GB", "target", ""], rows, *notes
    )
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
