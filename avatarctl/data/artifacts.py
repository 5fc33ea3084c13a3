"""Artifacts: tensors in files that say what made them. Of another making they are made again, never used.

A file is safetensors with one tensor, and its header has the fingerprint. `--format pt` writes the files of
published trainers instead, several tensors in one, with the fingerprints among their metadata.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from avatarctl.atomic import atomic_write_bytes
from avatarctl.config import RunConfig, value_of
from avatarctl.errors import UnusableFile, UnusableWeights
from avatarctl.family import Artifact, Conventions
from avatarctl.files.finite import nonfinite
from avatarctl.files.pickle_file import read_pickle
from avatarctl.files.safetensors_file import read_header
from avatarctl.files.tensors import ArrayTensor, StoredTensor, read_whole
from avatarctl.files.writer import write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Making", "Stale", "check_older", "made_by", "read_artifact", "rounded", "write_artifact"]

_MADE: Final = "avatarctl.made"
"""Metadata key of the header: JSON of what the fingerprint is the hash of."""
_FINGERPRINT: Final = "avatarctl.fingerprint"
_VERSION: Final = 1
"""Of how artifacts are made; one more makes all of them again."""


class Stale(UnusableFile):
    """A file that was made from something else. It is made again."""


@dataclass(frozen=True)
class Making:
    """What makes an artifact: its fingerprint, and the facts that it is the hash of, as JSON."""

    fingerprint: str
    facts: str


def made_by(
    artifact: Artifact,
    family: str,
    conventions: Conventions,
    encoder: str,
    inputs: Mapping[str, Any],
    cfg: RunConfig,
) -> Making:
    """The making of an artifact from `inputs` (name to hash or number) by an encoder of this identity."""
    facts = {
        "artifact": artifact.name,
        "version": _VERSION,
        "family": family,
        "encoder": encoder,
        "inputs": dict(inputs),
        "settings": {key: value_of(cfg, key) for key in artifact.keys},
        "dtype": cfg.data.artifact_dtype,
        "fps": conventions.fps,
        "hole": conventions.hole,
    }  # not the audio offset: row k of the features is the audio of frame k with either
    text = json.dumps(facts, sort_keys=True)
    return Making(hashlib.sha256(text.encode()).hexdigest(), text)


def rounded(tensor: Tensor, cfg: RunConfig) -> Tensor:
    """A tensor in `data.artifact_dtype`: what is encoded live in training is rounded as files are."""
    import torch

    return tensor.to({"bfloat16": torch.bfloat16, "float32": torch.float32}[cfg.data.artifact_dtype])


def write_artifact(path: Path, name: str, tensor: Tensor, making: Making) -> None:
    """Writes a tensor, rounded already; raises UnusableWeights for numbers that are not finite, and what
    `write_safetensors` raises."""
    metadata = {_FINGERPRINT: making.fingerprint, _MADE: making.facts}
    write_safetensors(path, {name: _stored(tensor)}, metadata)


def check_artifact(path: Path, artifact: Artifact, making: Making) -> None:
    """Reads a file once through. Raises Stale for one of another making, UnusableWeights for damage."""
    header = read_header(path)
    if header.metadata.get(_FINGERPRINT) != making.fingerprint or artifact.name not in header.tensors:
        raise Stale("was made from something else", where=path)
    tensor = header.tensors[artifact.name]
    if nonfinite(read_whole(tensor), tensor.info.dtype):
        raise UnusableWeights(f"{artifact.name} holds numbers that are not finite", where=path)


def read_artifact(path: Path, name: str) -> Tensor:
    """The tensor of an artifact. Raises UnusableWeights."""
    import safetensors.torch

    read_header(path)
    return safetensors.torch.load_file(str(path))[name]


def write_older(path: Path, tensors: Mapping[str, Tensor], makings: Mapping[str, Making]) -> None:
    """A .pt file as published trainers read it: `entry` to tensor, and metadata that they ignore."""
    import torch

    from avatarctl.finite import is_finite

    metadata = {f"{_FINGERPRINT}.{entry}": making.fingerprint for entry, making in makings.items()}
    for entry, tensor in tensors.items():
        if not is_finite(tensor):
            raise UnusableWeights(f"{entry} holds numbers that are not finite", where=path)
    buffer = io.BytesIO()
    torch.save(
        {**{name: tensor.contiguous() for name, tensor in tensors.items()}, "metadata": metadata}, buffer
    )
    atomic_write_bytes(path, buffer.getvalue())


def write_padded(path: Path, tensor: Tensor, rows: int) -> None:
    """A prompt's [tokens, width] as published trainers read it: a bare tensor [1, rows, width] in a .pt file,
    with zero rows behind the prompt."""
    import torch

    padded = torch.zeros(1, rows, tensor.shape[1], dtype=tensor.dtype)
    padded[0, : len(tensor)] = tensor
    buffer = io.BytesIO()
    torch.save(padded, buffer)
    atomic_write_bytes(path, buffer.getvalue())


def check_older(path: Path, expected: Mapping[str, tuple[int | None, ...]]) -> dict[str, str]:
    """Looks at a .pt file without running anything in it; entry to fingerprint, "" where it states none.

    expected: the shape of an entry, None for any length. Raises UnusableWeights for what is no such file (no
    dictionary, another rank, not finite, executable), Stale where an entry has another shape.
    """
    import torch

    found = read_pickle(path).tensors  # refuses what would be executed
    for entry, shape in expected.items():
        if entry not in found:
            continue
        tensor: StoredTensor = found[entry]
        if len(tensor.info.shape) != len(shape):
            raise UnusableWeights(
                f"{entry} has shape {list(tensor.info.shape)}, rank {len(shape)} is expected", where=path
            )
        if nonfinite(read_whole(tensor), tensor.info.dtype):
            raise UnusableWeights(f"{entry} holds numbers that are not finite (NaN or Inf)", where=path)
        if any(want not in (None, have) for want, have in zip(shape, tensor.info.shape, strict=True)):
            expects = [size or "any" for size in shape]
            raise Stale(
                f"is stale: {entry} has shape {list(tensor.info.shape)}, and the clip's frames ask for "
                f"{expects}",
                where=path,
            )
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    stated = loaded.get("metadata") if isinstance(loaded, dict) else None
    stated = stated if isinstance(stated, dict) else {}
    return {entry: str(stated.get(f"{_FINGERPRINT}.{entry}", "")) for entry in found}


def _stored(tensor: Tensor) -> StoredTensor:
    import torch

    held = tensor.detach().cpu().contiguous()
    if held.dtype == torch.bfloat16:
        return ArrayTensor(held.view(torch.int16).numpy().view("<u2"), "BF16")
    return ArrayTensor(held.to(torch.float32).numpy(), "F32")
