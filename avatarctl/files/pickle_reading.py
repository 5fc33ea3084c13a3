"""The pickle of an ordinary torch.save, read without torch: importing it takes longer than all the rest.

This is no unpickler. It follows the few instructions of protocol 2 that torch.save writes for dictionaries of
tensors, on values of its own: nothing is imported, called or looked up as an attribute. The name of a
function or class is a text, and only what is known here to come out of it is noted: an empty OrderedDict, or
where in which storage a tensor lies (torch 2.13: torch/_utils.py, `_rebuild_tensor_v2` and its neighbours).

Whatever is not certain is "not plain", and left to torch.load with `weights_only=True`: other names, numbers
of another kind, views that leave their storage, a stack that does not come out even. So a file is read here
only where torch reads the same (torch/_weights_only_unpickler.py), and is refused as if torch had read it.
"""

from __future__ import annotations

import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Final

from avatarctl.files.safetensors_file import is_possible_shape
from avatarctl.files.tensors import DTYPES

__all__ = ["TORCH_DTYPES", "PickleContents", "PickledTensor", "View", "read_plain"]

TORCH_DTYPES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Dtypes of torch, as in `DTYPES`."""

_STORAGES: Final = {
    "torch DoubleStorage": "F64", "torch FloatStorage": "F32", "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16", "torch LongStorage": "I64", "torch IntStorage": "I32",
    "torch ShortStorage": "I16", "torch CharStorage": "I8", "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}  # fmt: skip
"""Classes of storages with a dtype (torch/storage.py, `_dtype_to_storage_type_map`)."""

_UNTYPED: Final = "torch.storage UntypedStorage"
"""The class of the storages of all newer dtypes (float8, uint16): counted in bytes."""

_DICTIONARY: Final = "collections OrderedDict"
_TENSOR: Final = "torch._utils _rebuild_tensor_v2"
_TENSOR_OF_DTYPE: Final = "torch._utils _rebuild_tensor_v3"
_PARAMETER: Final = "torch._utils _rebuild_parameter"

_LARGEST: Final = 2**63 - 1
_KEY: Final = re.compile(r"0|[1-9][0-9]{0,7}")
"""torch.save numbers its storages."""


@dataclass(frozen=True)
class View:
    """A tensor as a part of a storage.

    dtype: as in `DTYPES`; strides, first: in elements; storage_bytes: of the whole storage.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    storage_bytes: int

    @property
    def extent(self) -> int:
        """Elements from the first to the last that it touches, where no stride is negative."""
        if 0 in self.shape:
            return 0
        return sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)) + 1


@dataclass(frozen=True)
class PickledTensor:
    """key: of the storage; its bytes are the record data/KEY of the archive."""

    key: str
    view: View


@dataclass(frozen=True)
class PickleContents:
    """value: of dict, list, tuple, str, int, float, bool, None and PickledTensor, cycles included;
    storages: bytes of each by key, in the order in which the pickle asks for them."""

    value: object
    storages: Mapping[str, int]


