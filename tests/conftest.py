"""What holds for the whole suite. The environment is set before anything imports torch."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# Nothing may be downloaded: a test that tried would pass here and fail on a train.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor may what this machine happens to have in its cache be found.
os.environ["HF_HUB_CACHE"] = str(Path(__file__).parent / "no-hub-cache")
os.environ["MODELSCOPE_CACHE"] = os.environ["HF_HUB_CACHE"]


# Servers of the suite are on this machine: no proxy of this environment leads to them.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


# Two processes of the suite share the machine, and its models are tiny: one thread each. Child processes
# inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# As `cli/start.py` does around the imports of a run: the suite's imports make a million objects that stay,
# and every collection would walk over them.
gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


SLOW = (
    "test_processes.py", "test_stableavatar_long.py", "test_release.py", "test_release_refused.py",
    "test_counted_work.py", "test_memory.py", "test_parity.py", "test_fused.py", "test_infer_imports.py",
    "test_other_devices.py", "test_video_writer.py", "test_finished_video.py", "test_video_file.py",
    "test_pull_processes.py", "test_convert.py", "test_release_stable.py", "test_it_talks.py",
    "test_video_reader.py",
)  # fmt: skip
"""Files of ten seconds and more: one of them begun last would leave the other process without work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.path.name, len(SLOW)))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of larger inputs and reference numbers beside the checkout; tests skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name}/ beside the checkout")
    return folder
