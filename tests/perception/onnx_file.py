"""ONNX files of one node, written by hand: the `onnx` package is not needed for so little (onnx.proto3)."""

from __future__ import annotations

from pathlib import Path

FLOAT, FLOAT16 = 1, 10


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes((*digits, number))


def _field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _value(name: str, shape: tuple[int | str, ...], kind: int) -> bytes:
    dims = b"".join(_field(1, _field(1 if isinstance(each, int) else 2, each)) for each in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, kind) + _field(2, dims)))


def write_onnx(
    path: Path,
    operation: str = "Identity",
    shape: tuple[int | str, ...] = ("batch_size", 4, 3072, 256),
    kind: int = FLOAT,
) -> Path:
    """A network with input `input` and output `output` of one shape, and one operation between."""
    node = _field(1, "input") + _field(2, "output") + _field(4, operation)
    graph = _field(1, node) + _field(2, "graph")
    graph += _field(11, _value("input", shape, kind)) + _field(12, _value("output", shape, kind))
    path.write_bytes(_field(1, 8) + _field(8, _field(2, 13)) + _field(7, graph))
    return path
