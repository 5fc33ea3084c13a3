"""Files of torch.save (.pt, .pth, .bin, .ckpt), read without carrying out what strangers wrote.

Two formats: a zip archive (torch 1.6 and newer) and the older row of pickles. Which one it is, is found from
the bytes, never from the name. The pickle is looked through first (`pickle_scan`). Then:

- zip: an ordinary pickle is followed without torch (`pickle_reading`), any other one torch reads with
  `weights_only=True` onto the meta device, so that no tensor is read. Either way it is known where in the
  file each storage lies; that is checked against the archive, and the tensors stay lazy.
- older format: torch reads it with `weights_only=True`, once with fake tensors, which gives the sizes, then
  for real and whole, because its storages have no directory; torch compares each with the size that the file
  states before it reads it.
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
from avatarctl.files.pickle_reading import (
    TORCH_DTYPES,
    PickleContents,
    PickledTensor,
    View,
    read_plain,
)
from avatarctl.files.pickle_scan import MAX_PICKLE, code_refused, is_plain_pickle, scan_pickle
from avatarctl.files.safetensors_file import is_possible_shape, refuse_placeholder
from avatarctl.files.stamp import FileStamp
from avatarctl.files.state_dict import TensorKind, Wrapper, open_wrappers, tensors_in
from avatarctl.files.strict_json import clip, file_size
from avatarctl.files.tensors import DTYPES, Array, ArrayTensor, FileTensor, StoredTensor, TensorInfo
from avatarctl.files.zip_archive import Record, is_ordinary, read_records, storage_offsets

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

_IDENTITY: Final = ".data/serialization_id"
"""Digits, which torch reads as text."""

_FORMAT_VERSIONS: Final = {b"3\n", b"3"}
"""What torch.save writes as record "version", from torch 1.6 on; torch refuses some others."""

_KNOWN_RECORD: Final = re.compile(
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]+"
)
"""All that torch.save writes. Others may mean something to torch, `.data/version` for instance."""

_PICKLED: Final = TensorKind(
    PickledTensor, lambda tensor: DTYPES[tensor.view.dtype].floating and bool(tensor.view.shape)
)


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
        inner = zip(self.shape[1:], self.strides[1:], strict=True)
        begin = first * self.strides[0]
        end = last * self.strides[0] + sum((size - 1) * stride for size, stride in inner) + 1
        elements = self.base.read(begin, end)
        shape = (last - first + 1, *self.shape[1:])
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
    try:
        with path.open("rb") as file:
            start = file.read(512)
            refuse_placeholder(start, path)
            if not is_pickle(start):
                _refuse_other_things(start, file, path)
            found = _read_zip(file, size, path) if start.startswith(_ZIP) else _read_legacy(file, size, path)
    except OSError as error:
        raise UnusableWeights(f"cannot be read: {error.strerror}", where=path) from error
    return found


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
    kind = "text" if start.isascii() and b"\0" not in start else "other data"
    raise UnusableWeights(f"is not a weight file: neither safetensors nor torch.save ({kind})", where=path)


def _read_zip(file: BinaryIO, size: int, path: Path) -> PickleFile:
    stamp = FileStamp.of(os.fstat(file.fileno()))
    records = read_records(file, size, path)
    contents = _small_records(file, records, path)
    storages = {record.offset: record for name, record in records.items() if name.startswith("data/")}
    placed: list[tuple[int, str, StoredTensor]] = []
    ordinary = is_ordinary(file, size, path)
    if ordinary and (plain := _read_without_torch(contents, records)) is not None:
        found, offsets = plain
        stated = open_wrappers(found.value, _PICKLED, path)
        wrappers, notes = stated.wrappers, stated.notes
        for name, one in stated.tensors.items():
            record = _record_at(offsets[one.key], one.view.storage_bytes, storages, name, path)
            placed.append(_lazy(name, one.view, record, path, stamp))
    else:
        file.seek(0)
        loaded = _torch_load(file, path, map_location="meta")
        opened = open_wrappers(loaded, _torch_kind(), path)
        wrappers, notes = opened.wrappers, opened.notes
        for name, tensor in opened.tensors.items():
            record = _record_at(*_torch_storage(tensor, path), storages, name, path)
            placed.append(_lazy(name, _torch_view(name, tensor, path), record, path, stamp))
    placed.sort(key=lambda item: item[0])
    return PickleFile("zip", {name: tensor for _, name, tensor in placed}, wrappers, notes)


def _read_without_torch(
    contents: Mapping[str, bytes], records: Mapping[str, Record]
) -> tuple[PickleContents, dict[str, int]] | None:
    """What an archive states, and the first byte of each storage; None where only torch can tell.

    contents: of the records that hold no tensor, as `_small_records` has let them through.
    """
    if contents.get("version") not in _FORMAT_VERSIONS or not all(map(_KNOWN_RECORD.fullmatch, records)):
        return None
    if not contents.get(_IDENTITY, b"0").isdigit():
        return None
    alignment = int(contents.get(".storage_alignment", b"64")) if ".format_version" in contents else None
    if (found := read_plain(contents["data.pkl"])) is None:
        return None
    offsets = storage_offsets(found.storages, records, alignment)
    return None if offsets is None else (found, offsets)


def _small_records(file: BinaryIO, records: Mapping[str, Record], path: Path) -> dict[str, bytes]:
    """What torch reads whole, checked: the pickle, and a few numbers that it believes.

    An alignment of 0, for instance, ends the process with an arithmetic exception (torch 2.13), and so does
    one in `.Storage_Alignment`: torch does not tell upper from lower case.
    """
    contents: dict[str, bytes] = {}
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
        if name in ("data.pkl", _IDENTITY, *_NUMBERS):
            contents[name] = content
    return contents


def _record_at(offset: int, size: int, storages: Mapping[int, Record], name: str, path: Path) -> Record:
    """The record of a tensor's storage, `size` bytes from byte `offset` of the file on."""
    if (record := storages.get(offset)) is None:
        raise UnusableWeights(
            f"corrupt or repacked: the storage of {clip(name)!r} is not where torch.save puts it", where=path,
            fix="load and save it again with torch",
        )  # fmt: skip
    if record.size != size:
        raise _broken(name, f"has a storage of {size} bytes, its record holds {record.size}", path)
    return record


