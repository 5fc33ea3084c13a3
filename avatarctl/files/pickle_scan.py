"""What a pickle asks for, read from its instructions; nothing of it is carried out.

`torch.load(weights_only=True)` is the only thing here that ever carries out a pickle. It allows more than
weights need: `bytearray(2**40)` and tensors without data, for instance, and its errors are pages long. So a
pickle is looked through first (stdlib `pickletools`), and only the instructions of protocol 2 and the few
names that a dictionary of tensors needs get any further.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from avatarctl.errors import UnusableWeights
from avatarctl.files.strict_json import clip

__all__ = ["MAX_PICKLE", "TORCH_DTYPES", "code_refused", "is_plain_pickle", "scan_pickle"]

TORCH_DTYPES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Names of the dtypes of torch that a weight file may hold, as in `DTYPES`."""

MAX_PICKLE: Final = 4 << 20
"""Bytes of a pickle without its tensors. One byte may become an object of 100; 1100 tensors take 0.2 MB."""

MAX_OBJECTS: Final = 200_000
"""Calls, storages and containers in a pickle: three bytes may become a storage object of a kilobyte, one an
empty dictionary of 64 bytes. A tensor takes about ten."""

_INSTRUCTIONS: Final = frozenset(
    {
        "PROTO", "STOP", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID", "MARK", "TUPLE", "TUPLE1",
        "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "APPEND", "APPENDS", "SETITEM",
        "SETITEMS", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1",
        "BINUNICODE", "SHORT_BINSTRING", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    }
)  # fmt: skip
"""Protocol 2, the protocol of torch.save; the same set as torch's own reader has, without EMPTY_SET."""

_CREATORS: Final = frozenset(
    {
        "REDUCE", "NEWOBJ", "BUILD", "BINPERSID", "EMPTY_DICT", "EMPTY_LIST", "TUPLE", "TUPLE1", "TUPLE2",
        "TUPLE3",
    }
)  # fmt: skip

_NAMES: Final = frozenset(
    {
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.set",
        "__builtin__.set",
        "torch.Size",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
    }
)
_COMPLEX: Final = ("complex32", "complex64", "complex128")
"""Dtypes that are refused later, when the tensor that has one can be named."""

_UNSUPPORTED: Final = {
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without data (meta device)",
    "_rebuild_wrapper_subclass": "a tensor subclass",
    "_rebuild_from_type_v2": "a tensor subclass",
}
"""Harmless functions of torch whose results are not plain tensors."""


_NOT_A_PICKLE: Final = (ValueError, OverflowError, MemoryError)
"""What pickletools raises for other bytes; UnicodeError is a ValueError."""


def scan_pickle(data: BinaryIO, path: Path) -> None:
    """Reads one pickle up to its end and refuses what is not a plain structure of tensors.

    Raises UnusableWeights that names the first forbidden function or class.
    """
    created = 0
    for opcode, argument in _instructions(data, path):
        other_protocol = opcode == "PROTO" and argument != 2
        if opcode == "GLOBAL":
            _check_name(str(argument).replace(" ", ".", 1), path)
        elif other_protocol or opcode not in _INSTRUCTIONS:
            data.seek(0)
            is_plain_pickle(data, path)  # prefers the name that it asks for to the instruction
            if other_protocol:
                raise UnusableWeights(
                    f"refused: pickle protocol {argument} is not read", where=path,
                    fix="save it again with torch.save and its default protocol",
                )  # fmt: skip
            raise UnusableWeights(f"refused: unsupported pickle instruction {opcode}", where=path)
        created += opcode in _CREATORS
        if created > MAX_OBJECTS:
            raise UnusableWeights(f"refused: the pickle makes more than {MAX_OBJECTS} objects", where=path)


def is_plain_pickle(data: BinaryIO, path: Path) -> bool:
    """Whether these bytes are a whole pickle of any protocol.

    Raises UnusableWeights where it asks for a function or class that a dictionary of tensors does not need.
    """
    strings: list[str] = []
    first: str | None = None
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if first is None and opcode.name in ("GLOBAL", "INST"):
                first = str(argument).replace(" ", ".", 1)
            elif first is None and opcode.name == "STACK_GLOBAL":
                first = ".".join(strings) if len(strings) == 2 else "a name built while it runs"
            elif isinstance(argument, str):
                strings = [*strings[-1:], argument]
            elif opcode.name != "MEMOIZE":
                strings = []
    except _NOT_A_PICKLE:
        return False
    if first:
        _check_name(first, path)
    return True


def _instructions(data: BinaryIO, path: Path) -> Iterator[tuple[str, object]]:
    try:
        for opcode, argument, _ in pickletools.genops(data):
            yield opcode.name, argument
    except _NOT_A_PICKLE as error:
        raise UnusableWeights(
            "corrupt or truncated: its pickle breaks off, or is not a pickle", where=path
        ) from error


def _check_name(name: str, path: Path) -> None:
    module, _, attribute = name.rpartition(".")
    plain = module == "torch" and (attribute.endswith("Storage") or attribute in (*TORCH_DTYPES, *_COMPLEX))
    if plain or name in _NAMES:
        return
    if module in ("torch._utils", "torch._tensor") and attribute in _UNSUPPORTED:
        raise UnusableWeights(
            f"refused: it holds {_UNSUPPORTED[attribute]}, which is unsupported", where=path
        )
    raise code_refused(name, path)


def code_refused(name: str, path: Path) -> UnusableWeights:
    """The error for a pickle that asks for a function or class."""
    return UnusableWeights(
        f"refused: this pickle asks for {clip(name, 60)}, which could run code; "
        "only tensors are read (weights_only)",
        where=path,
        fix="get it as safetensors, or let its author save the state_dict alone",
    )
