"""The vocal projector and the split of its tokens (spec/stableavatar.md b)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from avatarctl.models.vocal_projector import vocal_windows

from ..golden import Checks, Reader
from .building import compare_output, setting, transformer

checks = Checks()

FILE = "set1_vocal_projector.safetensors"
TABLE = "set1_split_table.json"
_MARGIN = 4  # by which the windows are wider than the recorded ranges, each side (spec/stableavatar.md b.1)


def _compare_splits(reader: Reader, table: str, lengths: str) -> None:
    """Which tokens each latent frame gets, for every (L, num_frames) of a table."""
    for key in reader.keys(f"{table}.*.L"):
        case = key.removesuffix(".L")
        tokens, frames = reader.take(key), reader.take(f"{case}.num_frames")
        if "error" in reader.group(f"{case}."):
            with pytest.raises(ValueError):
                vocal_windows(tokens, frames)
            continue
        indices, valid = vocal_windows(tokens, frames)
        reader.compare(f"{case}.window_len", indices.shape[1])
        reader.compare(f"{case}.{lengths}", valid.sum(dim=1).tolist())
        assert len(reader.keys(f"{case}.ranges.*")) == len(indices)
        for place, (row, inside) in enumerate(zip(indices, valid, strict=True)):
            first, last = reader.take(f"{case}.ranges.{place}")
            wide = range(max(first - _MARGIN, 0), min(last + _MARGIN, tokens - 1) + 1)
            assert row[inside].tolist() == list(wide), f"{case}: other tokens in latent frame {place}"


@checks(TABLE, compares=("table.*.window_len", "table.*.valid_lens"), needs=("table.*",))
def split_table(reader: Reader) -> None:
    _compare_splits(reader, "table", "valid_lens")


@checks(TABLE, compares=("cases.*.window_len", "cases.*.lens"), needs=("cases.*",))
def split_of_the_cases(reader: Reader) -> None:
    _compare_splits(reader, "cases", "lens")


def _cases(reader: Reader) -> list[str]:
    return [key.removesuffix(".vocal_embeddings") for key in reader.keys("*.vocal_embeddings")]


@checks(FILE, compares=("*.proj", "*.split", "*.lens"), needs=("*.vocal_embeddings",))
@torch.no_grad()
def tokens(reader: Reader) -> None:
    """Linear and norm, and the windows that are cut from it."""
    projector, frames = transformer(reader).vocal_projector, setting(reader, "clip_frames")
    for case in _cases(reader):
        vocal = reader.take(f"{case}.vocal_embeddings")
        compare_output(reader, f"{case}.proj", projector.proj_model(vocal))
        compare_output(reader, f"{case}.split", projector.windows(vocal, frames))
        reader.compare(f"{case}.lens", vocal_windows(vocal.shape[1], frames)[1].sum(dim=1))


@checks(
    FILE,
    compares=("*.block*", "*.out"),
    needs=("*.vocal_embeddings", "*.latents", "*.e", "*.e0"),
)
@torch.no_grad()
def projected(reader: Reader) -> None:
    projector, frames = transformer(reader).vocal_projector, setting(reader, "clip_frames")
    seen: list[Tensor] = []
    for block in projector.blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out))
    for case in _cases(reader):
        given = {name: reader.take(f"{case}.{name}") for name in ("vocal_embeddings", "latents", "e0", "e")}
        seen.clear()
        out = projector(
            projector.windows(given["vocal_embeddings"], frames), given["latents"], given["e0"], given["e"]
        )
        compare_output(reader, f"{case}.out", out)
        for key in reader.keys(f"{case}.block*"):
            index = int(key.rpartition(".block")[2])
            compare_output(reader, key, seen[index].flatten(1, 2))
