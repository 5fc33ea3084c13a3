"""Writing safetensors files of any size in a few blocks of memory, whole or not at all.

The format (an 8-byte length, a JSON header, raw bytes; github.com/huggingface/safetensors, "Format") puts all
names, dtypes and shapes first. A lazy `StoredTensor` knows those without being read, so the header is written
before the first number, and then one block after another: read, checked, written.

What the file was made from is written into it: `avatarctl.sources` in the metadata holds the name and a hash
of every source file (`hashes.py` says which). Hashing runs beside the copy; its digits have a fixed number,
so the header is written with zeros and once more, at the same length, before the file gets its name.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from avatarctl.atomic import atomic_path, disk_errors
from avatarctl.errors import UnusableWeights, WriteFailed
from avatarctl.files.finite import nonfinite, nonfinite_file
from avatarctl.files.hashes import FileDigest, FileHashes
from avatarctl.files.output_file import OutputFile
from avatarctl.files.tensors import (
    BLOCK_BYTES,
    DTYPES,
    Array,
    FileTensor,
    StoredTensor,
    TensorInfo,
    block_ranges,
    size_text,
)

__all__ = [
    "SOURCES_KEY",
    "require_space",
    "shard_names",
    "write_safetensors",
    "write_sharded",
]

SOURCES_KEY: Final = "avatarctl.sources"
"""Metadata key of the files that a file was made from: JSON [{"name": ..., "sha256": ...}], for large files
`sampled_sha256` instead, or both."""

_MAX_HEADER_BYTES: Final = 100_000_000
"""Readers refuse longer headers (safetensors, MAX_HEADER_SIZE)."""
_COPY_BYTES: Final = 1 << 20
"""Blocks of tensors that stay as they are in their file: within the processor's cache, and small enough that
their memory is not given back and faulted in again for every block."""
_NAME_CHARS: Final = 100


def write_safetensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    *,
    allow_nonfinite: bool = False,
    sources: Sequence[Path] = (),
    hashes: FileHashes | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes `tensors`, in their order, as one safetensors file; the same input gives the same bytes.

    metadata: without `avatarctl.sources`, which is made from `sources`, the files that were read.
    hashes: of somebody who writes more than one file from these sources, or has begun with them already.
    progress: called with the bytes of tensors written so far.

    An older file of this name stays as it was until the new one is complete and on the disk. That it is none
    of the sources, and that nothing else stands there, is for the caller to know (`convert_request.py`).

    Raises:
        OutputRefused: the place cannot be written.
        WriteFailed: not enough space.
        UnusableWeights: a tensor holds NaN or infinity (unless allowed), cannot be read, or has a name
            that the format cannot hold.
    """
    shard = _Shard(path, tensors, metadata, sources)
    with atomic_path(path) as temporary:
        _write({temporary: shard}, hashes, _Meter(progress), allow_nonfinite=allow_nonfinite)


