"""What a conversion is asked for, and whether it can be written where it is asked to be."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from avatarctl.atomic import disk_errors, ensure_writable_folder
from avatarctl.errors import OutputRefused, UsageError
from avatarctl.files.staging import refuse_folder
from avatarctl.weights.export import Target

__all__ = [
    "SUFFIX",
    "ConvertRequest",
    "check_companion",
    "check_names",
    "check_overlap",
    "check_place",
    "is_file",
]

SUFFIX: Final = ".safetensors"
_OTHER_SUFFIXES: Final = (".pt", ".pth", ".bin", ".ckpt", ".gguf", ".json", ".zip")


@dataclass(frozen=True)
class ConvertRequest:
    """What is asked.

    out: a name that ends in .safetensors is a file, any other a folder. base: for merge or extract. rank: of
    an extraction, None for what the difference needs. shard_bytes, dtype ("BF16"): None keeps what is
    there. audio_offset: states what no tensor tells. allow_nonfinite: write NaN and infinity instead of
    refusing them.
    """

    source: Path
    out: Path
    to: Target = "original"
    channels: int | None = None
    drop_channels: bool = False
    base: Path | None = None
    merge: bool = False
    strength: float = 1.0
    extract: bool = False
    rank: int | None = None
    shard_bytes: int | None = None
    dtype: str | None = None
    audio_offset: int | None = None
    allow_nonfinite: bool = False
    sha256: bool = False
    overwrite: bool = False


def is_file(out: Path) -> bool:
    return out.suffix == SUFFIX


def check_names(request: ConvertRequest) -> None:
    out = request.out
    if out.suffix.lower() in _OTHER_SUFFIXES:
        raise UsageError(
            f"{out.suffix} files are not written",
            where="--out",
            fix="name a .safetensors file or a folder",
        )
    if out.suffix.lower() == SUFFIX and not is_file(out):
        raise UsageError(f"the suffix is {SUFFIX}, in lower case", where="--out")
    if is_file(out) and request.shard_bytes is not None:
        raise UsageError(
            "shards need a folder", where="--shard-size", fix=f"--out {out.with_suffix('').name}"
        )
    if is_file(out) and request.to in ("diffusers", "peft"):
        raise UsageError(
            f"{request.to} reads a folder, not one file",
            where="--out",
            fix=f"--out {out.with_suffix('').name}",
        )
    if request.to == "comfyui" and request.shard_bytes is not None:
        raise UsageError("ComfyUI reads one file, not shards", where="--shard-size")


def _outputs(request: ConvertRequest) -> list[Path]:
    """Where something may come to stand."""
    out = request.out
    return [out, out.with_name(f"{out.stem}.patch{SUFFIX}")] if is_file(out) else [out]


def check_place(request: ConvertRequest) -> None:
    """Before anything is read, and leaving nothing behind."""
    out = request.out
    folder = out.absolute().parent
    with disk_errors(out):
        there = folder.is_dir()
    if not there:
        raise OutputRefused(f"the folder {folder} does not exist", where=out, fix="make it first")
    if _same(out, request.source):
        raise OutputRefused("is what is read", where=out, fix="choose another --out")
    if is_file(out):
        for path in _outputs(request):
            _refuse_file(path, overwrite=request.overwrite or path != out)  # perhaps there is no second file
    else:
        refuse_folder(out, overwrite=request.overwrite)
        if out.is_dir():
            ensure_writable_folder(out)  # what is in it will have to go
    ensure_writable_folder(folder)


def _refuse_file(path: Path, *, overwrite: bool) -> None:
    with disk_errors(path), suppress(FileNotFoundError):  # nothing there, or a link that leads nowhere
        mode = path.stat().st_mode  # a loop of links is refused here
        if not stat.S_ISREG(mode):
            what = "is a folder, not a file" if stat.S_ISDIR(mode) else "is not a regular file"
            raise OutputRefused(what, where=path, fix="choose another --out")
    if not overwrite and os.path.lexists(path):
        raise OutputRefused("exists", where=path, fix="add --overwrite or choose another --out")


def check_overlap(request: ConvertRequest, sources: Sequence[Path]) -> None:
    """Nothing that is read is replaced, and nothing is added to a folder that is read."""
    for path in _outputs(request):
        if any(_same(path, file) for file in sources):
            raise OutputRefused("is one of the files that are read", where=path, fix="choose another --out")
    out = _real(request.out)
    if not is_file(request.out) and any(_real(file).is_relative_to(out) for file in sources):
        raise OutputRefused("holds files that are read", where=request.out, fix="choose another --out")
    for read in (request.source, request.base):
        if read is not None and read.is_dir() and out.is_relative_to(_real(read)):
            raise OutputRefused(
                f"lies inside {read}, which is read", where=request.out, fix="choose another --out"
            )


def _same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, links included."""
    try:
        return one.samefile(other)
    except OSError:  # one is not there, or no name at all: for the reader or writer to tell
        return _real(one) == _real(other)


def _real(path: Path) -> Path:
    """`Path.resolve` raises RuntimeError for a loop of links, which is for the reader or writer to tell."""
    return Path(os.path.realpath(path))


def check_companion(request: ConvertRequest) -> None:
    """Where it is known that there will be a second file."""
    if is_file(request.out):
        _refuse_file(_outputs(request)[1], overwrite=request.overwrite)
