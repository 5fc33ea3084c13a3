"""What only a CUDA device can show of memory modes; run by hand: `python tests/gpu/memory.py`.

A transformer of OmniAvatar 14B with random weights that are made on the card, in every mode: seconds per step
and peak of device memory beside mode `full`, the output compared with its bits, the bytes that wait on the
host and whether they are pinned, and how long the copies of a step alone would take. A card on which `full`
does not fit starts with the first mode that does. About 5 minutes on a card of 80 GB; the host needs 60 GB.
Prints one table; exits 1 when bits differ or weights that should be pinned are not.

    python tests/gpu/memory.py --layers 4      a trial: four blocks in place of forty
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from avatarctl.loading.built_in import build_on_meta
from avatarctl.models.attention import choose_attention, use_attention
from avatarctl.models.fp8 import store_in_float8
from avatarctl.models.precision import is_float32_island
from avatarctl.placement.place import HOST, in_groups, leaf_by_leaf
from avatarctl.placement.units import Moves
from avatarctl.profiling.fakes import fill, slots, tensor_bytes
from avatarctl.registry import find_model

MODEL = "omniavatar-14b"
GRID = (27, 50, 90)
"""Latent frames, rows and columns of a chunk of 720x400: 30,375 tokens, as the published table has them."""
STEPS = 2
"""Timed, behind one that is not: kernels and buffers are made in the first."""

Place = Callable[[nn.Module, torch.device, Moves], None]


def stay(network: nn.Module, device: torch.device, moves: Moves) -> None:
    network.to(device)


def grouped(group: int, away: int | None = None) -> Place:
    def place(network: nn.Module, device: torch.device, moves: Moves) -> None:
        in_groups(network, device, group=group, away=away, moves=moves)

    return place


def leaves(network: nn.Module, device: torch.device, moves: Moves) -> None:
    leaf_by_leaf(network, device, moves=moves)


MODES: tuple[tuple[str, Place, bool], ...] = (
    ("full", stay, False),
    ("model, 20 blocks away", grouped(1, 20), False),
    ("group of 4", grouped(4), False),
    ("group of 1", grouped(1), False),
    ("sequential", leaves, False),
    ("full, fp8", stay, True),
    ("group of 4, fp8", grouped(4), True),
)
"""Name, how the network is placed, whether its matrices are stored in float8."""


def network(layers: int, device: torch.device, in_float8: bool, home: torch.device) -> nn.Module:
    """Drawn on the card tensor by tensor, from one seed, and laid down at `home`: a normal number from a
    generator of the host would take minutes for 14 billion."""
    row = find_model(MODEL)
    sizes = {**row.network["dit"], "num_layers": layers}
    made = build_on_meta(replace(row, network={"dit": sizes}))["dit"]
    half = torch.bfloat16
    fill(
        made, nullcontext(), lambda name, _: torch.float32 if is_float32_island(made, name) else half, "meta"
    )
    draws = torch.Generator(device).manual_seed(0)
    for name, held, key in slots(made):
        shape, dtype = held[key].shape, held[key].dtype
        values = torch.randn(shape, generator=draws, device=device, dtype=torch.float32)
        values = values / max(1, shape[-1]) ** 0.5 if len(shape) > 1 else values * 0.02 + ("norm" in name)
        held[key] = nn.Parameter(values.to(home, dtype), requires_grad=False)
    if in_float8:
        store_in_float8(made)
    use_attention(made, choose_attention("auto", device, half, sizes["attention_head_dim"]))
    return made.eval()


def inputs(dit: Any, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Noise, a time step and what is prepared of a text and an audio of noise, for one branch."""
    draws = torch.Generator(device).manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, device=device, dtype=torch.float32)

    frames, rows, columns = GRID
    latents = noise(1, dit.config.in_channels, frames, rows, columns)
    text, audio = noise(1, 512, dit.config.text_dim), noise(1, 4 * frames - 3, dit.config.audio_input_dim)
    prepared = dit(mode="prepare", text=text.bfloat16(), audio=audio, grid=GRID, device=device)
    return latents, torch.tensor([700.0], device=device), {"full": prepared}


def copies(device: torch.device, size: int) -> float:
    """Seconds that `size` bytes take from pinned memory alone."""
    block = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(block, device=device)
    there.copy_(block)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(4):
        there.copy_(block, non_blocking=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / 4 * size / (1 << 30)


def measured(layers: int, place: Place, in_float8: bool, device: torch.device) -> dict[str, Any]:
    """One mode; raises torch.OutOfMemoryError where it does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    moves = Moves()
    dit = network(layers, device, in_float8, device if place is stay else HOST)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    place(dit, device, moves)
    with torch.no_grad():
        latents, t, prepared = inputs(dit, device)
        seconds = []
        for _ in range(STEPS + 1):
            torch.cuda.synchronize()
            before, started = moves.copied_bytes, time.perf_counter()
            out = dit(latents, t, prepared, mode="denoise")["full"]
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    moved = moves.copied_bytes - before
    return {
        "out": out.float().cpu(),
        "seconds": min(seconds[1:]),
        "peak": torch.cuda.max_memory_allocated() / 2**30,
        "weights": tensor_bytes(dit) / 2**30,
        "moved": moved / 2**30,
        "alone": copies(device, moved) if moved else 0.0,
        "host": moves.host_peak / 2**30,
        "unpinned": moves.unpinned_bytes / 2**30,
    }


def rows(layers: int, device: torch.device) -> Iterator[tuple[str, dict[str, Any] | None, str]]:
    """Name, what was measured, and how the output compares with the first of the same precision."""
    first: dict[bool, Tensor] = {}
    for name, place, in_float8 in MODES:
        try:
            found = measured(layers, place, in_float8, device)
        except torch.OutOfMemoryError:
            yield name, None, "does not fit"
            continue
        expected = first.setdefault(in_float8, found["out"])
        same = (
            "first"
            if expected is found["out"]
            else "same bits"
            if torch.equal(expected, found["out"])
            else "DIFFERS"
        )
        if in_float8 and False in first and expected is found["out"]:
            apart = (found["out"] - first[False]).norm() / first[False].norm()
            same = f"{apart:.3g} from bf16"
        yield name, found, same


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--layers", type=int, default=40, help="blocks of the network (40)")
    layers = words.parse_args().layers
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked")
        return 1
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {layers} blocks, 720x400\n")
    print(
        "| mode | s a step | peak GiB | GiB moved a step | s of that alone | host GiB | unpinned | output |"
    )
    print("|---|---|---|---|---|---|---|---|")
    kept = True
    for name, found, same in rows(layers, device):
        if found is None:
            print(f"| {name} | | | | | | | {same} |", flush=True)
            continue
        numbers = (found[key] for key in ("seconds", "peak", "moved", "alone", "host", "unpinned"))
        print(f"| {name} | {' | '.join(f'{each:.2f}' for each in numbers)} | {same} |", flush=True)
        kept &= same != "DIFFERS" and not found["unpinned"]
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
