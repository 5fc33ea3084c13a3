"""Adapters merged into their base, and more input channels (spec/omniavatar.md g.4, i), through files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from avatarctl.events import silent
from avatarctl.files.source import open_weights
from avatarctl.files.tensors import read_whole
from avatarctl.loading.parts import transformer
from avatarctl.weights.extract import extract_adapter
from avatarctl.weights.merge import merge_adapter
from avatarctl.weights.recognise import read_weight_file, require_complete
from avatarctl.weights.transforms import with_channels
from avatarctl.weights.weight_file import WeightFile

from ..golden import Checks, Reader
from .building import width_of_head

checks = Checks()

ADAPTED = "lora_in33.safetensors"
EXPANSION = "patch_embedding_expansion.safetensors"
_NEEDS = ("base.*", "ckpt.*", "input.*")
_OUTPUT = 1e-4  # absolute, on outputs up to 5
_PATCH = "patch_embedding.weight"


@contextmanager
def _written(reader: Reader) -> Iterator[tuple[WeightFile, WeightFile]]:
    """The recorded base and adapter as a release has them on the disk, opened by the product."""
    base, adapter = reader.group("base."), reader.group("ckpt.")
    width, channels = base[_PATCH].shape[:2]
    network = {"in_dim": channels, "num_heads": width // width_of_head(reader, width)}
    with tempfile.TemporaryDirectory() as name:
        folders = {part: Path(name) / part for part in ("base", "release")}
        for folder in folders.values():
            folder.mkdir()
        save_file(base, folders["base"] / "diffusion_pytorch_model.safetensors")
        _write_json(folders["base"], {"model_config": network, "train_architecture": "full"})
        torch.save(adapter, folders["release"] / "pytorch_model.pt")
        _write_json(
            folders["release"],
            {
                "model_config": network,
                "train_architecture": "lora",
                "lora_rank": int(reader.metadata["lora_rank"]),
                "lora_alpha": float(reader.metadata["lora_alpha"]),
                "lora_target_modules": reader.metadata["target_modules"],
            },
        )
        opened = tuple(read_weight_file(folder) for folder in folders.values())
        for weight_file in opened:
            require_complete(weight_file)
        yield opened[0], opened[1]


def _write_json(folder: Path, fields: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


@torch.no_grad()
def _output(model: WeightFile, reader: Reader) -> Tensor:
    """One forward pass of the product's network with the recorded inputs."""
    taken = {name: reader.take(f"input.{name}") for name in ("x", "y", "timestep", "context", "audio_emb")}
    network = transformer(model, torch.float32, torch.device("cpu"))
    inputs = torch.cat([taken["x"], taken["y"]], dim=1)
    return network(inputs, taken["timestep"], taken["context"], taken["audio_emb"])


@checks(ADAPTED, compares=("output",), needs=_NEEDS)
def merged_adapter(reader: Reader) -> None:
    with _written(reader) as (base, adapter):
        reader.compare("output", _output(merge_adapter(base, adapter), reader), atol=_OUTPUT)


@checks(ADAPTED, compares=("output",), needs=_NEEDS)
def extracted_adapter(reader: Reader) -> None:
    """The adapter that is taken out of the merged model, merged again."""
    with _written(reader) as (base, adapter):
        found = extract_adapter(merge_adapter(base, adapter), base, emit=silent)
        assert found.lora_pairs.keys() == adapter.lora_pairs.keys()
        assert {pair.rank for pair in found.lora_pairs.values()} == {int(reader.metadata["lora_rank"])}
        reader.compare("output", _output(merge_adapter(base, found), reader), atol=_OUTPUT)
        without = (_output(base, reader) - reader.take("output")).abs().max()
        assert without > 10 * _OUTPUT, "the recorded adapter changes nothing: this check would prove nothing"


def _paste(target: Tensor, source: Tensor) -> Tensor:
    """`source` in the leading input channels of `target`."""
    return torch.cat([source, target[:, source.shape[1] :]], dim=1)


@checks(EXPANSION, compares=("target*.after.*",), needs=("ckpt*", "target*.before.*"))
def more_channels(reader: Reader) -> None:
    """The recorded scripts leave in the new channels what their target held; the product, as the trainer of
    video to video does, zeros. The old channels are the same to the bit, and come back when dropped."""
    held = {_channels(key): reader.take(key) for key in reader.keys("ckpt*")}
    for key in sorted(reader.keys("target*.after.*"), key=_channels):
        before, channels = reader.take(key.replace(".after.", ".before.")), _channels(key)
        source = held[max(count for count in held if count < channels)]
        reader.compare(key, _paste(before, source))
        widened, dropped = _through_files(source, channels)
        assert torch.equal(widened, _paste(torch.zeros_like(before), source)), f"{key}: wrong channels"
        assert torch.equal(dropped, source), f"{key}: {source.shape[1]} channels do not come back"
        held[channels] = reader.take(key)  # the chain goes on from here


def _channels(key: str) -> int:
    return int(key.split(".")[0].removeprefix("target").removeprefix("ckpt"))


def _through_files(held: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """A recorded weight read from a file and widened; the same with the new channels dropped again."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        save_file({_PATCH: held}, path)
        wide = with_channels(open_weights(path).tensors[_PATCH], channels)
        again = with_channels(wide, held.shape[1])
        return torch.from_numpy(read_whole(wide)), torch.from_numpy(read_whole(again))
