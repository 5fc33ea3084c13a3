"""What only a CUDA device can show of `train`; run by hand: `python tests/gpu/train.py`, five minutes.

The rows of `tests/bench/training_memory.py` on a card: two optimizer steps of OmniAvatar 14B on prepared
samples of zeros, with random weights made on it. Bytes that were counted on fake tensors, by processes beside
it; bytes of living tensors and of the allocator; seconds of the first step, which warms up, and of the
second, both while every operation is counted. No row begins after three and a half minutes; the shortest
comes first. Prints one table; exits 1 where a count is more than 5 % off, or a row was not measured.
**Not run on a card yet.**

    python tests/gpu/train.py --rows lean                            those whose names hold the word
    python tests/gpu/train.py --model cartoon-v2v --device cpu       that the script works
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from avatarctl.models import omniavatar
from avatarctl.profiling import auxiliary, fakes, training

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from training_memory import MODEL, ROWS, counted

LIMIT, LAST_BEGINNING = 0.05, 210.0


def waited(card: torch.device) -> None:
    if card.type == "cuda":
        torch.cuda.synchronize(card)


@contextmanager
def watched(card: torch.device) -> Iterator[list[float]]:
    """Random weights in the networks that are made, and the seconds of each step."""
    seconds: list[float] = []
    real_fill, real_step = fakes.fill, training._step

    def filled(network: torch.nn.Module, inside: Any, dtype_of: Any, device: str = "cpu") -> None:
        real_fill(network, inside, dtype_of, device)
        with torch.no_grad():  # on the card also what waits on the host: one thread there takes minutes
            for each in network.parameters():
                each.copy_(torch.randn(each.shape, dtype=each.dtype, device=card).mul_(0.02))

    def stepped(*inputs: Any) -> None:
        waited(card)
        if card.type == "cuda" and not seconds:
            torch.cuda.reset_peak_memory_stats(card)  # what it took to make the network is behind
        started = time.monotonic()
        real_step(*inputs)
        waited(card)
        seconds.append(time.monotonic() - started)

    def whole(text: torch.Tensor) -> tuple[torch.Tensor, None]:
        return text, None

    with (
        mock.patch.object(omniavatar, "without_padding", whole),  # as a card reads a text, on a CPU too
        mock.patch.object(training, "fill", filled),
        mock.patch.object(auxiliary, "fill", filled),
        mock.patch.object(training, "_step", stepped),
    ):
        yield seconds


def predicted(words: tuple[str, ...], model: str) -> int:
    """In a process of its own."""
    torch.set_num_threads(1)
    return counted(words, model=model).live_bytes


def measured(words: tuple[str, ...], model: str, card: torch.device) -> tuple[int, int, list[float]] | None:
    """Living tensors, the allocator's bytes (0 on a CPU), seconds; None where the card has not room."""
    try:
        with watched(card) as seconds:
            living = counted(words, "real", str(card), model).live_bytes
        most = torch.cuda.max_memory_allocated(card) if card.type == "cuda" else 0
        return living, most, seconds
    except torch.OutOfMemoryError:
        return None
    finally:
        if card.type == "cuda":
            torch.cuda.empty_cache()


def line(name: str, foretold: int, found: tuple[int, int, list[float]] | None) -> tuple[str, bool]:
    """One row, and whether it is close."""
    if found is None:
        return f"| {name} | {foretold / 1e9:.3g} | does not fit | | | |", False
    living, most, seconds = found
    sizes = " | ".join(f"{each / 1e9:.3g}" for each in (foretold, living, most))
    took = " | ".join(f"{each:.1f}" for each in seconds)
    return f"| {name} | {sizes} | {took} |", abs(living - foretold) <= LIMIT * living


def table(
    rows: dict[str, tuple[str, ...]], model: str, card: torch.device, submit: Callable[..., Future[int]]
) -> bool:
    """Prints it; whether all rows were measured and close."""
    begun, kept = time.monotonic(), True
    foretold = {name: submit(predicted, words, model) for name, words in rows.items()}
    print("| | predicted GB | measured, living tensors | measured, allocator | first step, s | second, s |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, words in rows.items():
        if time.monotonic() - begun > LAST_BEGINNING:
            size = foretold[name].result() / 1e9
            print(f"| {name} | {size:.3g} | no time was left | | | |", flush=True)
            kept = False
            continue
        found = measured(words, model, card)
        told, close = line(name, foretold[name].result(), found)
        print(told, flush=True)
        kept &= close
    return kept


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rows", default="")
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    card = torch.device(asked.device)
    if card.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was checked")
        return 1
    chosen = {name: words for name, (words, _) in reversed(ROWS.items()) if asked.rows in name}
    if not chosen:
        parser.error(f"no row of {'; '.join(ROWS)} holds {asked.rows}")
    where = torch.cuda.get_device_name(card) if card.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {asked.model}\n")
    with ProcessPoolExecutor(len(chosen), multiprocessing.get_context("spawn")) as processes:
        return int(not table(chosen, asked.model, card, processes.submit))


if __name__ == "__main__":
    sys.exit(main())
