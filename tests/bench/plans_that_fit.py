"""Plans that `--fit` finds, counted on fake tensors, under their own prediction as a limit of real bytes.

    python tests/bench/plans_that_fit.py

A model of three blocks and one of eight wide ones, each in three modes: its run passes under the bytes that
were predicted for device and host, and the next faster mode raises at the operation that passes them
(tests/profiling/test_fit.py, which predicts on real tensors). CPU seconds of each; a minute or two.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.profiling import test_fit

WIDE = {
    "num_attention_heads": 8,
    "attention_head_dim": 64,
    "ffn_dim": 3072,
    "num_layers": 8,
    "vocal_ffn_dim": 1024,
}


def main() -> None:
    test_fit.TENSORS = "fake"
    sizes = {**test_fit.TINY.network["dit"], **WIDE}
    wide = replace(test_fit.TINY, network=MappingProxyType({**test_fit.TINY.network, "dit": sizes}))
    for told, row in (("three blocks", test_fit.ROW), ("eight wide blocks", wide)):
        test_fit.ROW = row
        test_fit.of_mode.cache_clear()
        for mode in ("full", "model", "group"):
            begun = time.process_time()
            test_fit.test_a_plan_runs_under_its_own_prediction_and_the_next_faster_one_does_not(mode)
            account, took = test_fit.of_mode(mode), time.process_time() - begun
            needs = f"{account.live_bytes:>13,} bytes of the device, {account.host:>11,} of the host"
            print(f"{told:17} {mode:6} {needs}, predicted and enough; {took:.1f} s of CPU")


if __name__ == "__main__":
    main()
