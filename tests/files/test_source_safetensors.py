"""Reading safetensors: what the format says is read, everything else is refused in one line."""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from avatarctl.errors import PathNotFound, UnusableWeights
from avatarctl.files.safetensors_file import read_header
from avatarctl.files.source import open_weights
from avatarctl.files.tensors import read_whole


def entry(begin: int, end: int, *, shape: object = None, dtype: object = "U8") -> dict[str, object]:
    """A tensor of the header; one dimension of bytes unless something else is said."""
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def refusal(path: Path) -> str:
    """The message of the one acceptable outcome."""
    with pytest.raises(UnusableWeights) as caught:
        open_weights(path)
    message = str(caught.value)
    assert message.isprintable()
    assert str(path) in message
    assert len(message) < 500 + len(str(path))
    return message.removeprefix(f"{path}: ")


def test_what_the_safetensors_package_writes_is_read_bit_for_bit(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "matrix": random.standard_normal((7, 5)).astype(np.float32),
        "half": random.standard_normal((2, 3, 4)).astype(np.float16),
        "scalar": np.array(3.5, np.float64),
        "empty": np.empty((0, 4), np.float32),
        "flags": np.array([True, False]),
        "counts": np.array([[-1], [2]], np.int64),
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(arrays, {"made_by": "a test"}))
    raw = open_weights(path)
    assert raw.format == "safetensors"
    assert raw.files == (path,)
    assert raw.metadata == {"made_by": "a test"}
    assert raw.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        got = read_whole(raw.tensors[name])
        assert got.shape == array.shape
        assert got.tobytes() == array.tobytes()
    assert raw.tensors["matrix"].read(8, 11).tolist() == arrays["matrix"].reshape(-1)[8:11].tolist()


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {"last": entry(8, 12), "first": entry(0, 4), "middle": entry(4, 8)}
    raw = open_weights(write(tmp_path / "a.safetensors", header, bytes(12)))
    assert list(raw.tensors) == ["first", "middle", "last"]


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry(0, 16), "b": entry(8, 24)}, 24, "'b' overlap"),
        ({"a": entry(0, 8), "b": entry(16, 24)}, 24, "leave a hole"),
        ({"a": entry(4, 8)}, 8, "leave a hole"),
        ({"a": entry(0, 8)}, 12, "no offset covers the last 4 bytes"),
        ({"a": entry(0, 30)}, 10, "truncated: 10 of 30 bytes .* interrupted download"),
        ({"a": entry(8, 0, shape=[])}, 8, "impossible data_offsets"),
        ({"a": entry(-4, 0)}, 8, "impossible data_offsets"),
        ({"a": entry(0, 8, shape=[3], dtype="F32")}, 8, "takes 12 bytes of F32, but its offsets hold 8"),
        ({"a": entry(0, 8, shape=[2**33, 2**33])}, 8, "overflow"),
        ({"a": entry(0, 0, shape=[0, 2**62, 2**62])}, 0, "overflow"),
        ({"a": entry(0, 1, shape=[1] * 65)}, 1, "too many"),
        ({"a": entry(0, 4, shape=[-4])}, 4, "non-negative"),
        ({"a": entry(0, 1, shape=[True])}, 1, "non-negative"),
        ({"a": entry(0, 4, shape=[4.0])}, 4, "non-negative"),
        ({"a": entry(0, 4, shape=4)}, 4, "non-negative"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, 1, "not two integers"),
        ({"a": entry(0, 4, dtype="F33")}, 4, "unknown dtype 'F33'"),
        ({"a": entry(0, 4, dtype=["U8"])}, 4, "unknown dtype"),
        ({"a": {**entry(0, 4), "note": 1}}, 4, "nothing else"),
        ({"a": {"dtype": "U8", "shape": [4]}}, 4, "must have dtype, shape and data_offsets"),
        ({"a": None}, 0, "must have dtype"),
        ({"a": entry(0, 1), "__metadata__": {"n": 1}}, 1, "strings only"),
        ({"a": entry(0, 1), "__metadata__": ["n"]}, 1, "strings only"),
        ({"__metadata__": {}}, 0, "no tensors"),
        ({"\ud800": entry(0, 1)}, 1, "not text"),
        (b'{"a": 1, "a": 2}', 0, "duplicate key 'a'"),
        (b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', 1, "key 'dtype'"),
        (b"[1]", 0, "not a JSON object"),
        (b"{'a'}", 0, "not valid JSON"),
        (b'{"a": NaN}', 0, "invalid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, "invalid JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "nested too deeply"),
        (b'{"\xff": 1}', 0, "not UTF-8"),
        (b" {}", 0, "not a JSON object"),
        (b"{}extra", 0, "not valid JSON"),
    ],
)
def test_a_header_that_breaks_the_format_is_refused(
    tmp_path: Path, header: object, data: int, says: str
) -> None:
    assert re.search(says, refusal(write(tmp_path / "a.safetensors", header, bytes(data))))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"1234567", "too small"),
        (struct.pack("<Q", 2**63 - 1) + b"{}", "header length is invalid"),
        (
            struct.pack("<Q", 100) + b"{}",
            "header length is invalid: 100 bytes declared, 2 present; truncated",
        ),
        (struct.pack("<Q", 0) + b"{}", "header length is invalid"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git LFS pointer"),
        (b"<!DOCTYPE html><html>Please log in</html>", "saved web page"),
        (b"Access to model X is restricted.\n", "is a text, .* begins 'Access to model X"),
        (b'{"error": "Repository not found"}', "is a text"),
        ("Zugriff verweigert: größe \u00a0 – 模型".encode() * 20, "is a text"),
        (b"\xef\xbb\xbfEntry not found", "is a text, .* begins 'Entry not found'"),
        ("not found\r\n".encode("utf-16"), r"is a text, .* begins 'not found\\r\\n'"),
        (b"blocks.0.weight\t[1, 2]\r\n" * 40, "is a text"),
        (b"\x80\x02}q\x00.", "is a pickle"),
    ],
)
def test_other_things_under_the_name_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert re.search(says, refusal(path))


