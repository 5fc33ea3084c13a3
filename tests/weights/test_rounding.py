"""What rounding alone gives is told from the rank of a LoRA, whatever the size of its change."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from avatarctl.events import Event, Notice, silent
from avatarctl.files.source import RawWeights
from avatarctl.files.tensors import ArrayTensor, StoredTensor, from_float32, read_whole, to_float32
from avatarctl.weights.extract import extract_adapter
from avatarctl.weights.merge import merge_adapter
from avatarctl.weights.recognise import recognise
from avatarctl.weights.rounding import Squares, rounding_floor
from avatarctl.weights.svd import factorise
from avatarctl.weights.transforms import plus_lora
from avatarctl.weights.weight_file import LoraPair, WeightFile
from tests.weights.published_tables import wan

ROUNDOFF = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
SHAPES = wan(64, 160, 1, text=256, freq=256)
TARGETS = [name for name, shape in SHAPES.items() if name.endswith(".weight") and len(shape) == 2]
ENTRY = 0.1
"""Size of the entries of a base."""

SEEDS, RANKS, SCALES = 20, 16, (0.1, 0.3, 1.0, 1.5, 10.0)
SIZES = (0.0, 0.1, 1.0)
"""Entries of up and down; 0: as small as can still be told from rounding."""


@dataclass(frozen=True)
class Case:
    """One weight of a sweep. smallest: of the singular values that were merged; found: the rank."""

    target: str
    dtype: str
    rank: int
    scale: float
    smallest: float
    merged: np.ndarray
    change: np.ndarray
    found: int

    @property
    def floor(self) -> float:
        return float(floors(self.merged, self.change, self.dtype, self.rank)[-1])

    @property
    def even_floor(self) -> float:
        """Where every value is as large as the others and is rounded once, and so is every difference."""
        return even_floor(
            np.linalg.norm(self.merged), np.linalg.norm(self.change), self.dtype, self.merged.shape
        )

    def __str__(self) -> str:
        return f"{self.target} in {self.dtype}, rank {self.rank}, scale {self.scale}: found {self.found}"


def floors(merged: np.ndarray, change: np.ndarray, dtype: str, limit: int) -> np.ndarray:
    sums = Squares(*merged.shape), Squares(*merged.shape)
    for each, values in zip(sums, (merged, change), strict=True):
        each.add(0, values)
    return rounding_floor(*sums, dtype, limit)


def even_floor(merged: float, change: float, dtype: str, shape: tuple[int, ...]) -> float:
    error = ROUNDOFF[dtype] * merged + ROUNDOFF["F32"] * change
    return float(error * sum(1 / math.sqrt(3 * side) for side in shape))


def true_values(pair: LoraPair, scale: float) -> np.ndarray:
    up, down = (read_whole(each).astype(np.float64) for each in (pair.up, pair.down))
    return scale * np.linalg.svd(np.linalg.qr(up, "r") @ np.linalg.qr(down.T, "r").T, compute_uv=False)


def random_pair(shape: tuple[int, ...], rank: int, scale: float, random: np.random.Generator) -> LoraPair:
    up, down = (random.standard_normal(ends, np.float32) for ends in ((shape[0], rank), (rank, shape[1])))
    return LoraPair(ArrayTensor(down, "F32"), ArrayTensor(up, "F32"), alpha=scale * rank)


def times(pair: LoraPair, factor: float) -> LoraPair:
    down, up = (ArrayTensor(read_whole(each) * np.float32(factor), "F32") for each in (pair.down, pair.up))
    return replace(pair, down=down, up=up)


def model(random: np.random.Generator, dtype: str) -> WeightFile:
    tensors: dict[str, StoredTensor] = {}
    for name, shape in SHAPES.items():
        values = random.standard_normal(shape, np.float32) * np.float32(ENTRY)
        tensors[name] = ArrayTensor(from_float32(values, dtype), dtype)
    path = Path("model.safetensors")
    return recognise(RawWeights(path, (path,), "safetensors", tensors, config={"num_heads": 2}))


def floats(tensor: StoredTensor) -> np.ndarray:
    return to_float32(read_whole(tensor), tensor.info.dtype)


def sweep(dtype: str) -> Iterator[Case]:
    """Every rank with every target, scale and size, one adapter of all targets per seed. Bases have the dtype
    of the merged file or float32 by turns."""
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        base = model(random, dtype if seed % 2 else "F32")
        pairs, scales, smallest = {}, {}, {}
        for index, target in enumerate(TARGETS):
            shape, rank = SHAPES[target], 1 + (index + seed) % RANKS
            scale, size = SCALES[(index + seed // 2) % len(SCALES)], SIZES[(index + seed // 3) % len(SIZES)]
            pair = random_pair(shape, rank, scale, random)
            value = true_values(pair, scale)[-1]
            if not size:
                floor = even_floor(ENTRY * math.sqrt(math.prod(shape)), 0, dtype, shape)
                size = math.sqrt(3 * floor / value)
            pairs[target], scales[target], smallest[target] = times(pair, size), scale, value * size**2
        lora_pairs = {target.removesuffix(".weight"): pair for target, pair in pairs.items()}
        merged = merge_adapter(
            base, replace(base, kind="adapter", tensors={}, lora_pairs=lora_pairs), dtype=dtype
        )
        found = extract_adapter(merged, base, emit=silent).lora_pairs
        for target, pair in pairs.items():
            values = floats(merged.tensors[target])
            change = values - floats(base.tensors[target])
            rank, told = pair.rank, found[target.removesuffix(".weight")].rank
            yield Case(target, dtype, rank, scales[target], smallest[target], values, change, told)


@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_the_rank_that_was_merged_is_found(dtype: str) -> None:
    """Wherever its smallest singular value is twice what rounding gives; which is not much more than one
    rounding per value where the change is small."""
    cases = list(sweep(dtype))
    seen = [case for case in cases if case.smallest >= 2 * case.floor]
    assert len(cases) == SEEDS * len(TARGETS) and len(seen) > 0.95 * len(cases)
    assert {case.rank for case in seen} == set(range(1, RANKS + 1))
    assert {case.scale for case in seen} == set(SCALES) and len({SHAPES[case.target] for case in seen}) == 5
    wrong = [str(case) for case in seen if case.found != case.rank]
    assert not wrong, f"{len(wrong)} of {len(seen)}"
    small = [case for case in cases if np.linalg.norm(case.change) < 0.1 * np.linalg.norm(case.merged)]
    assert len(small) > 0.3 * len(cases)
    assert max(case.floor / case.even_floor for case in small) <= 1.5


@pytest.mark.parametrize("rank", [1, 6])
def test_no_rank_comes_from_the_products_that_find_it(rank: int) -> None:
    """Of matrices that are too large for an exact decomposition."""
    random = np.random.default_rng(rank)
    base = random.standard_normal((640, 576), np.float32) * np.float32(ENTRY)
    merged = read_whole(plus_lora(ArrayTensor(base, "F32"), random_pair(base.shape, rank, 1.5, random), 1.5))
    change = merged - base
    assert factorise(change, 16, floor=floors(merged, change, "F32", 16)).rank == rank


class Notices(list[str]):
    """An `Emit` that keeps the notices about the floor."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice) and "floor of rounding" in event.text:
            self.append(event.text)


