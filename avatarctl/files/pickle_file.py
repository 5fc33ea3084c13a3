"""Files of torch.save (.pt, .pth, .bin, .ckpt), read without carrying out what strangers wrote.

Two formats: a zip archive (torch 1.6 and newer) and the older row of pickles. Which one it is, is found from
the bytes, never from the name. The pickle is looked through first (`pickle_scan`); then torch reads it with
`weights_only=True`:

- zip: onto the meta device, so that no tensor is read. torch notes where in the file each storage lies; that
  is checked against the archive, and the tensors stay lazy.
- older format: once with fake tensors, which gives the sizes, then for real and whole, because its storages
  have no directory; torch compares each with the size that the file states before it reads it.

torch is imported when the first pickle is read, and for nothing else here.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Literal

import numpy as np

from avatarctl.errors import EnvironmentMissing, UnusableWeights
from avatarctl.files.pickle_scan import (
    MAX_PICKLE,
    TORCH_DTYPES,
    code_refused,
    is_plain_pickle,
    scan_pickle,
)
from avatarctl.files.safetensors_file import is_possible_shape, is_text, refuse_placeholder
from avatarctl.files.stamp import FileStamp
from avatarctl.files.state_dict import Wrapper, open_wrappers, tensors_in
from avatarctl.files.strict_json import clip, file_size, reading
from avatarctl.files.tensors import DTYPES, Array, ArrayTensor, FileTensor, StoredTensor, TensorInfo
from avatarctl.files.zip_archive import Record, read_records

if TYPE_CHECKING:
    import torch

__all__ = ["PickleFile", "StridedTensor", "is_pickle", "read_pickle"]

Format = Literal["zip", "legacy"]

LEGACY_MAGIC: Final = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")
"""The number 0x1950a86a20f9469cfc6c as a pickle, behind two bytes that state the protocol
(torch/serialization.py, MAGIC_NUMBER)."""

_ZIP: Final = (b"PK\x03\x04", b"PK\x05\x06")
"""Signatures of the first member, and of an archive without any (APPNOTE.TXT 4.3.7, 4.3.16)."""

_LEGACY_PICKLES: Final = 5
"""magic number, protocol version, system, the object, names of the storages"""

_NUMBERS: Final = ("version", ".format_version", ".storage_alignment")
"""Records of a zip archive that hold one positive number."""


@dataclass(frozen=True)
class PickleFile:
    """tensors: by name as in the file, in the order of their bytes; wrappers, notes: as `Opened` has them."""

    format: Format
    tensors: Mapping[str, StoredTensor]
    wrappers: tuple[Wrapper, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class StridedTensor:
    """A transposed or otherwise strided view of consecutive elements of a file.

    base: the elements from the first to the last that the view touches; strides: in elements, none negative.
    A read takes the part of `base` that the rows touched lie in: for a transposed matrix nearly all of it.
    """

    base: FileTensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.base.info.dtype, self.shape)

    def read(self, start: int, stop: int) -> Array:
        if start >= stop:
            return np.empty(0, DTYPES[self.base.info.dtype].storage)
        row = self.info.numel // self.shape[0]
        first, last = start // row, (stop - 1) // row
        shape = (last - first + 1, *self.shape[1:])
        begin = first * self.strides[0]
        elements = self.base.read(begin, begin + _extent(shape, self.strides))
        steps = [stride * elements.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(elements, shape, steps, writeable=False)
        return np.ascontiguousarray(view).reshape(-1)[start - first * row : stop - first * row]


def is_pickle(start: bytes, *, of_torch: bool = True) -> bool:
    """Whether a file that begins with these bytes (16 or more) comes from torch.save, or is any pickle.

    Four bytes of a zip: two would also be the beginning of a safetensors header of 19280 bytes.
    """
    pickle = start[:1] == b"\x80" and (not of_torch or start[2:].startswith(LEGACY_MAGIC))
    return pickle or start.startswith(_ZIP)


def read_pickle(path: Path) -> PickleFile:
    """The tensors of a file of torch.save; nothing is run, and no zip archive is read into memory.

    Raises UnusableWeights (and PathNotFound).
    """
    size = file_size(path)
    with reading(path), path.open("rb") as file:
        start = file.read(512)
        refuse_placeholder(start, path)
        if not is_pickle(start):
            _refuse_other_things(start, file, path)
        return _read_zip(file, size, path) if start.startswith(_ZIP) else _read_legacy(file, size, path)


def _refuse_other_things(start: bytes, file: BinaryIO, path: Path) -> None:
    """Names what else may lie under the name of a pickle."""
    file.seek(0)
    if start[257:262] == b"ustar":
        what = "is a tar archive (the oldest torch format or something else), which is unsupported"
        raise UnusableWeights(what, where=path, fix="load and save it again with torch.save")
    if start.startswith(b"GGUF"):
        raise UnusableWeights("is a GGUF file, which is unsupported", where=path)
    if is_plain_pickle(io.BytesIO(file.read(MAX_PICKLE)), path):
        raise UnusableWeights("refused: it is a plain pickle, not a file of torch.save", where=path)
    kind = "text" if is_text(start) else "other data"
    raise UnusableWeights(f"is not a weight file: neither safetensors nor torch.save ({kind})", where=path)


def _read_zip(file: BinaryIO, size: int, path: Path) -> PickleFile:
    stamp = FileStamp.of(os.fstat(file.fileno()))
    records = read_records(file, size, path)
    _check_small_records(file, records, path)
    storages = {record.offset: record.size for name, record in records.items() if name.startswith("data/")}
    file.seek(0)
    found = open_wrappers(_torch_load(file, path, map_location="meta"), path)
    placed = [_lazy(name, tensor, storages, path, stamp) for name, tensor in found.tensors.items()]
    placed.sort(key=lambda item: item[0])
    tensors = {name: tensor for _, name, tensor in placed}
    return PickleFile("zip", tensors, found.wrappers, found.notes)


def _check_small_records(file: BinaryIO, records: Mapping[str, Record], path: Path) -> None:
    """What torch reads whole: the pickle, and a few numbers that it believes.

    An alignment of 0, for instance, ends the process with an arithmetic exception (torch 2.13), and so does
    one in `.Storage_Alignment`: torch does not tell upper from lower case.
    """
    for name, record in records.items():
        if name.startswith("data/"):
            continue
        if record.size > MAX_PICKLE:
            raise UnusableWeights(f"refused: record {clip(name)} has {record.size} bytes", where=path)
        file.seek(record.offset)
        content = file.read(record.size)
        if name == "data.pkl":
            scan_pickle(io.BytesIO(content), path)
        elif name.lower() == "byteorder" and content != b"little":
            raise UnusableWeights(f"has the byte order {clip(content, 20)}; only little is read", where=path)
        elif name.lower() in _NUMBERS and not re.fullmatch(rb"[1-9][0-9]{0,6}\n?", content):
            raise UnusableWeights(f"corrupt: record {name} holds {clip(content, 20)}", where=path)


def _lazy(
    name: str, tensor: torch.Tensor, storages: Mapping[int, int], path: Path, stamp: FileStamp
) -> tuple[int, str, StoredTensor]:
    """(first byte in the file, name, reader) of a tensor on the meta device.

    storages: bytes by place of the records of the archive that hold one storage each.
    """
    begin = _storage_begin(name, tensor, storages, path)
    info, strides = _checked(name, tensor, path)
    begin += int(tensor.storage_offset()) * tensor.element_size()
    if tensor.is_contiguous():
        return begin, name, FileTensor(path, begin, info, stamp)
    # A dimension of one element may state any stride; numpy takes none that leaves its numbers.
    strides = tuple(0 if side == 1 else stride for side, stride in zip(info.shape, strides, strict=True))
    base = FileTensor(path, begin, TensorInfo(info.dtype, (_extent(info.shape, strides),)), stamp)
    return begin, name, StridedTensor(base, info.shape, strides)


def _storage_begin(name: str, tensor: torch.Tensor, storages: Mapping[int, int], path: Path) -> int:
    """First byte in the file of the storage of a tensor on the meta device, which a record must fill."""
    import torch

    storage = tensor.untyped_storage()
    offset: int | None = getattr(storage, "_checkpoint_offset", None)
    if offset is None:
        raise EnvironmentMissing(
            f"torch {torch.__version__} does not say where in a file a tensor lies", where=path,
            fix="install torch 2.13 to read this format",
        )  # fmt: skip
    if offset not in storages:
        raise UnusableWeights(
            f"corrupt or repacked: the storage of {clip(name)!r} is not where torch.save puts it", where=path,
            fix="load and save it again with torch",
        )  # fmt: skip
    if storages[offset] != storage.nbytes():
        what = f"has a storage of {storage.nbytes()} bytes, its record holds {storages[offset]}"
        raise _broken(name, what, path)
    return offset


def _checked(name: str, tensor: torch.Tensor, path: Path) -> tuple[TensorInfo, tuple[int, ...]]:
    """What a tensor is, and its strides in elements; it lies within its storage.

    torch checks no view on the meta device: there even a size may be negative.
    """
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
        raise _broken(name, "is quantized, sparse or a lazy negation, which is unsupported", path)
    if (dtype := TORCH_DTYPES.get(str(tensor.dtype).removeprefix("torch."))) is None:
        raise _broken(name, f"has the unsupported dtype {tensor.dtype}", path)
    info, strides, first = TensorInfo(dtype, tuple(tensor.shape)), tensor.stride(), tensor.storage_offset()
    shape = clip(list(info.shape), 60)
    if not is_possible_shape(info.shape, tensor.element_size()):
        raise _broken(name, f"has the impossible shape {shape}", path)
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    if info.numel > held:
        raise _broken(name, f"has the shape {shape} over a storage of {held} elements", path)
    if first < 0 or min(strides, default=0) < 0 or first + _extent(info.shape, strides) > held:
        raise _broken(name, f"reaches outside its storage of {held} elements", path)
    return info, strides


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a view, whose strides are in elements and not negative."""
    if 0 in shape:
        return 0
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1


