"""Whole configurations of small models at two sizes: live bytes counted on fake tensors beside those
of real ones, at most 2 % apart; and accounts that leave work out beside those that do not, equal to the byte.

    python tests/bench/counted_and_measured.py             these, and what is left out on small models
    python tests/bench/counted_and_measured.py large       what is left out at 1.3B and 14B, five minutes

Inference with 33, 36, 49 and 65 input channels, training with 33, 49 and 65; batches of one and two; each
gradient mode of the decoder, each auxiliary loss, each memory mode; a validation.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from reporting import print_table

from avatarctl.models import omniavatar
from avatarctl.profiling.account import Account
from avatarctl.profiling.inference import profile_inference
from avatarctl.profiling.training import profile_training
from avatarctl.registry import Row, configure, find_model

LIMIT = 0.02
SHORT = ("long_video.num_frames=9", "long_video.overlap_frames=5", "memory.mode=full")
GUIDED = ("sampling.guidance_scale=3", "sampling.audio_guidance_scale=2")
ADAPTED = ("train.mode=lora", "train.lora_rank=4")
ONE = ("train.batch_size=1", "train.gradient_accumulation=2")
TWO = ("train.batch_size=2",)
MANY = ("model.channels=65",)
INFERENCE = {
    "infer, 33 channels, full": ("cartoon-i2v", SHORT),
    "infer, 33, group, three branches": ("cartoon-i2v", (*SHORT, *GUIDED, "memory.mode=group")),
    "infer, 36, model, branches as a batch": (
        "stableavatar-tiny", (*SHORT, "sampling.batch_branches=true", "memory.mode=model"),
    ),
    "infer, 49, sequential": ("cartoon-v2v", (*SHORT, "memory.mode=sequential")),
    "infer, 65, two blocks away, eight bits": (
        "cartoon-v2v", (*SHORT, *MANY, "memory.swap_blocks=2", "memory.base_precision=fp8"),
    ),
}  # fmt: skip
TRAINING = {
    "train, 33, all of it, batch 1": ("cartoon-i2v", ("train.mode=full", *ONE)),
    "train, 33, LoRA, nothing made again, batch 2": (
        "cartoon-i2v", (*ADAPTED, *TWO, "memory.activation_checkpointing=none"),
    ),
    "train, 49, LoRA, LPIPS, gradient full, batch 1": (
        "cartoon-v2v", (*ADAPTED, *ONE, "aux.losses=lpips", "memory.vae_gradient=full"),
    ),
    "train, 49, LoRA, sync, checkpoint, batch 2": (
        "cartoon-v2v", (*ADAPTED, *TWO, "aux.losses=sync", "memory.vae_gradient=checkpoint"),
    ),
    "train, 49, all of it, TREPA, segment, batch 1": (
        "cartoon-v2v", ("train.mode=full", *ONE, "aux.losses=trepa", "memory.vae_gradient=segment"),
    ),
    "train, 65, LoRA, all three, offload, batch 1": (
        "cartoon-v2v", (*MANY, *ADAPTED, *ONE, "aux.losses=sync,lpips,trepa", "memory.vae_gradient=offload"),
    ),
    "train, 49, LoRA, LPIPS, average, validation, batch 1": (
        "cartoon-v2v", (*ADAPTED, *ONE, "aux.losses=lpips", "train.ema=0.99", "validation.every=1"),
    ),
    "train, 65, LoRA, what can wait on the host, batch 2": (
        "cartoon-v2v",
        (*MANY, *ADAPTED, *TWO, "memory.base_precision=fp8", "memory.swap_blocks=2",
         "memory.activation_checkpointing=block_offload", "memory.optimizer_device=cpu"),
    ),
}  # fmt: skip
SIZES = ((64, 64, 17), (96, 96, 21))
LARGE = {"omniavatar-1.3b": (512, 512), "omniavatar-14b": (512, 512)}


def shallow(model: str, blocks: int = 4) -> Row:
    row = find_model(model)
    network = {**row.network, "dit": {**row.network["dit"], "num_layers": blocks}}
    return replace(row, network=MappingProxyType(network))


def sized(model: str, words: tuple[str, ...], size: tuple[int, int, int]) -> Any:
    width, height, frames = size
    given = {"output.width": width, "output.height": height, "data.width": width, "data.height": height}
    given["data.num_frames"] = frames
    return configure(f"model.name={model}", *(f"{name}={value}" for name, value in given.items()), *words)


def apart(counted: Account, measured: Account) -> float:
    """The largest difference of a component of a phase, or of the host, of all that is alive then."""
    found = [abs(counted.host - measured.host) / measured.host] if measured.host else []
    for stage, size in measured.stages.items():
        one, other = counted.parts.get(stage, {}), measured.parts[stage]
        found += [abs(one.get(name, 0) - other.get(name, 0)) / size for name in {**one, **other}]
        found.append(abs(counted.stages.get(stage, 0) - size) / max(1, size))
    return max(found, default=0.0)


def small() -> bool:
    """Counted and measured."""
    # Counted is what a card does, which reads all rows of a text.
    omniavatar.without_padding = lambda text: (text, None)  # type: ignore[attr-defined]
    rows, kept = [], True
    for profile, jobs in ((profile_inference, INFERENCE), (profile_training, TRAINING)):
        for name, (model, words) in jobs.items():
            cells: list[Any] = [name]
            for size in SIZES:
                row, cfg = shallow(model), sized(model, words, size)
                counted, measured = profile(row, cfg), profile(row, cfg, "real")  # type: ignore[operator]
                off = apart(counted, measured)
                kept &= off <= LIMIT
                cells += [f"{counted.live_bytes:,}", f"{measured.live_bytes:,}", f"{off:.2%}"]
            rows.append(cells)
            print("\t".join(map(str, cells)), file=sys.stderr, flush=True)
    heads = [
        f"{width}x{height}x{frames}, {what}"
        for width, height, frames in SIZES
        for what in ("counted", "measured", "largest difference of a component")
    ]
    print_table("Counted and measured live bytes", ["", *heads], rows)
    return kept


def left_out() -> bool:
    """Inference in each mode, what is like a call before run and not run."""
    rows, kept = [], True
    for model in ("cartoon-i2v", "cartoon-v2v", "stableavatar-tiny"):
        for mode in ("full", "model", "group", "sequential"):
            words = ("long_video.num_frames=21", "long_video.overlap_frames=5", "sampling.guidance_scale=3")
            cfg = sized(model, (*words, f"memory.mode={mode}", "memory.group_blocks=2"), (32, 16, 21))
            kept &= both(f"infer {model}, {mode}", profile_inference, shallow(model), cfg, rows)
    print_table("Work that is left out, small models", ["", "equal", "CPU s", "CPU s, all of it"], rows)
    return kept


def large() -> bool:
    """The same at the sizes of published models, and training extended from three depths."""
    rows: list[list[Any]] = []
    kept = True
    for model, (width, height) in LARGE.items():
        for mode in ("full", "group", "sequential"):
            cfg = sized(model, (f"memory.mode={mode}",), (width, height, 81))
            kept &= both(f"infer {model}, {mode}", profile_inference, find_model(model), cfg, rows)
        cfg = sized(model, ("train.lora_rank=128",), (width, height, 81))
        kept &= both(f"train {model}, LoRA", profile_training, find_model(model), cfg, rows)
    print_table("Work that is left out, published sizes", ["", "equal", "CPU s", "CPU s, all of it"], rows)
    return kept


def both(name: str, profile: Any, row: Row, cfg: Any, rows: list[list[Any]]) -> bool:
    accounts, seconds = [], []
    for exact in (False, True):
        begun = time.process_time()
        accounts.append(profile(row, cfg, exact=exact))
        seconds.append(f"{time.process_time() - begun:.1f}")
    equal = accounts[0] == accounts[1]
    rows.append([name, "to the byte" if equal else "no", *seconds])
    print("\t".join(map(str, rows[-1])), file=sys.stderr, flush=True)
    return equal


def main() -> int:
    if "large" in sys.argv[1:]:
        return int(not large())
    kept = left_out()
    return int(not (small() and kept))


if __name__ == "__main__":
    sys.exit(main())
