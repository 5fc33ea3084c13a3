"""What holds for the whole suite. The environment is set before anything imports torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Nothing may be downloaded: a test that tried would pass here and fail on a train.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor may what this machine happens to have in its cache be found.
os.environ["HF_HUB_CACHE"] = str(Path(__file__).parent / "no-hub-cache")


# Servers of the suite are on this machine: no proxy of this environment leads to them.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


# Two processes of the suite share the machine, and its models are tiny: one thread each. Child processes
# inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of larger inputs and reference numbers beside the checkout; tests skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name}/ beside the checkout")
    return folder