def write_sharded(
    folder: Path,
    stem: str,
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    shard_bytes: int,
    *,
    allow_nonfinite: bool = False,
    sources: Sequence[Path] = (),
    hashes: FileHashes | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Writes `tensors` as shards of at most `shard_bytes` of numbers and an index that names them.

    Tensors are packed in their order and never split, so one that is larger makes a larger shard. What
    fits into one shard becomes `STEM.safetensors` without an index. `folder` is an empty one that
    `staged_folder` lends: that makes the files a set, which appears whole or not at all.

    Returns the files written, the index last. Raises as `write_safetensors`.
    """
    packed = _pack(tensors, shard_bytes)
    finals = [folder / name for name in shard_names(stem, tensors, shard_bytes)]
    shards = {path: _Shard(path, part, metadata, sources) for path, part in zip(finals, packed, strict=False)}
    _write(shards, hashes, _Meter(progress), allow_nonfinite=allow_nonfinite)
    if len(shards) > 1:
        with disk_errors(finals[-1]):
            finals[-1].write_bytes(_index(list(shards.values())))
    return finals


def shard_names(stem: str, tensors: Mapping[str, StoredTensor], shard_bytes: int) -> list[str]:
    """Plain names of what `write_sharded` writes: the shards, then the index if there are several."""
    count = len(_pack(tensors, shard_bytes))
    if count == 1:
        return [f"{stem}.safetensors"]
    shards = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [*shards, f"{stem}.safetensors.index.json"]


def _write(
    shards: Mapping[Path, _Shard], hashes: FileHashes | None, meter: _Meter, *, allow_nonfinite: bool
) -> None:
    """Writes each file at its place; the hashes of the sources come last, as they take longest."""
    first = next(iter(shards.values()))
    sources = first.sources
    with FileHashes() if hashes is None else nullcontext(hashes) as begun:
        begun.start(sources)
        placeholders = begun.placeholders(sources)
        require_space(
            first.path, sum(len(shard.header(placeholders)) + shard.nbytes for shard in shards.values())
        )
        for place, shard in shards.items():
            shard.write(place, begun, meter, allow_nonfinite=allow_nonfinite)
        for place, shard in shards.items():
            shard.sign(place, begun.digests(sources))


class _Meter:
    """Counts the bytes of one call over all its files."""

    def __init__(self, progress: Callable[[int], None] | None) -> None:
        self._progress = progress
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done)


@dataclass(frozen=True)
class _Shard:
    """One file to be written."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    sources: Sequence[Path]

    @property
    def nbytes(self) -> int:
        return sum(tensor.info.nbytes for tensor in self.tensors.values())

    def header(self, digests: Sequence[FileDigest]) -> bytes:
        """Length and JSON, padded to a multiple of 8 bytes."""
        metadata = dict(self.metadata)
        if self.sources:
            entries = zip(self.sources, digests, strict=True)
            metadata[SOURCES_KEY] = json.dumps(
                [{"name": path.name} | digest.entries() for path, digest in entries]
            )
        return _header({name: tensor.info for name, tensor in self.tensors.items()}, metadata, self.path)

    def write(self, place: Path, hashes: FileHashes, meter: _Meter, *, allow_nonfinite: bool) -> None:
        """Header and tensors; raises what `hashes` met as soon as it is known."""
        with disk_errors(self.path):
            out = OutputFile(place)
        # Flushed at its end: the disk works while the hashes are finished, and `sign` leaves one page.
        with disk_errors(self.path, refusals=False), out as file:
            file.write(memoryview(self.header(hashes.placeholders(self.sources))))
            for name, tensor in self.tensors.items():
                for block in _blocks(tensor):
                    if not allow_nonfinite and nonfinite(block, tensor.info.dtype):
                        raise _not_finite(name, tensor, self)
                    file.write(block.view(np.uint8).data)
                    meter.add(block.nbytes)
                    hashes.check()

    def sign(self, place: Path, digests: Sequence[FileDigest]) -> None:
        """Writes the header once more, now with the hashes of the sources."""
        if self.sources:
            with disk_errors(self.path, refusals=False), place.open("r+b") as file:
                file.write(self.header(digests))


def _header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], path: Path) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, info in infos.items():
        if name == "__metadata__":
            raise UnusableWeights("a tensor cannot be named __metadata__ in safetensors", where=path)
        end = offset + info.nbytes
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    try:
        text = json.dumps(entries, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which no JSON reader takes
        cut = error.object[max(error.start - 20, 0) : error.end + 20]
        raise UnusableWeights(f"a name is not valid Unicode: {cut}", where=path) from error
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise UnusableWeights(f"{len(infos)} tensors need a longer header than safetensors has", where=path)
    return struct.pack("<Q", len(text)) + text


def _blocks(tensor: StoredTensor) -> Iterator[Array]:
    # What is copied as it is travels best within the processor's cache; what is computed wants large blocks.
    size = _COPY_BYTES if isinstance(tensor, FileTensor) else BLOCK_BYTES
    for start, stop in block_ranges(tensor.info, size):
        yield _read_block(tensor, start, stop)


def _read_block(tensor: StoredTensor, start: int, stop: int) -> Array:
    block = tensor.read(start, stop)
    if block.shape != (stop - start,) or block.dtype != DTYPES[tensor.info.dtype].storage:
        # One element too few would shift every tensor behind it.
        raise RuntimeError(f"{tensor.info}: [{start}, {stop}) was read as {block.dtype} {block.shape}")
    return np.ascontiguousarray(block)


def _not_finite(name: str, tensor: StoredTensor, shard: _Shard) -> UnusableWeights:
    """Names what is to blame: the file that was read, where there is one."""
    cut = name if len(name) <= _NAME_CHARS else name[:_NAME_CHARS] + "..."
    return UnusableWeights(
        f"tensor {cut} ({tensor.info}) holds NaN or infinity; nothing is written",
        where=nonfinite_file(tensor) or (shard.sources[0] if len(shard.sources) == 1 else shard.path),
        fix="--allow-nonfinite writes it as it is",
    )


def _pack(tensors: Mapping[str, StoredTensor], shard_bytes: int) -> list[dict[str, StoredTensor]]:
    packed: list[dict[str, StoredTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.info.nbytes
        if packed[-1] and filled + size > shard_bytes:
            packed.append({})
            filled = 0
        packed[-1][name] = tensor
        filled += size
    return packed


def _index(shards: Sequence[_Shard]) -> bytes:
    document = {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {name: shard.path.name for shard in shards for name in shard.tensors},
    }
    return (json.dumps(document, indent=2) + "\n").encode()


def require_space(path: Path, needed: int) -> None:
    """Raises WriteFailed where the disk of the folder of `path` has less than `needed` bytes free.

    An early word instead of a late one; what else is written meanwhile is told when it happens.
    """
    with disk_errors(path):
        usage = shutil.disk_usage(path.parent)
    if usage.total and usage.free < needed:  # some network file systems state nothing at all
        raise WriteFailed(
            f"needs {size_text(needed)}, {size_text(usage.free)} free",
            where=path,
            fix="free some space or choose another --out",
        )
