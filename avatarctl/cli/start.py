"""What a run spends before its first frame, and between its small steps: imports, and threads that wait."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

__all__ = ["importing_networks", "let_waiting_threads_sleep"]


@contextlib.contextmanager
def importing_networks() -> Iterator[None]:
    """Around the first import of torch, transformers and diffusers: Python collects no garbage meanwhile.

    They make 700,000 objects that stay, over which the collector would walk again and again: a quarter of
    what the imports cost (docs/benchmarks.md). What is there at the end is left alone by later collections
    too. Where diffusers was imported before, this does nothing.
    """
    if "diffusers" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def let_waiting_threads_sleep() -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless the environment says otherwise.

    As a rule they spin. The built-in networks are so small that on two cores that others use as well, a
    video took 30 to 46 s of CPU that way and 14 to 18 s this way (docs/benchmarks.md). Numbers stay the
    same. The library reads it once, when torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
