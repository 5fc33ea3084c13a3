"""Pickles of tensors written by hand: what torch would never write is refused, and never believed."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from avatarctl.files.source import open_weights
from avatarctl.files.tensors import read_whole
from tests.files.test_source_pickle import refusal, repacked, saved

PROTOCOL = b"\x80\x02"
ORDERED = b"ccollections\nOrderedDict\n)R"
HUGE = b"\x8a\x08" + struct.pack("<q", 1 << 62)
BEYOND = b"\x8a\x09" + (1 << 64).to_bytes(9, "little")
MINUS = b"J" + struct.pack("<i", -1)
INTEGERS = b"ctorch\nIntStorage\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def storage(key: str = "0", kind: bytes = b"ctorch\nFloatStorage\n", numel: bytes = b"K\4",
            word: str = "storage", location: str = "cpu") -> bytes:  # fmt: skip
    return b"(" + text(word) + kind + text(key) + text(location) + numel + b"tQ"


def tensor(source: bytes | None = None, first: bytes = b"K\0", shape: bytes = b"K\4\x85",
           strides: bytes = b"K\1\x85", grad: bytes = b"\x89") -> bytes:  # fmt: skip
    source = storage() if source is None else source
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return function + b"(" + source + first + shape + strides + grad + ORDERED + b"tR"


def dictionary(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def handmade(path: Path, pickled: bytes) -> Path:
    """An archive with this pickle over one storage of four floats: 0, 1, 2, 3."""
    good = saved(path.with_name("good.pt"), {"w": torch.arange(4.0)})
    return repacked(path, good, **{"data.pkl": PROTOCOL + pickled + b"."})


HANDMADE = {
    "beyond the end": (tensor(first=b"K\1"), "its record holds 16"),
    "too large": (tensor(shape=b"K\5\x85"), "its record holds 16"),
    "a huge shape": (tensor(shape=HUGE + b"\x85", strides=b"K\0\x85"), "impossible shape"),
    "a huge stride": (tensor(strides=HUGE + b"\x85"), "reaches outside its storage of 4 elements"),
    "too many elements": (tensor(shape=HUGE + HUGE + b"\x86", strides=b"K\0K\0\x86"), "torch cannot read it"),
    "a size below zero": (tensor(shape=MINUS + b"\x85"), "torch cannot read it"),
    "a stride below zero": (tensor(first=b"K\3", strides=MINUS + b"\x85"), "its record holds 16"),
    "a beginning below zero": (tensor(first=MINUS), "torch cannot read it"),
    "a beginning beyond numbers": (tensor(first=BEYOND, shape=b"K\0\x85"), "torch cannot read it"),
    "more strides than sizes": (tensor(strides=b"K\1K\1\x86"), "torch cannot read it"),
    "a huge storage": (tensor(storage(numel=HUGE)), "torch cannot read it"),
    "a storage too short": (tensor(storage(numel=b"K\3"), shape=b"K\3\x85"), "its record holds 16"),
    "another size the second time": (
        tensor() + text("v") + tensor(storage(numel=b"K\2"), shape=b"K\2\x85"), "'v' has a storage of 8 bytes"
    ),
    "a path as key": (tensor(storage(key="../data/0")), "../data/0 is missing"),
    "other digits as key": (tensor(storage(key="00")), "data/00 is missing"),
    "a missing key": (tensor(storage(key="9")), "data/9 is missing"),
    "quantised": (tensor(storage(kind=b"ctorch\nQInt8Storage\n")), "torch cannot read it"),
    "a class that is a text": (tensor(storage(kind=text("torch FloatStorage"))), "torch cannot read it"),
    "a class of a GPU": (tensor(storage(kind=b"ctorch.cuda\nFloatStorage\n")), "torch.cuda.FloatStorage"),
    "another word than storage": (tensor(storage(word="module")), "torch cannot read it"),
    "a gradient of integers": (tensor(storage(kind=INTEGERS), grad=b"\x88"), "torch cannot read it"),
    "a tensor of a tensor": (tensor(tensor()), "torch cannot read it"),
    "a tensor of no storage": (tensor(b"K\0"), "torch cannot read it"),
}  # fmt: skip


@pytest.mark.parametrize(("pickled", "says"), HANDMADE.values(), ids=HANDMADE.keys())
def test_a_tensor_made_by_hand_that_is_wrong_is_refused(tmp_path: Path, pickled: bytes, says: str) -> None:
    assert says in refusal(handmade(tmp_path / "a.pt", dictionary(w=pickled)))


PARAMETER = b"ctorch._utils\n_rebuild_parameter_with_state\n("
METHODS = ("stride", "is_neg", "detach", "untyped_storage", "element_size", "contiguous")


@pytest.mark.parametrize(
    "pickled",
    [
        dictionary(w=tensor(storage(location="cuda:7"))),
        dictionary(w=tensor(storage(location="../../etc/passwd"))),
        b"}(" + text("w") + b"K\1" + text("w") + tensor() + b"u",
        dictionary(w=tensor(), x=b"]q\1h\1a"),
        dictionary(w=tensor(), x=b")" + b"\x85" * 50_000),
        *(
            dictionary(w=PARAMETER + tensor() + b"\x88" + ORDERED + dictionary(**{method: b"K\1"}) + b"tR")
            for method in METHODS
        ),
    ],
    ids=["of a GPU", "of nowhere", "a key twice", "a list within itself", "a deep tuple", *METHODS],
)
def test_unusual_pickles_of_tensors_are_read(tmp_path: Path, pickled: bytes) -> None:
    """Among them a parameter that carries attributes with the names of methods."""
    found = open_weights(handmade(tmp_path / "a.pt", pickled)).tensors
    assert {name: read_whole(one).tolist() for name, one in found.items()} == {"w": [0, 1, 2, 3]}