def _broken(name: str, what: str, path: Path) -> UnusableWeights:
    return UnusableWeights(f"invalid: tensor {clip(name)!r} {what}", where=path)


def _read_legacy(file: BinaryIO, size: int, path: Path) -> PickleFile:
    file.seek(0)
    data = io.BytesIO(file.read(MAX_PICKLE))
    for _ in range(_LEGACY_PICKLES):
        scan_pickle(data, path)
    from torch._subclasses.fake_tensor import FakeTensorMode

    file.seek(0)
    with FakeTensorMode():
        shapes = _torch_load(file, path)
    declared = max((tensor.untyped_storage().nbytes() for tensor in tensors_in(shapes)), default=0)
    if declared > size:
        raise UnusableWeights(
            f"corrupt or truncated: a storage of {declared} bytes in a file of {size}", where=path
        )
    file.seek(0)
    found = open_wrappers(_torch_load(file, path, map_location="cpu"), path)
    notes = (*found.notes, "a torch file in the format from before 1.6: read whole into memory")
    tensors = {name: _in_memory(name, tensor, path) for name, tensor in found.tensors.items()}
    return PickleFile("legacy", tensors, found.wrappers, notes)


def _in_memory(name: str, tensor: torch.Tensor, path: Path) -> ArrayTensor:
    """A tensor that torch has read, as the array of its stored elements."""
    import torch

    info, _ = _checked(name, tensor, path)
    # numpy has no bfloat16 or float8: what travels are bytes.
    array = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return ArrayTensor(array.view(DTYPES[info.dtype].storage).reshape(info.shape), info.dtype)


def _torch_load(file: BinaryIO, path: Path, map_location: str | None = None) -> object:
    """torch.load with weights_only, its warnings dropped and its errors in one line.

    Broken files lead it to exceptions of every kind (KeyError, AttributeError, AssertionError, ...).
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location=map_location, weights_only=True, mmap=False)
    except Exception as error:
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        if forbidden := re.search(r"GLOBAL ([\w.]+)", text):
            raise code_refused(forbidden[1], path) from error
        if lost := re.search(r"failed locating file ([^\s:]+)", text):
            what = f"corrupt: the storage record {clip(lost[1])} is missing"
        elif "expected key '0'" in text:
            what = "corrupt: the first storage record, data/0, is missing or not the first"
        else:
            first = next(iter(text.splitlines()), "")
            what = f"corrupt or unsupported: torch cannot read it ({type(error).__name__}: {clip(first)})"
        raise UnusableWeights(what, where=path) from error
