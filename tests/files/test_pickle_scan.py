"""What a pickle may ask for, counted before anything is made of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from avatarctl.errors import UnusableWeights
from avatarctl.files.pickle_scan import MAX_OBJECTS, MAX_PICKLE, scan_pickle

CONTAINERS = {"dictionaries": b"}", "lists": b"]", "tuples": b"(t", "pairs": b"NN\x86"}


@pytest.mark.parametrize("one", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_containers_count_as_objects(one: bytes) -> None:
    """One byte makes an empty dictionary of 64 bytes."""
    many = b"\x80\x02](" + one * (MAX_OBJECTS + 1) + b"e."
    assert len(many) < MAX_PICKLE
    with pytest.raises(UnusableWeights, match="more than 200000 objects"):
        scan_pickle(io.BytesIO(many), Path("a.pt"))
    few = b"\x80\x02](" + one * (MAX_OBJECTS // 4) + b"e."
    scan_pickle(io.BytesIO(few), Path("a.pt"))