def _lazy(
    name: str, view: View, record: Record, path: Path, stamp: FileStamp
) -> tuple[int, str, StoredTensor]:
    """(first byte in the file, name, reader) of a tensor whose storage is `record`."""
    info = _checked(name, view, path)
    begin = record.offset + view.first * DTYPES[info.dtype].itemsize
    if _is_contiguous(view):
        return begin, name, FileTensor(path, begin, info, stamp)
    base = FileTensor(path, begin, TensorInfo(info.dtype, (view.extent,)), stamp)
    # A dimension of one element may state any stride; numpy takes none that leaves its numbers.
    strides = (0 if side == 1 else stride for side, stride in zip(info.shape, view.strides, strict=True))
    return begin, name, StridedTensor(base, info.shape, tuple(strides))


def _checked(name: str, view: View, path: Path) -> TensorInfo:
    """dtype and shape of a tensor that lies within its storage."""
    info = TensorInfo(view.dtype, view.shape)
    # torch checks no shape on the meta device: there it may be negative.
    if not is_possible_shape(info.shape, DTYPES[info.dtype].itemsize):
        raise _broken(name, f"has the impossible shape {clip(list(info.shape), 60)}", path)
    held = view.storage_bytes // DTYPES[info.dtype].itemsize
    if info.numel > held:
        shape = clip(list(info.shape), 60)
        raise _broken(name, f"has the shape {shape} over a storage of {held} elements", path)
    if view.first < 0 or min(view.strides, default=0) < 0 or view.first + view.extent > held:
        raise _broken(name, f"reaches outside its storage of {held} elements", path)
    return info


def _is_contiguous(view: View) -> bool:
    """Whether the elements lie in C order without gaps."""
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1 and stride != expected and 0 not in view.shape:
            return False
        expected *= size
    return True


def _torch_kind() -> TensorKind[torch.Tensor]:
    import torch

    return TensorKind(torch.Tensor, lambda tensor: tensor.is_floating_point() and tensor.dim() > 0)


def _torch_storage(tensor: torch.Tensor, path: Path) -> tuple[int, int]:
    """(first byte in the file, bytes) of the storage of a tensor on the meta device."""
    import torch

    storage = torch.Tensor.untyped_storage(tensor)
    if (offset := getattr(storage, "_checkpoint_offset", None)) is None:
        raise EnvironmentMissing(
            f"torch {torch.__version__} does not say where in a file a tensor lies", where=path,
            fix="install torch 2.13 to read this format",
        )  # fmt: skip
    return offset, storage.nbytes()


def _torch_view(name: str, tensor: torch.Tensor, path: Path) -> View:
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
        raise _broken(name, "is quantized, sparse or a lazy negation, which is unsupported", path)
    if (dtype := TORCH_DTYPES.get(str(tensor.dtype).removeprefix("torch."))) is None:
        raise _broken(name, f"has the unsupported dtype {tensor.dtype}", path)
    strides, first = torch.Tensor.stride(tensor), int(torch.Tensor.storage_offset(tensor))
    return View(
        dtype, tuple(tensor.shape), tuple(strides), first, torch.Tensor.untyped_storage(tensor).nbytes()
    )


def _broken(name: str, what: str, path: Path) -> UnusableWeights:
    return UnusableWeights(f"invalid: tensor {clip(name)!r} {what}", where=path)


def _read_legacy(file: BinaryIO, size: int, path: Path) -> PickleFile:
    file.seek(0)
    data = io.BytesIO(file.read(MAX_PICKLE))
    for _ in range(_LEGACY_PICKLES):
        scan_pickle(data, path)
    from torch._subclasses.fake_tensor import FakeTensorMode

    kind = _torch_kind()
    file.seek(0)
    with FakeTensorMode():
        shapes = _torch_load(file, path)
    declared = max((tensor.untyped_storage().nbytes() for tensor in tensors_in(shapes, kind.type)), default=0)
    if declared > size:
        raise UnusableWeights(
            f"corrupt or truncated: a storage of {declared} bytes in a file of {size}", where=path
        )
    file.seek(0)
    found = open_wrappers(_torch_load(file, path, map_location="cpu"), kind, path)
    notes = (*found.notes, "a torch file in the format from before 1.6: read whole into memory")
    tensors = {name: _in_memory(name, tensor, path) for name, tensor in found.tensors.items()}
    return PickleFile("legacy", tensors, found.wrappers, notes)


def _in_memory(name: str, tensor: torch.Tensor, path: Path) -> ArrayTensor:
    """A tensor that torch has read, as the array of its stored elements."""
    import torch

    info = _checked(name, _torch_view(name, tensor, path), path)
    # numpy has no bfloat16 or float8: the bits travel as integers of the same size.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    array = tensor.detach().contiguous().reshape(-1).view(bits).numpy()
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
