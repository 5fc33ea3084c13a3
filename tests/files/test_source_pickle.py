"""Reading files of torch.save: the same values as torch, nothing run, nothing allocated for nothing."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.serialization import skip_data

from avatarctl.errors import UnusableWeights
from avatarctl.files.pickle_file import StridedTensor
from avatarctl.files.source import open_weights
from avatarctl.files.tensors import FileTensor, read_whole

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """No test here may create this file."""
    path = tmp_path / "executed"
    monkeypatch.setenv("AVATARCTL_CANARY", str(path))
    yield path
    assert not path.exists(), "the payload of a pickle ran"


class Payload:
    """Pickles as a call of os.system that creates the canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ('touch "$AVATARCTL_CANARY"',)


@contextlib.contextmanager
def memory_below(bound: int) -> Iterator[None]:
    """Python and numpy take less than this many bytes within."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < bound
    finally:
        tracemalloc.stop()


def stored_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(BITS[tensor.element_size()]).numpy().tobytes()


def refusal(path: Path) -> str:
    with pytest.raises(UnusableWeights) as caught:
        open_weights(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500 + len(str(path))
    return message.removeprefix(f"{path}: ")


def saved(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def repacked(path: Path, source: Path, **changes: bytes | None) -> Path:
    """A copy of an archive of torch with other contents for some records ("data.pkl"); None leaves out.

    Without the two records from which torch guesses offsets, because Python aligns nothing.
    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            name = member.filename.partition("/")[2]
            if name in changes or name not in (".format_version", ".storage_alignment"):
                content = changes.get(name, old.read(member))
                if content is not None:
                    new.writestr(member.filename, content)
    return path


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype, and every way in which a tensor may lie in its storage."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(12, 18, generator=generator)
    kinds = {
        str(dtype): (base * 10).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
                      torch.int8, torch.uint8, torch.bool)
    }  # fmt: skip
    return {
        "base": base,
        "transposed": base.t(),
        "view": base[2:5],
        "window": base[1:, 3:9],
        "permuted": torch.randn(3, 4, 5, 6, generator=generator).permute(2, 0, 3, 1),
        "every_second": torch.arange(20)[::2],
        "expanded": torch.arange(4.0).reshape(1, 4).expand(1, 4),
        "scalar": torch.tensor(3.5),
        "element": torch.arange(6)[3],
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        **kinds,
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path, zipped: bool) -> None:
    made = tensors()
    if zipped:  # torch itself does not read these back from the older format
        newer = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)
        made |= {str(kind): made["base"].abs().to(kind) for kind in newer}
    raw = open_weights(saved(tmp_path / "a.pt", made, _use_new_zipfile_serialization=zipped))
    assert raw.format == ("zip" if zipped else "legacy")
    assert raw.tensors.keys() == made.keys()
    for name, tensor in made.items():
        got = read_whole(raw.tensors[name])
        assert got.shape == tuple(tensor.shape), name
        assert got.tobytes() == stored_bytes(tensor), name
    assert any("whole into memory" in note for note in raw.notes) != zipped


def test_any_range_of_a_strided_tensor_can_be_read(tmp_path: Path) -> None:
    raw = open_weights(saved(tmp_path / "a.pt", tensors()))
    random = np.random.default_rng(1)
    for name in ("transposed", "window", "permuted", "every_second"):
        tensor = raw.tensors[name]
        assert isinstance(tensor, StridedTensor)
        flat = read_whole(tensor).reshape(-1)
        for _ in range(25):
            start, stop = sorted(random.integers(0, flat.size + 1, 2))
            assert tensor.read(start, stop).tolist() == flat[start:stop].tolist()
    assert isinstance(raw.tensors["view"], FileTensor)


