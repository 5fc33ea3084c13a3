"""A file that changes between its header and its bytes is refused: nothing is made of two models."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import save_file

from avatarctl.errors import UnusableWeights
from avatarctl.files import hashes as hashes_module
from avatarctl.files.hashes import FileHashes
from avatarctl.files.source import open_weights
from avatarctl.files.tensors import read_whole, to_float32
from avatarctl.files.writer import write_safetensors


def save(path: Path, value: float) -> None:
    state = {"a": torch.full((40, 30), value), "b": torch.full((30, 40), value).t()}
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("change", ["replaced", "written anew"])
def test_no_tensor_of_another_file(name: str, change: str, tmp_path: Path) -> None:
    path = tmp_path / name
    save(path, 1.0)
    tensors = open_weights(path).tensors
    first, second = tensors.values()
    assert (to_float32(read_whole(first), "F32") == 1).all()
    if change == "replaced":
        other = tmp_path / f"new{path.suffix}"
        save(other, 2.0)
        other.replace(path)
    else:
        save(path, 2.0)
        os.utime(path, ns=(1, 1))  # whatever the clock of this disk is
    with pytest.raises(UnusableWeights, match=f"{name}: changed while it was read"):
        second.read(0, 10)
    with pytest.raises(UnusableWeights, match="changed while it was read"):
        write_safetensors(tmp_path / "out.safetensors", tensors, {}, sources=[path])
    assert not (tmp_path / "out.safetensors").exists()


def test_no_hash_of_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second source is replaced when writing has begun, and the first is still being hashed."""
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    for path, content in ((first, b"0"), (second, b"1"), (other, b"2")):
        path.write_bytes(content * 100)
    replaced = threading.Event()
    blocks = hashes_module._blocks

    def waiting(file: BinaryIO) -> Iterator[memoryview]:
        assert replaced.wait(60)
        yield from blocks(file)

    monkeypatch.setattr(hashes_module, "_blocks", waiting)
    with FileHashes() as hashes:
        hashes.start([first, second])
        other.replace(second)
        replaced.set()
        with pytest.raises(UnusableWeights, match="second: changed while it was read"):
            hashes.digests([first, second])