TARGET = "blocks.0.ffn.0.weight"


def extracted(base: WeightFile, values: np.ndarray, rank: int | None = None) -> tuple[LoraPair, Notices]:
    """What is found where one weight of `base` has these values, as bfloat16."""
    notices = Notices()
    changed = replace(
        base, tensors={**base.tensors, TARGET: ArrayTensor(from_float32(values, "BF16"), "BF16")}
    )
    found = extract_adapter(changed, base, rank=rank, emit=notices).lora_pairs
    return found[TARGET.removesuffix(".weight")], notices


def test_values_under_the_floor_are_left_out_and_a_line_says_up_to_which() -> None:
    random = np.random.default_rng(3)
    base = model(random, "F32")
    held, pair = floats(base.tensors[TARGET]), random_pair(SHAPES[TARGET], 4, 1, random)
    floor = even_floor(np.linalg.norm(held), 0, "BF16", held.shape)
    left, right = np.linalg.qr(read_whole(pair.up))[0], np.linalg.qr(read_whole(pair.down).T)[0].T
    values = held + (left * np.float32([9 * floor, 6 * floor, 3 * floor, 0.5 * floor])) @ right
    found, notices = extracted(base, values)
    assert found.rank == 3 and len(notices) == 1
    up_to = re.search(r"singular values up to (\S+) are left out", notices[0])
    assert up_to and floor < float(up_to[1]) < 1.5 * floor
    assert "1 of 1" not in notices[0]
    found, notices = extracted(base, values, rank=4)
    assert found.rank == 4 and not notices, "a rank that was asked for has no floor"


@pytest.mark.parametrize(("energy", "more"), [(0.0, False), (0.8, True)])
def test_a_weight_whose_whole_change_is_under_the_floor_is_counted(energy: float, more: bool) -> None:
    """Rounding alone, and a change of full rank which has so much of its energy that its sum with the errors
    is more than rounding gives."""
    random = np.random.default_rng(4)
    base = model(random, "F32")
    held = floats(base.tensors[TARGET])
    error = ROUNDOFF["BF16"] * np.linalg.norm(held) / math.sqrt(3 * held.size)
    change = random.standard_normal(held.shape, np.float32) * np.float32(math.sqrt(energy) * error)
    found, notices = extracted(base, held + change)
    assert found.rank == 1
    assert "1 of 1 weights have none above it and keep their largest" in notices[0]
    assert ("in 1 of 1 weights more is left out than rounding gives" in notices[0]) == more
