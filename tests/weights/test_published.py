"""Hashes by which published files are known, from tables of names and shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from avatarctl.files.tensors import TensorInfo
from avatarctl.weights.layout import Sizes
from avatarctl.weights.layouts import OMNIAVATAR, WAN
from avatarctl.weights.published import PUBLISHED, hash_of, published_hash
from avatarctl.weights.wan import WAN_TRANSFORMER
from avatarctl.weights.weight_file import Naming, WeightFile
from tests.weights.published_tables import Shapes, stableavatar, umt5, wan

SPECIFIED = {
    "Wan2.1-T2V-1.3B": (wan(1536, 8960, 30), "9269f8db9040a9d860eaca435be61814"),
    "Wan2.1-T2V-14B": (wan(5120, 13_824, 40), "aafcfd9672c3a2456dc46e1cb6e52c70"),
    "Wan2.1-I2V-14B": (wan(5120, 13_824, 40, 36, image=1280), "6bfcfb3b342cb286ce886889d519a77e"),
    "UMT5": (umt5(), "9c8818c2cbea55eca56c7b447df170da"),
}
COMPUTED = {
    "Wan2.1-Fun-1.3B-InP": wan(1536, 8960, 30, 36, image=1280),
    "Wan2.2-I2V-A14B": wan(5120, 13_824, 40, 36),
    "Wan2.2-TI2V-5B": wan(3072, 14_336, 30, 48, out=48),
    "StableAvatar-1.3B": stableavatar(),
}
"""Not in the specification: sizes of the releases; what is tested is that the table holds their hashes."""


def test_published_sizes_have_the_specified_tensors_and_parameters() -> None:
    for name, tensors, parameters in (
        ("Wan2.1-T2V-1.3B", 825, 1_418_996_800),
        ("Wan2.1-T2V-14B", 1095, 14_288_491_584),
        ("UMT5", 242, 5_680_910_336),
    ):
        shapes, _ = SPECIFIED[name]
        assert len(shapes) == tensors
        assert sum(TensorInfo("F32", shape).numel for shape in shapes.values()) == parameters


@pytest.mark.parametrize("name", SPECIFIED)
def test_hashes_of_the_specification(name: str) -> None:
    shapes, expected = SPECIFIED[name]
    assert published_hash(shapes) == expected
    assert name in PUBLISHED[expected]


def test_diffusers_names_of_the_14b_base() -> None:
    renamed = WAN_TRANSFORMER.rename_to_internal(SPECIFIED["Wan2.1-T2V-14B"][0])
    assert PUBLISHED[published_hash(renamed)] == "Wan2.1-T2V-14B in diffusers names"


@pytest.mark.parametrize("name", COMPUTED)
def test_hashes_of_other_releases(name: str) -> None:
    assert name in PUBLISHED[published_hash(COMPUTED[name])]


def test_one_name_or_size_changes_the_hash_and_order_does_not() -> None:
    shapes: Shapes = {"a.weight": (2, 3), "b.weight": (1,)}
    known = published_hash(shapes)
    assert published_hash(dict(reversed(shapes.items()))) == known
    assert published_hash({**shapes, "a.weight": (3, 2)}) != known
    assert published_hash({"a.weight": (2, 3), "c.weight": (1,)}) != known


def test_a_name_that_no_text_can_hold_is_hashed() -> None:
    assert len(published_hash({"a\udc80": (1,)})) == 32


def _checkpoint(naming: Naming, **changes: object) -> WeightFile:
    tensors = {
        name: _Header(TensorInfo("BF16", shape)) for name, shape in SPECIFIED["Wan2.1-T2V-14B"][0].items()
    }
    fields = {"kind": "model", "layout": WAN, **changes}
    return WeightFile(path=Path("x"), naming=naming, variant="", sizes=Sizes(), tensors=tensors, **fields)


class _Header:
    """A tensor of which nobody may read a value."""

    def __init__(self, info: TensorInfo) -> None:
        self.info = info

    def read(self, start: int, stop: int) -> np.ndarray:
        raise AssertionError("a value was read")


def test_a_file_is_hashed_under_the_names_it_has() -> None:
    assert PUBLISHED[hash_of(_checkpoint("original")) or ""] == "Wan2.1-T2V-14B"
    assert PUBLISHED[hash_of(_checkpoint("comfyui")) or ""] == "Wan2.1-T2V-14B"
    assert PUBLISHED[hash_of(_checkpoint("diffusers")) or ""] == "Wan2.1-T2V-14B in diffusers names"


def test_adapters_and_files_with_strange_tensors_have_none() -> None:
    assert hash_of(_checkpoint("original", kind="adapter", layout=OMNIAVATAR)) is None
    assert hash_of(_checkpoint("original", unknown=("strange",))) is None


def test_every_hash_is_md5() -> None:
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in PUBLISHED)
