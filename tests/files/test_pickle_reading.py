"""Files of torch.save read without torch: the same to the byte as torch reads them, or left to torch."""

from __future__ import annotations

import pickle
import pickletools
import random
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from avatarctl.errors import AvatarctlError
from avatarctl.files import pickle_file
from avatarctl.files.pickle_file import PickleFile, read_pickle
from avatarctl.files.pickle_reading import read_plain
from avatarctl.files.tensors import read_whole
from tests.files.test_source_pickle import repacked, saved, stored_bytes, tensors

Outcome = tuple[PickleFile, list[str]] | str


def outcome(path: Path) -> Outcome:
    """What a file is read as, and the order of its names; or why it is refused."""
    try:
        found = read_pickle(path)
    except AvatarctlError as error:
        return str(error)
    return found, list(found.tensors)


def both_ways(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Outcome, Outcome, bool]:
    """(as it is read, as torch reads it, whether torch was asked for the first)."""
    asked: list[object] = []
    real = pickle_file._torch_load

    def noted(*arguments: Any, **options: Any) -> object:
        asked.append(arguments)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pickle_file, "_torch_load", noted)
        ours = outcome(path)
    with monkeypatch.context() as patch:
        patch.setattr(pickle_file, "_read_without_torch", lambda *_: None)
        theirs = outcome(path)
    return ours, theirs, bool(asked)