@pytest.mark.parametrize(
    "size, stride",
    [((1, 3), (1 << 62, 2)), ((3, 1, 2), (4, (1 << 63) - 1, 1)), ((3, 1), (2, (1 << 63) - 1))],
)
def test_a_dimension_of_one_may_have_any_stride(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    made = torch.arange(12.0).as_strided(size, stride)
    found = open_weights(saved(tmp_path / "a.pt", {"w": made})).tensors["w"]
    assert isinstance(found, StridedTensor)
    assert read_whole(found).tolist() == made.tolist()


def test_torch_is_imported_for_a_pickle_and_nothing_else_is(tmp_path: Path) -> None:
    """Not before one is read that the scan has let through, and never what takes seconds more."""
    refused = saved(tmp_path / "a.pt", {"x": Payload()})
    path = saved(tmp_path / "b.pt", {"state_dict": {"w": torch.ones(2)}, "epoch": 3})
    code = (
        "import sys, pathlib\n"
        "from avatarctl.errors import UnusableWeights\n"
        "from avatarctl.files.source import open_weights\n"
        "try:\n"
        "    open_weights(pathlib.Path(sys.argv[1]))\n"
        "except UnusableWeights:\n"
        "    print('torch' in sys.modules)\n"
        "open_weights(pathlib.Path(sys.argv[2]))\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'peft'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, refused, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["False", "['torch']"]


def test_a_zip_stays_on_the_disk_and_in_its_order(tmp_path: Path) -> None:
    state = {name: torch.full((1 << 20,), float(at)) for at, name in enumerate("dcba")}
    path = saved(tmp_path / "a.pt", state)
    del state
    with memory_below(1 << 20):
        raw = open_weights(path)
    assert list(raw.tensors) == list("dcba")
    assert raw.tensors["b"].read(1000, 1002).tolist() == [2.0, 2.0]


def test_a_zip_of_12_gb_is_opened_without_reading_a_tensor(tmp_path: Path) -> None:
    """Two storages lie beyond 4 GiB, where places are written otherwise; torch finds the same bytes."""
    hole, size = str(tmp_path / "hole"), 3 << 30
    large = {name: torch.from_file(hole, shared=True, size=size, dtype=torch.bfloat16) for name in "ab"}
    with skip_data():  # torch leaves holes in the file, which take no room on the disk
        path = saved(tmp_path / "a.pt", {**large, "c": torch.empty(2, 3)})
    assert path.stat().st_size > 12e9
    start = time.process_time()
    tensors = open_weights(path).tensors
    assert time.process_time() - start < 1, "of work: waiting for other programs does not count"
    assert list(tensors) == ["a", "b", "c"]
    for name in "bc":
        tensor = tensors[name]
        assert isinstance(tensor, FileTensor)
        with path.open("r+b") as file:
            file.seek(tensor.offset)
            file.write(struct.pack("<4f", 1, 2, 3, 4))
    ours, theirs = open_weights(path).tensors, torch.load(path, mmap=True)
    assert ours["c"].read(0, 4).tolist() == theirs["c"].reshape(-1)[:4].tolist() == [1, 2, 3, 4]
    assert ours["b"].read(0, 8).tobytes() == stored_bytes(theirs["b"][:8]) == struct.pack("<4f", 1, 2, 3, 4)


def test_tensors_saved_on_a_gpu_are_read_without_one(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"w": torch.arange(4.0)})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("a/data.pkl").replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0")
    assert b"cuda" in pickled
    raw = open_weights(repacked(tmp_path / "b.pt", path, **{"data.pkl": pickled}))
    assert read_whole(raw.tensors["w"]).tolist() == [0, 1, 2, 3]


# --- what the dictionary may be ------------------------------------------------------------------

WEIGHTS = {"blocks.0.weight": torch.ones(2, 2), "blocks.0.bias": torch.zeros(2)}


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state", "model_state_dict", "model", "module"])
def test_a_wrapper_is_opened_and_what_is_left_out_is_said(tmp_path: Path, wrapper: str) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}}
    around = {"epoch": 3, "optimizer": optimizer, wrapper: WEIGHTS, "rng_state": torch.get_rng_state(),
              "milestones": Counter({3: 1}), "seeds": (2**70, -5), "loss": torch.tensor(0.5)}  # fmt: skip
    raw = open_weights(saved(tmp_path / "a.pt", around))
    assert raw.tensors.keys() == WEIGHTS.keys()
    told = " ".join(raw.notes)
    assert f"opened the wrapper '{wrapper}'" in told
    assert "left out, not weights: epoch, optimizer, rng_state, milestones, seeds and 1 more" in told


