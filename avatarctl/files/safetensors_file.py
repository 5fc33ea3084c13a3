"""The safetensors format, read by hand: neither torch nor the safetensors package is imported.

A file is 8 bytes (length of the header, little-endian), the header (a JSON object: name -> dtype, shape,
data_offsets; `__metadata__` -> strings) and the elements of all tensors, without gaps (format description
of safetensors 0.8). Only the header is read here; tensors are lazy.
"""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from avatarctl.errors import UnusableWeights
from avatarctl.files.stamp import FileStamp
from avatarctl.files.strict_json import clip, file_size, parse_object, reading
from avatarctl.files.tensors import DTYPES, FileTensor, TensorInfo

__all__ = ["Header", "is_possible_shape", "is_text", "read_header", "refuse_placeholder"]

MAX_HEADER: Final = 32 << 20
"""Bytes of a header. The format allows 100 MB, but two characters of JSON become up to 64 bytes of Python
objects; the header of a 14B model takes 0.2 MB."""

MAX_DIMENSIONS: Final = 64
"""numpy has no more."""

_LARGEST: Final = (1 << 63) - 1


@dataclass(frozen=True)
class Header:
    """tensors: in the order of their bytes; metadata: the strings of `__metadata__`."""

    tensors: Mapping[str, FileTensor]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """What a safetensors file declares, checked against the format and the size of the file.

    Raises UnusableWeights (and PathNotFound).
    """
    size = file_size(path)
    with reading(path), path.open("rb") as file:
        stamp = FileStamp.of(os.fstat(file.fileno()))
        start = file.read(512)
        refuse_placeholder(start, path)
        if size < 8:
            raise UnusableWeights(
                f"too small for the length of a header ({size} bytes); truncated", where=path
            )
        if is_text(start):
            raise UnusableWeights(
                f"is a text, not a weight file; it begins {_decoded(start)[:40]!r}",
                where=path,
                fix="read it: it may say why nothing was fetched; then download again",
            )
        length = int.from_bytes(start[:8], "little")
        if length > size - 8 or length < 2:
            raise UnusableWeights(
                f"the header length is invalid: {length} bytes declared, {size - 8} present; "
                "truncated, or not a safetensors file",
                where=path,
            )
        if length > MAX_HEADER:
            raise UnusableWeights(f"the header is too large: {length} bytes", where=path)
        file.seek(8)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise UnusableWeights("the header is invalid: it is not a JSON object", where=path)
    entries = parse_object(text, path, "the header is")
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    if not entries:
        raise UnusableWeights("holds no tensors", where=path)
    base = 8 + length
    found = {name: _entry(name, value, path, base, stamp) for name, value in entries.items()}
    tensors = dict(sorted(found.items(), key=lambda each: (each[1].offset, each[1].info.nbytes)))
    _refuse_gaps(tensors, base, size, path)
    return Header(tensors, metadata)


def refuse_placeholder(start: bytes, path: Path) -> None:
    """Raises UnusableWeights for what downloads often leave under the name of a weight file.

    start: the first bytes of the file, 512 are plenty.
    """
    if not start:
        raise UnusableWeights("is empty (0 bytes)", where=path, fix="download it again")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        raise UnusableWeights(
            "is a git LFS pointer, not the weights themselves", where=path, fix="run git lfs pull"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UnusableWeights(
            "is a saved web page (HTML), not a weight file", where=path,
            fix="download it again; a gated file needs a login",
        )  # fmt: skip


def is_text(start: bytes) -> bool:
    """Whether the first bytes of a file are text: UTF-8 without control characters, or UTF-16 by its mark.

    The length of a safetensors header always has zeros in it, as `MAX_HEADER` is below 2**32."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return True
    try:  # the last character may be cut
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return all(sign.isprintable() or sign.isspace() or sign == "\ufeff" for sign in text)


def _decoded(text: bytes) -> str:
    """The beginning of a text, without the mark of its encoding."""
    marked = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return text.decode("utf-16" if marked else "utf-8-sig", "replace")


def is_possible_shape(shape: Sequence[int], itemsize: int) -> bool:
    """Whether an array may have this shape: no negative sizes, and a size that fits into 63 bits even
    where another dimension is 0. itemsize: bytes of an element."""
    if len(shape) > MAX_DIMENSIONS or not all(0 <= size <= _LARGEST for size in shape):
        return False
    return math.prod(size for size in shape if size) * itemsize <= _LARGEST


def _metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise UnusableWeights("the header is invalid: __metadata__ holds strings only", where=path)
    return value


def _entry(name: str, value: Any, path: Path, base: int, stamp: FileStamp) -> FileTensor:
    """One tensor of the header, checked by itself; offsets count from byte `base` of the file."""

    def refuse(what: str) -> UnusableWeights:
        return UnusableWeights(f"the header is invalid: tensor {clip(name)!r} {what}", where=path)

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"has the unknown dtype {clip(dtype, 30)!r}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise refuse("has a shape that is not a list of non-negative integers")
    if not is_possible_shape(shape, DTYPES[dtype].itemsize):
        raise refuse(
            f"has the shape {clip(shape, 60)}: too many or too large dimensions, which would overflow"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int for at in offsets):
        raise refuse("has data_offsets that are not two integers")
    begin, end = offsets
    if not 0 <= begin <= end <= _LARGEST:
        raise refuse(f"has impossible data_offsets [{clip(begin, 25)}, {clip(end, 25)}]")
    if (needed := math.prod(shape) * DTYPES[dtype].itemsize) != end - begin:
        raise refuse(
            f"has the shape {clip(shape, 60)}, which takes {needed} bytes of {dtype}, "
            f"but its offsets hold {end - begin}"
        )
    return FileTensor(path, base + begin, TensorInfo(dtype, tuple(shape)), stamp)


def _refuse_gaps(tensors: Mapping[str, FileTensor], base: int, size: int, path: Path) -> None:
    """tensors: by offset; each byte of the file from `base` to `size` must belong to one of them."""
    at = base
    for name, tensor in tensors.items():
        if tensor.offset != at:
            kind = "overlap with the tensor before" if tensor.offset < at else "leave a hole before it"
            raise UnusableWeights(f"the header is invalid: the offsets of {clip(name)!r} {kind}", where=path)
        at += tensor.info.nbytes
    if at > size:
        raise UnusableWeights(
            f"truncated: {size - base} of {at - base} bytes of tensors are there; an interrupted download",
            where=path,
            fix="download it again",
        )
    if at < size:
        raise UnusableWeights(
            f"the header is invalid: no offset covers the last {size - at} bytes", where=path
        )