@dataclass(frozen=True)
class _Name:
    """A function or class: "module name"."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """dtype: as in `DTYPES`, None for bytes of any."""

    key: str
    dtype: str | None
    nbytes: int


_VIEW: Final = (_Storage, int, tuple, tuple, bool, OrderedDict)
"""What a tensor is rebuilt from: storage, first element, shape, strides, asks for a gradient, its hooks."""


class _NotPlainError(Exception):
    """Something that only torch may judge."""


def read_plain(data: bytes) -> PickleContents | None:
    """What a pickle states that `scan_pickle` has let through; None where it is not plain."""
    try:
        return _Reader(data).read()
    except _NotPlainError:
        return None


class _Reader:
    """A stack, its parts below each mark, and the memo, just as torch's reader keeps them."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._stack: list[object] = []
        self._below: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self._storages: dict[str, _Storage] = {}
        self._steps: dict[str, Callable[[], None]] = {
            "NONE": lambda: self._push(None),
            "NEWTRUE": lambda: self._push(True),
            "NEWFALSE": lambda: self._push(False),
            "EMPTY_TUPLE": lambda: self._push(()),
            "EMPTY_LIST": lambda: self._push([]),
            "EMPTY_DICT": lambda: self._push({}),
            "MARK": self._mark,
            "TUPLE": lambda: self._push(tuple(self._since_mark())),
            "TUPLE1": lambda: self._push(tuple(self._pop(1))),
            "TUPLE2": lambda: self._push(tuple(self._pop(2))),
            "TUPLE3": lambda: self._push(tuple(self._pop(3))),
            "APPEND": lambda: self._append(self._pop(1)),
            "APPENDS": lambda: self._append(self._since_mark()),
            "SETITEM": lambda: self._set_items(self._pop(2)),
            "SETITEMS": lambda: self._set_items(self._since_mark()),
            "BINPERSID": self._storage,
            "REDUCE": self._reduce,
            "BUILD": self._build,
        }

    def read(self) -> PickleContents:
        argument: Any
        for opcode, argument, at in pickletools.genops(self._data):
            name = opcode.name
            if (step := self._steps.get(name)) is not None:
                step()
            elif name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
                self._push(argument)
            elif name in ("BINPUT", "LONG_BINPUT"):
                self._memo[argument] = self._top()
            elif name in ("BINGET", "LONG_BINGET") and argument in self._memo:
                self._push(self._memo[argument])
            elif name == "GLOBAL":
                self._name(argument, at or 0)
            elif name == "STOP":
                break
            elif name != "PROTO" or at != 0:
                raise _NotPlainError
        value = self._top()
        if self._below or len(self._stack) != 1 or not _is_plain(value):
            raise _NotPlainError
        return PickleContents(value, {key: storage.nbytes for key, storage in self._storages.items()})

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _top(self) -> object:
        if not self._stack:
            raise _NotPlainError
        return self._stack[-1]

    def _pop(self, count: int) -> list[object]:
        """The uppermost `count` values, which must lie above the last mark."""
        if len(self._stack) < count:
            raise _NotPlainError
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[object]:
        if not self._below:
            raise _NotPlainError
        values, self._stack = self._stack, self._below.pop()
        return values

    def _append(self, items: list[object]) -> None:
        target = self._top()
        if type(target) is not list:
            raise _NotPlainError
        target.extend(items)

    def _set_items(self, items: list[object]) -> None:
        """Of a key that comes twice the last value stays, in the place of the first, as everywhere."""
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise _NotPlainError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise _NotPlainError
            target[key] = value

    def _name(self, text: str, at: int) -> None:
        """pickletools decodes escapes in a name, torch does not: both must see the same."""
        if not self._data.startswith(f"c{text.replace(' ', chr(10), 1)}\n".encode(), at):
            raise _NotPlainError
        self._push(_Name(text))

    def _storage(self) -> None:
        """("storage", class, key, device, elements): the device is where it was saved from, and unused."""
        word, kind, key, _, numel = _typed(self._pop(1)[0], str, _Name, str, str, int)
        dtype = _STORAGES.get(kind.text)
        nbytes = numel * (DTYPES[dtype].itemsize if dtype else 1)
        if word != "storage" or not _KEY.fullmatch(key) or not 0 <= nbytes <= _LARGEST:
            raise _NotPlainError
        storage = _Storage(key, dtype, nbytes)
        # One storage under two dtypes or sizes: what it then is depends on how torch is called.
        if (dtype is None and kind.text != _UNTYPED) or self._storages.setdefault(key, storage) != storage:
            raise _NotPlainError
        self._push(storage)

    def _reduce(self) -> None:
        function, arguments = self._pop(2)
        if not isinstance(function, _Name):
            raise _NotPlainError
        result: object
        if function.text == _DICTIONARY:
            _typed(arguments)
            result = OrderedDict()
        elif function.text == _TENSOR:
            view = _typed(arguments, *_VIEW)
            result = _with_gradient(_tensor(view, view[0].dtype), view[4], view[5])
        elif function.text == _TENSOR_OF_DTYPE:
            view = _typed(arguments, *_VIEW, _Name)
            module, _, dtype = view[6].text.partition(" ")
            # torch asks for the gradient before it fills the tensor here, which may not be possible.
            if module != "torch" or view[0].dtype is not None or view[4]:
                raise _NotPlainError
            result = _with_gradient(_tensor(view, TORCH_DTYPES.get(dtype)), view[4], view[5])
        elif function.text == _PARAMETER:
            result = _with_gradient(*_typed(arguments, PickledTensor, bool, OrderedDict))
        else:
            raise _NotPlainError
        self._push(result)

    def _build(self) -> None:
        """`Module.state_dict()` keeps the versions of its modules as an attribute; no tensor is in there."""
        instance, state = self._pop(2)
        if type(instance) is not OrderedDict or type(state) is not dict or state.keys() - {"_metadata"}:
            raise _NotPlainError
        self._push(instance)


def _typed(value: object, *kinds: type) -> tuple[Any, ...]:
    """`value` as a tuple of exactly these types; a bool is no int."""
    if type(value) is not tuple or tuple(map(type, value)) != kinds:
        raise _NotPlainError
    return value


def _tensor(arguments: tuple[Any, ...], dtype: str | None) -> PickledTensor:
    """A tensor (`_VIEW`) that lies within its storage: for others torch enlarges the storage, or gives up."""
    storage, first, shape, strides = arguments[:4]
    if dtype is None or len(shape) != len(strides):
        raise _NotPlainError
    view = View(dtype, _sizes(shape), _sizes(strides), _sizes((first,))[0], storage.nbytes)
    itemsize = DTYPES[dtype].itemsize
    if not is_possible_shape(view.shape, itemsize) or (view.first + view.extent) * itemsize > storage.nbytes:
        raise _NotPlainError
    return PickledTensor(storage.key, view)


def _sizes(values: tuple[object, ...]) -> tuple[int, ...]:
    sizes = tuple(value for value in values if type(value) is int and 0 <= value <= _LARGEST)
    if len(sizes) < len(values):
        raise _NotPlainError
    return sizes


def _with_gradient(tensor: PickledTensor, grad: bool, hooks: Mapping[object, object]) -> PickledTensor:
    """`tensor`, where torch lets it ask for a gradient."""
    if hooks or (grad and not DTYPES[tensor.view.dtype].floating):
        raise _NotPlainError
    return tensor


def _is_plain(value: object) -> bool:
    """Whether no name and no storage is left within; what is met twice is looked at once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
        elif not isinstance(item, (str, int, float, NoneType, PickledTensor)):
            return False
    return True