def test_nested_wrappers_and_metadata_of_a_state_dict(tmp_path: Path) -> None:
    state = OrderedDict(WEIGHTS)
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as Module.state_dict has it
    raw = open_weights(saved(tmp_path / "a.pt", {"model": {"module": state}}))
    assert raw.notes == ("opened the wrapper 'model'", "opened the wrapper 'module'")
    assert raw.tensors.keys() == WEIGHTS.keys()


def test_lists_without_tensors_beside_tensors_are_left_out_aloud(tmp_path: Path) -> None:
    raw = open_weights(saved(tmp_path / "a.pt", {**WEIGHTS, "history": [1, 2], "\x1b[2J": {}}))
    assert raw.notes == (r"left out, not weights: history, \x1b[2J",)


@pytest.mark.parametrize(
    "value",
    [{1, 2}, Counter("ab"), torch.Size([2]), torch.float32, torch.device("cpu"), True, (1, [None])],
    ids=str,
)
def test_plain_values_in_a_list_beside_tensors_are_left_out(tmp_path: Path, value: object) -> None:
    raw = open_weights(saved(tmp_path / "a.pt", {**WEIGHTS, "x": [value], "y": {(1, 2): 3}}))
    assert raw.tensors.keys() == WEIGHTS.keys()
    assert raw.notes == ("left out, not weights: x, y",)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.ones(2), "a bare tensor"),
        ([torch.ones(2)], "a list"),
        ({}, "no tensors"),
        ({"a": {}}, "no tensors"),
        ({3: torch.ones(2)}, "key of type int"),
        ({"a": torch.ones(2), "alpha": 0.5}, "'alpha' is of type float"),
        ({"a": torch.ones(2), "name": "x"}, "'name' is of type str"),
        ({"generator": WEIGHTS}, "nested under 'generator'"),
        ({"model": WEIGHTS, "ema": WEIGHTS}, r"more than one set of tensors \('model', 'ema'\)"),
        ({"model": WEIGHTS, "state_dict": WEIGHTS}, "more than one set"),
        ({"model": WEIGHTS, "w": torch.ones(2)}, r"more than one set of tensors \('model', 'w'\)"),
        ({"w": torch.ones(2), "blocks": [torch.ones(2)]}, "nested under 'blocks'"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "dtype torch.complex64"),
        ({"w": torch.ones(2, 2).to_sparse()}, "sparse tensor"),
        ({"w": torch.empty(2, device="meta")}, "without data"),
        ({"w": torch.randn(3, dtype=torch.complex64).conj().imag}, "lazy negation"),
        ({"w": torch.ones(1).expand(300, 300)}, r"shape \[300, 300\] over a storage of 1 elements"),
        ({"a\ud800": torch.ones(2)}, "not text"),
    ],
)
def test_what_is_no_dictionary_of_plain_tensors_is_refused(tmp_path: Path, value: object, says: str) -> None:
    assert re.search(says, refusal(saved(tmp_path / "a.pt", value)))


def test_a_structure_that_branches_endlessly_is_walked_once(tmp_path: Path) -> None:
    value: list[Any] = [1]
    for _ in range(200):
        value = [value, value]
    assert "no tensors" in refusal(saved(tmp_path / "a.pt", {"a": value}))


# --- pickles that want something else ------------------------------------------------------------


def legacy(payload_at: int) -> bytes:
    """The older format by hand: magic number, version, system, object, storage names."""
    parts: list[object] = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, []]
    parts[payload_at] = Payload()
    return b"".join(pickle.dumps(part, 2) for part in parts)