@pytest.mark.parametrize("length", [0x4B50, 0x280])
def test_a_length_that_looks_like_a_zip_or_a_pickle_is_a_length(tmp_path: Path, length: int) -> None:
    """0x4B50 begins with the bytes "PK", 0x280 with the byte of a pickle and protocol 2."""
    text = json.dumps({"a": entry(0, 1)}).encode()
    path = write(tmp_path / "a.safetensors", text.ljust(length), b"\7")
    assert path.read_bytes()[:2] in (b"PK", b"\x80\x02")
    assert read_whole(open_weights(path).tensors["a"]).tolist() == [7]


def test_a_name_with_terminal_sequences_stays_escaped(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.safetensors", {"\x1b[2J\n" + "x" * 300: entry(0, 1, dtype="Z")}))
    assert "\\x1b[2J" in message


def test_a_huge_header_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90 << 20) + b"{")
        file.truncate(100 << 20)
    tracemalloc.start()
    try:
        assert "too large" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_of_28_gigabytes_is_opened_without_torch_in_well_under_a_second(tmp_path: Path) -> None:
    """True shapes of a 14B transformer in a sparse file; a fresh process, whose modules are looked at."""
    header: dict[str, Any] = {}
    at = 0
    for block in range(40):
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q",
                     "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2"):  # fmt: skip
            shape = {"ffn.0": [13824, 5120], "ffn.2": [5120, 13824]}.get(name, [5120, 5120])
            end = at + 2 * math.prod(shape)
            header[f"blocks.{block}.{name}.weight"] = entry(at, end, shape=shape, dtype="BF16")
            at = end
    path = write(tmp_path / "big.safetensors", header)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + at)
    assert path.stat().st_size > 28e9
    start = time.process_time()
    assert len(read_header(path).tensors) == 400
    assert time.process_time() - start < 0.5, "of work: waiting for other programs does not count"
    code = (
        "import sys, pathlib; from avatarctl.files.source import open_weights; "
        f"print(len(open_weights(pathlib.Path({str(path)!r})).tensors)); "
        "print(sorted({'torch', 'safetensors'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["400", "[]"]


def test_a_path_that_does_not_exist_is_another_error(tmp_path: Path) -> None:
    with pytest.raises(PathNotFound, match="does not exist"):
        open_weights(tmp_path / "none.safetensors")
    with pytest.raises(PathNotFound):
        open_weights(tmp_path / "none" / "a.pt")