def pickled(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


class Tied(torch.nn.Module):
    """Two names for one parameter, buffers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = torch.nn.BatchNorm1d(4)
        self.lower = torch.nn.Linear(4, 4).to(torch.bfloat16)


def module_states() -> dict[str, object]:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.lower(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    state = model.state_dict()
    assert hasattr(state, "_metadata")
    return {
        "state_dict": state,
        "with optimizer": {"epoch": 3, "loss": 0.5, "name": "x\u00e9", "model": state, "none": None,
                           "optimizer": optimizer.state_dict(), "betas": (0.9, 0.999), "flag": True,
                           "large": 2**70, "negative": -5},
        "nested": {"module": {"state_dict": OrderedDict(state), "step": 70_000}},
        "parameters": dict(model.named_parameters()),
    }  # fmt: skip


def ordinary() -> dict[str, object]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        **module_states(),
        "every kind": tensors(),
        "newer dtypes": {
            str(kind): torch.ones(2, 3).to(kind)
            for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)
        },
        "shared": {"w": base, "t": base.t(), "rows": base[1:3], "columns": base[:, 1:3], "same": base,
                   "last": base[4:], "flat": base.reshape(-1)[5:]},
        "gradients": {"w": torch.ones(2, requires_grad=True), "v": torch.nn.Parameter(torch.ones(2), False)},
        "a list of them beside": {"w": base, "history": [1, [2, (3, None)], {"a": []}]},
        "many": {f"block.{at}": torch.full((2,), float(at)) for at in range(300)},
        "one empty": {"a": torch.empty(0), "w": torch.ones(1), "b": torch.empty(3, 0, 2)},
    }  # fmt: skip


def test_ordinary_files_are_read_as_torch_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ordinary().items():
        path = saved(tmp_path / "a.pt", value)
        for one in (path, repacked(tmp_path / "b.pt", path)):
            ours, theirs, asked = both_ways(one, monkeypatch)
            assert not asked, name
            assert isinstance(ours, tuple), ours
            assert ours == theirs, name  # names, order, notes; dtype, shape, strides, place in the file
            assert ours[0].tensors


def test_the_bytes_are_those_of_torch(tmp_path: Path) -> None:
    made = {**tensors(), "fp8": torch.ones(3).to(torch.float8_e5m2)}
    found = read_pickle(saved(tmp_path / "a.pt", made)).tensors
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert read_whole(found[name]).tobytes() == stored_bytes(tensor), name


def test_torch_is_not_imported_for_an_ordinary_file(tmp_path: Path) -> None:
    plain = saved(tmp_path / "a.pt", module_states()["with optimizer"])
    other = saved(tmp_path / "b.pt", {"w": torch.ones(2), "size": torch.Size([1])})
    code = (
        "import sys, pathlib\n"
        "from avatarctl.files.source import open_weights\n"
        "open_weights(pathlib.Path(sys.argv[1]))\n"
        "assert 'torch' not in sys.modules\n"
        "open_weights(pathlib.Path(sys.argv[2]))\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, plain, other], check=True)


@pytest.mark.parametrize(
    "value",
    [
        {"w": torch.ones(2), "x": [{1, 2}]},
        {"w": torch.ones(2), "x": [Counter("ab")]},
        {"w": torch.ones(2), "x": [torch.Size([2])]},
        {"w": torch.ones(2), "x": [torch.float32]},
        {"w": torch.ones(2), "x": [b"abc"]},
        {"w": torch.ones(2), "x": [torch.device("cpu")]},
        {"w": torch.ones(2), "x": {(1, 2): 3}},
        {"w": torch.ones(2), "x": [torch.ones(2).untyped_storage()]},
        {"w": torch.ones(2), "x": [torch.ones(2)._typed_storage()]},
        {"w": torch.ones(2, dtype=torch.complex64)},
        {"w": torch.ones(2)._neg_view()},
        {"w": torch.ones(2, dtype=torch.uint16), 3: 4},
        torch.ones(2),
        [torch.ones(2)],
        {"model": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}},
        {"w": torch.ones(1).expand(300, 300)},
        {"a\ud800": torch.ones(2)},
    ],
    ids=range(17),
)
def test_other_files_end_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    ours, theirs, _ = both_ways(saved(tmp_path / "a.pt", value), monkeypatch)
    assert ours == theirs


# --- pickles made by hand ------------------------------------------------------------------------

PROTOCOL = b"\x80\x02"
ORDERED = b"ccollections\nOrderedDict\n)R"
V2, V3 = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def storage(
    key: str = "0", kind: bytes = b"ctorch\nFloatStorage\n", numel: bytes = b"K\4", word: str = "storage",
    location: bytes = text("cpu"),
) -> bytes:  # fmt: skip
    return b"(" + text(word) + kind + text(key) + location + numel + b"tQ"


def tensor(
    source: bytes | None = None, first: bytes = b"K\0", shape: bytes = b"K\4\x85",
    strides: bytes = b"K\1\x85", grad: bytes = b"\x89", hooks: bytes = ORDERED, function: bytes = V2,
    last: bytes = b"",
) -> bytes:  # fmt: skip
    source = storage() if source is None else source
    return function + b"(" + source + first + shape + strides + grad + hooks + last + b"tR"


def dictionary(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


HUGE = b"\x8a\x08" + struct.pack("<q", 1 << 62)
BEYOND = b"\x8a\x09" + (1 << 64).to_bytes(9, "little")
MINUS = b"J" + struct.pack("<i", -1)
UNTYPED = b"ctorch.storage\nUntypedStorage\n"
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"

PLAIN = {
    "as torch writes it": dictionary(w=tensor()),
    "of a GPU": dictionary(w=tensor(storage(location=text("cuda:7")))),
    "of nowhere": dictionary(w=tensor(storage(location=text("../../etc/passwd")))),
    "a parameter of a parameter": dictionary(
        w=PARAMETER + PARAMETER + tensor() + b"\x88" + ORDERED + b"\x87R\x89" + ORDERED + b"\x87R"
    ),
    "a key twice": b"}(" + text("w") + b"K\1" + text("v") + tensor() + text("w")
    + tensor(first=b"K\1", shape=b"K\2\x85") + b"u",
    "a dictionary within itself": b"}q\0(" + text("w") + tensor() + text("me") + b"]h\0au" + b"",
    "a memo that is overwritten": b"}q\0" + text("w") + b"q\1" + tensor() + b"q\1s" + text("v") + b"h\1s",
    "one tensor, two names": b"}(" + text("w") + tensor() + b"q\7" + text("v") + b"h\7u",
    "a stride of a dimension of one": dictionary(
        w=tensor(shape=b"K\1K\4\x86", strides=b"\x8a\x05" + bytes(4) + b"\x01K\1\x86")
    ),
    "float8": dictionary(
        w=tensor(storage(kind=UNTYPED, numel=b"K\x10"), shape=b"K\x10\x85", function=V3,
                 last=b"ctorch\nfloat8_e5m2\n")
    ),
    "hooks that grow": dictionary(w=tensor(hooks=ORDERED + b"q\5"), x=b"h\5" + text("a") + b"K\1s"),
    "attributes": ORDERED + text("w") + tensor() + b"s}" + text("_metadata") + b"}sb",
}  # fmt: skip
NOT_PLAIN = {
    "another storage class": dictionary(w=tensor(storage(kind=b"ctorch\nQInt8Storage\n"))),
    "a storage class of a GPU": dictionary(w=tensor(storage(kind=b"ctorch.cuda\nFloatStorage\n"))),
    "a class that is a text": dictionary(w=tensor(storage(kind=text("torch FloatStorage")))),
    "another word": dictionary(w=tensor(storage(word="module"))),
    "an escaped name": dictionary(w=tensor(storage(kind=b"ctor\\x63h\nFloatStorage\n"))),
    "a name with a space": dictionary(w=tensor(storage(kind=b"ctorch FloatStorage\n\n"))),
    "a key that is a path": dictionary(w=tensor(storage(key="../data/0"))),
    "a key of other digits": dictionary(w=tensor(storage(key="00"))),
    "a key of Arabic digits": dictionary(w=tensor(storage(key="\u0660"))),
    "a missing key": dictionary(w=tensor(storage(key="9"))),
    "a number as key": dictionary(w=tensor(b"(" + text("storage") + b"ctorch\nFloatStorage\nK\0"
                                           + text("cpu") + b"K\4tQ")),
    "a location that is none": dictionary(w=tensor(storage(location=b"N"))),
    "minus one element": dictionary(w=tensor(storage(numel=MINUS))),
    "a bool of elements": dictionary(w=tensor(storage(numel=b"\x88"))),
    "a huge storage": dictionary(w=tensor(storage(numel=HUGE))),
    "a storage beyond numbers": dictionary(w=tensor(storage(numel=BEYOND))),
    "a storage too short": dictionary(w=tensor(storage(numel=b"K\3"), shape=b"K\3\x85")),
    "two dtypes of a storage": dictionary(
        w=tensor(), v=tensor(storage(kind=b"ctorch\nIntStorage\n"))
    ),
    "two sizes of a storage": dictionary(w=tensor(), v=tensor(storage(numel=b"K\2"), shape=b"K\2\x85")),
    "outside": dictionary(w=tensor(first=b"K\1")),
    "too large": dictionary(w=tensor(shape=b"K\5\x85")),
    "a huge stride": dictionary(w=tensor(strides=HUGE + b"\x85")),
    "a huge shape": dictionary(w=tensor(shape=HUGE + b"\x85", strides=b"K\0\x85")),
    "an overflow": dictionary(w=tensor(shape=HUGE + HUGE + b"\x86", strides=b"K\0K\0\x86")),
    "beyond numbers": dictionary(w=tensor(first=BEYOND, shape=b"K\0\x85")),
    "minus one": dictionary(w=tensor(first=MINUS)),
    "a negative stride": dictionary(w=tensor(first=b"K\3", strides=MINUS + b"\x85")),
    "a negative size": dictionary(w=tensor(shape=MINUS + b"\x85")),
    "a bool as size": dictionary(w=tensor(shape=b"\x88\x85")),
    "a float as size": dictionary(w=tensor(shape=b"G\x40\x10" + bytes(6) + b"\x85")),
    "a list as shape": dictionary(w=tensor(shape=b"]K\4a")),
    "more strides": dictionary(w=tensor(strides=b"K\1K\1\x86")),
    "a gradient of integers": dictionary(
        w=tensor(storage(kind=b"ctorch\nIntStorage\n"), grad=b"\x88")
    ),
    "a gradient that is a number": dictionary(w=tensor(grad=b"K\1")),
    "hooks that are none": dictionary(w=tensor(hooks=b"N")),
    "arguments in a list": dictionary(w=V2 + b"](" + storage() + b"K\0K\4\x85K\1\x85\x89" + ORDERED + b"eR"),
    "too few arguments": dictionary(w=V2 + b"(" + storage() + b"K\0tR"),
    "a storage as a value": dictionary(w=tensor(), x=b"]" + storage() + b"a"),
    "a name as a value": dictionary(w=tensor(), x=b"]" + V2 + b"a"),
    "a tensor of no storage": dictionary(w=tensor(b"K\0")),
    "a tensor of a tensor": dictionary(w=tensor(tensor())),
    "a function that is a text": dictionary(w=text("torch._utils _rebuild_tensor_v2") + tensor()[34:]),
    "v2 of bytes": dictionary(w=tensor(storage(kind=UNTYPED, numel=b"K\x10"))),
    "v3 of a typed storage": dictionary(w=tensor(function=V3, last=b"ctorch\nint32\n")),
    "v3 of a dtype unknown here": dictionary(
        w=tensor(storage(kind=UNTYPED, numel=b"K\x10"), shape=b"K\2\x85", function=V3,
                 last=b"ctorch\ncomplex64\n")
    ),
    "an ordered dictionary with contents": dictionary(w=tensor()) + b"ccollections\nOrderedDict\n"
    + b"](]" + text("w") + b"a" + tensor() + b"ae\x85R",
    "attributes of a plain dictionary": dictionary(w=tensor()) + b"}b",
    "other attributes": ORDERED + text("w") + tensor() + b"s}" + text("items") + b"K\1sb",
    "attributes of a tensor": dictionary(w=tensor() + b"}b"),
    "items of a list": b"]" + text("w") + tensor() + b"s",
    "an odd number of items": b"}(" + text("w") + tensor() + text("v") + b"u",
    "a tensor as a key": b"}" + tensor() + b"K\1s",
    "a dictionary as a key": b"}}K\1s",
    "a bool as a key": b"}" + text("w") + tensor() + b"s\x88K\1s",
    "something left over": b"K\1" + dictionary(w=tensor()),
    "a mark left over": b"(" + dictionary(w=tensor()),
    "no mark": b"}" + text("w") + tensor() + b"u",
    "an empty memo": b"}" + text("w") + b"h\x09s",
    "below a mark": b"}" + text("w") + tensor() + b"(s",
    "a class made new": dictionary(w=tensor(), x=b"ccollections\nOrderedDict\n)\x81"),
    "bytes": dictionary(w=tensor(), x=b"]U\1aa"),
    "another protocol behind": b"\x80\x02" + dictionary(w=tensor()),
    "nothing": b"",
}  # fmt: skip


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return saved(tmp_path / "good.pt", {"w": torch.arange(4.0)})


@pytest.mark.parametrize("name", PLAIN)
def test_what_torch_reads_without_doubt_is_read_alike(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = repacked(tmp_path / "a.pt", archive, **{"data.pkl": PROTOCOL + PLAIN[name] + b"."})
    ours, theirs, asked = both_ways(path, monkeypatch)
    assert not asked
    assert ours == theirs
    assert isinstance(ours, tuple) or name == "a dictionary within itself", ours


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_doubtful_is_left_to_torch(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data = PROTOCOL + NOT_PLAIN[name] + b"."
    path = repacked(tmp_path / "a.pt", archive, **{"data.pkl": data})
    ours, theirs, asked = both_ways(path, monkeypatch)
    assert ours == theirs
    assert asked or (isinstance(ours, str) and "refused" in ours)


def test_a_tuple_nested_as_deep_as_the_limit_allows_is_read(archive: Path, tmp_path: Path) -> None:
    deep = PROTOCOL + dictionary(w=tensor(), x=b")" + b"\x85" * 150_000) + b"."
    path = repacked(tmp_path / "a.pt", archive, **{"data.pkl": deep})
    assert list(read_pickle(path).tensors) == ["w"]


# --- changes at random ---------------------------------------------------------------------------


def instructions(data: bytes) -> list[bytes]:
    places = [at or 0 for _, _, at in pickletools.genops(data)]
    return [data[at:end] for at, end in zip(places, [*places[1:], len(data)], strict=True)]


REPLACEMENTS = [
    b"K\0", b"K\1", b"K\3", MINUS, HUGE, b"N", b"}", b"]", b")", b"\x88", b"s", ORDERED, b"h\0", b"h\5",
    b"h\x0b", b"q\5", storage(), tensor(), text("1"), b"ctorch\nIntStorage\n", UNTYPED, V3,
]  # fmt: skip


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to three instructions removed, repeated, exchanged or replaced, or single bytes changed."""
    if rng.random() < 0.3:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 2)):
            changed[rng.randrange(2, len(data))] = rng.choice(b"NKJM}])t\x85\x86\x87RQbhqsue\x88\x8a(0\1\2")
        return bytes(changed)
    steps = instructions(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, other = rng.randrange(1, len(steps) - 1), rng.randrange(1, len(steps) - 1)
        kind = rng.randrange(4)
        if kind == 0:
            del steps[at]
        elif kind == 1:
            steps.insert(at, steps[other])
        elif kind == 2:
            steps[at], steps[other] = steps[other], steps[at]
        else:
            steps[at] = rng.choice(REPLACEMENTS)
    return b"".join(steps)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_changed_torch_would_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    state = OrderedDict(w=torch.arange(4.0), p=torch.nn.Parameter(torch.ones(2, 3).t()), i=torch.arange(3))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as Module.state_dict has it
    good = saved(tmp_path / "good.pt", {"state_dict": state, "epoch": 7, "betas": (0.5, [1])})
    whole, original = good.read_bytes(), pickled(good)
    rng = random.Random(seed)
    plain: Counter[str] = Counter()
    for _ in range(100):
        data = mutated(rng, original)
        path = tmp_path / "a.pt"
        if len(data) == len(original):  # as torch laid it out: it then counts where the storages are
            path.write_bytes(whole.replace(original, data))
        else:
            repacked(path, good, **{"data.pkl": data})
        ours, theirs, asked = both_ways(path, monkeypatch)
        assert ours == theirs, data
        plain["torch" if asked else "plain"] += isinstance(ours, tuple)
    assert plain["plain"] > 3  # most changes make no pickle at all


def test_nothing_is_run(tmp_path: Path) -> None:
    """Without the scan before it, too: a call is a name and its arguments, and that is not plain."""
    target = tmp_path / "ran"
    call = b"cos\nsystem\n" + text(f"touch {target}") + b"\x85R"
    assert read_plain(PROTOCOL + dictionary(w=tensor(), x=call) + b".") is None
    assert not target.exists()
    pickle.loads(PROTOCOL + call + b".")
    assert target.exists()  # the call is real
    found = read_plain(PROTOCOL + dictionary(w=tensor()) + b".")
    assert found is not None
    assert found.storages == {"0": 16}