def malicious(tmp_path: Path) -> dict[str, Path]:
    good = saved(tmp_path / "good.pt", {"w": torch.ones(2)})
    made = {
        "value": saved(tmp_path / "value.pt", {"state_dict": Payload()}),
        "nested": saved(tmp_path / "nested.pt", {"w": torch.ones(2), "x": (((Payload(),),),)}),
        "older": saved(tmp_path / "older.pt", {"w": Payload()}, _use_new_zipfile_serialization=False),
    }
    for protocol in (0, 2, 4):
        data = pickle.dumps({"w": Payload()}, protocol)
        path = made[f"plain {protocol}"] = tmp_path / f"plain{protocol}.ckpt"
        path.write_bytes(data)
        name = f"zip {protocol}"
        made[name] = repacked(tmp_path / f"zip{protocol}.bin", good, **{"data.pkl": data})
    for at in range(5):
        path = made[f"legacy {at}"] = tmp_path / f"legacy{at}.pt"
        path.write_bytes(legacy(payload_at=at))
    made["eval"] = tmp_path / "eval.pt"
    made["eval"].write_bytes(b'c__builtin__\neval\n(S\'open("executed", "w")\'\ntR.')
    return made


def test_no_payload_runs_wherever_it_sits(tmp_path: Path) -> None:
    for name, path in malicious(tmp_path).items():
        message = refusal(path)
        assert re.search(
            r"refused: this pickle asks for (posix\.system|nt\.system|__builtin__\.eval)", message
        ), (
            name,
            message,
        )


def test_the_payloads_are_real(tmp_path: Path, canary: Path) -> None:
    """Otherwise the test above would prove nothing: this one opens such a file as nobody should."""
    torch.load(malicious(tmp_path)["nested"], weights_only=False)
    assert canary.exists()
    canary.unlink()


@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + bytes(5) + b"\x01\x85R.", "__builtin__.bytearray"),
        (b"\x80\x02c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0hex\x86R.", "_codecs.encode"),
        (b"\x80\x02ctorch\nTensor\n\x8a\x06" + bytes(5) + b"\x01\x85R.", "torch.Tensor"),
        (b"\x80\x04}\x94.", "protocol 4 is not read"),
        (b"\x80\x02}X\xff\xff\xff\x7fabc.", "breaks off"),
        (b"\x80\x02}", "breaks off"),
        (b"\x80\x02(0.", "unsupported pickle instruction POP"),
        (b"\x80\x02ctorch._utils\n_rebuild_qtensor\n.", "quantized tensor"),
        (b"\x80\x02cargparse\nNamespace\n)\x81.", "argparse.Namespace"),
        (b"\x80\x02" + b"]" * 10 + b"a" * 50 + b".", "torch cannot read it"),
        (b"\x80\x02h\5.", "torch cannot read it"),
        (b"\x80\x02(" + b"ccollections\nOrderedDict\nq\0)R" + b"h\0)R" * 200_000 + b"t.", "200000 objects"),
    ],
)
def test_a_pickle_that_wants_more_than_tensors_is_refused(tmp_path: Path, pickled: bytes, says: str) -> None:
    good = saved(tmp_path / "good.pt", {"w": torch.ones(2)})
    assert says in refusal(repacked(tmp_path / "a.pt", good, **{"data.pkl": pickled}))


def test_a_stored_namespace_is_named(tmp_path: Path) -> None:
    value = {"state_dict": WEIGHTS, "args": argparse.Namespace(lr=1e-4)}
    assert "argparse.Namespace" in refusal(saved(tmp_path / "a.pt", value))


# --- archives that torch.save does not write -----------------------------------------------------


def test_records_that_do_not_fit_their_tensors_are_refused(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.pt", {"w": torch.arange(4.0), "v": torch.ones(3)})
    changes: list[tuple[dict[str, bytes | None], str]] = [
        ({"data/1": bytes(8)}, "'v' has a storage of 12 bytes, its record holds 8"),
        ({"data/1": bytes(16)}, "'v' has a storage of 12 bytes, its record holds 16"),
        ({"data/1": None}, "data/1 is missing"),
        ({"byteorder": b"big"}, "byte order"),
        ({".storage_alignment": b"0"}, ".storage_alignment"),  # torch 2.13 dies of it
        ({".format_version": b"-1"}, ".format_version"),
        ({"data.pkl": bytes(5 << 20)}, "data.pkl has 5242880 bytes"),
        ({"data.pkl": None}, "no data.pkl"),
    ]
    for at, (change, says) in enumerate(changes):
        assert says in refusal(repacked(tmp_path / f"{at}.pt", good, **change))


def test_a_storage_of_a_tebibyte_is_not_allocated(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.pt", {"w": torch.arange(4.0)})
    with zipfile.ZipFile(good) as archive:
        pickled = archive.read("good/data.pkl")
    numel, shape = b"K\4", b"K\4\x85"
    assert pickled.count(numel) == 2
    at = pickled.rindex(shape)
    huge = b"\x8a\x06" + struct.pack("<Q", 1 << 38)[:6]
    for name, data in {
        "storage": pickled.replace(numel, huge),
        "shape": pickled[:at] + huge + pickled[at + 2 :],
        "offset": pickled[: at - 2] + b"K\2" + pickled[at:],
    }.items():
        path = repacked(tmp_path / f"{name}.pt", good, **{"data.pkl": data})
        assert "storage" in refusal(path), name


@pytest.mark.parametrize("numel", [1 << 38, 1 << 30])
def test_a_storage_of_a_tebibyte_in_the_older_format(tmp_path: Path, numel: int) -> None:
    state = {"w": torch.arange(300.0)}
    data = saved(tmp_path / "a.pt", state, _use_new_zipfile_serialization=False).read_bytes()
    small = b"M" + struct.pack("<H", 300) + b"N"
    assert small in data
    path = tmp_path / "b.pt"
    path.write_bytes(data.replace(small, b"\x8a\x06" + struct.pack("<Q", numel)[:6] + b"N"))
    assert "a storage of" in refusal(path)
    path.write_bytes(data[:-400])
    assert re.search("corrupt|truncated", refusal(path))


@pytest.mark.parametrize("zipped", [True, False])
def test_one_storage_of_several_tensors(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(40, 50)
    state = {str(row): base[row] for row in range(40)} | {
        "whole": base,
        "columns": base[:, 1:3],
        "t": base.t(),
    }
    path = saved(tmp_path / "a.pt", state, _use_new_zipfile_serialization=zipped)
    got = open_weights(path).tensors
    assert all(read_whole(got[name]).tobytes() == stored_bytes(row) for name, row in state.items())


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return path


def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    plain = {"a/data.pkl": b"\x80\x02}.", "a/version": b"3\n"}
    cases = {
        "outside its folder": archive(tmp_path / "1.pt", {**plain, "../../PWNED": b"x"}),
        "unsafe path": archive(tmp_path / "2.pt", {**plain, "/tmp/PWNED": b"x"}),
        "lies outside": archive(tmp_path / "3.pt", {**plain, "a/../../x": b"x"}),
        "TorchScript": archive(tmp_path / "4.pt", {**plain, "a/constants.pkl": b"x", "a/code/x.py": b""}),
        "no data.pkl": archive(tmp_path / "5.pt", {"readme.txt": b"hello"}),
        "'a/data.pkl' is compressed": archive(
            tmp_path / "6.pt", {"a/data.pkl": bytes(50 << 20)}, zipfile.ZIP_DEFLATED
        ),
        "unusual name": archive(tmp_path / "7.pt", {**plain, "a/\x1b[2J": b""}),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the duplicate
        with zipfile.ZipFile(tmp_path / "8.pt", "w") as made:
            for content in (b"\x80\x02}.", b"\x80\x02]."):
                made.writestr("a/data.pkl", content)
    cases["is there twice"] = tmp_path / "8.pt"
    with memory_below(1 << 20):
        for says, path in cases.items():
            assert says in refusal(path)
    assert not (tmp_path.parent.parent / "PWNED").exists()


def test_members_that_overlap_or_leave_the_file_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"w": torch.arange(4.0), "v": torch.ones(4)})
    data = path.read_bytes()
    with zipfile.ZipFile(path) as made:
        first, second = made.getinfo("a/data/0"), made.getinfo("a/data/1")
        directory = made.start_dir
    places = [at for at in range(directory, len(data)) if data.startswith(b"PK\1\2", at)]
    changed = bytearray(data)
    for at in places:  # both storages at the first one's bytes (APPNOTE.TXT 4.3.12: offset at 42)
        if data[at + 42 : at + 46] == struct.pack("<I", second.header_offset):
            changed[at + 42 : at + 46] = struct.pack("<I", first.header_offset)
    (tmp_path / "overlap.pt").write_bytes(changed)
    assert "overlap" in refusal(tmp_path / "overlap.pt")
    changed = bytearray(data)
    for at in places:
        if data[at + 42 : at + 46] == struct.pack("<I", second.header_offset):
            changed[at + 20 : at + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    (tmp_path / "outside.pt").write_bytes(changed)
    assert "lies outside the file" in refusal(tmp_path / "outside.pt")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_half_a_file_is_said_to_be_one(tmp_path: Path, share: float) -> None:
    data = saved(tmp_path / "a.pt", {"w": torch.randn(2000)}).read_bytes()
    path = tmp_path / "b.pt"
    path.write_bytes(data[: int(len(data) * share)])
    assert "truncated" in refusal(path)


def test_other_things_under_the_name_are_named(tmp_path: Path) -> None:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as made:
        made.addfile(tarfile.TarInfo("storages"))
    cases = {
        "is empty": b"",
        "tar archive": tar.getvalue(),
        "GGUF": b"GGUF" + bytes(100),
        "(text)": b"https://example.org/weights.pt\n",
        "(other data)": bytes(range(256)),
        "git LFS": b"version https://git-lfs.github.com/spec/v1\n",
        "saved web page": b"\n<html><body>404</body></html>",
        "plain pickle": pickle.dumps({"a": [1, 2]}, 2),
        "is a safetensors file": struct.pack("<Q", 2) + b"{}",
    }
    for says, content in cases.items():
        path = tmp_path / "a.pt"
        path.write_bytes(content)
        assert says in refusal(path)


def test_torch_stays_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (saved(tmp_path / "a.pt", WEIGHTS), saved(tmp_path / "b.pt", {"x": Payload()})):
            try:
                open_weights(path)
            except UnusableWeights:
                continue
    assert capfd.readouterr() == ("", "")


def test_bytes_changed_at_random_lead_to_weights_or_to_one_line(tmp_path: Path) -> None:
    """In an archive as torch lays it out, where it counts to find the storages, and in a repacked one."""
    random = np.random.default_rng(7)
    good = saved(tmp_path / "good.pt", tensors())
    whole = good.read_bytes()
    with zipfile.ZipFile(good) as made:
        pickled = made.read("good/data.pkl")
    outcomes = Counter[tuple[str, int]]()
    for number in range(200):
        data = bytearray(pickled)
        for at in random.integers(2, len(data), random.integers(1, 4)):
            data[at] = random.choice(list(b"NKJM}])t\x85\x86RQbh\x88\x8a") + list(random.bytes(2)))
        path = tmp_path / "a.pt"
        if number % 2:
            path.write_bytes(whole.replace(pickled, data))
        else:
            repacked(path, good, **{"data.pkl": bytes(data)})
        try:
            for tensor in open_weights(path).tensors.values():
                assert tensor.info.nbytes <= path.stat().st_size
                read_whole(tensor)
            outcomes["read", number % 2] += 1
        except UnusableWeights as error:
            assert str(error).isprintable()
            outcomes["refused", number % 2] += 1
    assert len(outcomes) == 4
