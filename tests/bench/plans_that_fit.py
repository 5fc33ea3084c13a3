"""Plans that `--fit` finds, counted on fake tensors, under their own prediction as a limit of real bytes.

    python tests/bench/plans_that_fit.py

A model of three blocks in each of three modes: its run passes under the bytes that were predicted, and the
next faster mode raises at the operation that passes them (tests/profiling/test_fit.py, which predicts on real
tensors). CPU seconds of each.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.profiling import test_fit


def main() -> None:
    test_fit.TENSORS = "fake"
    for mode in ("full", "model", "group"):
        begun = time.process_time()
        test_fit.test_a_plan_runs_under_its_own_prediction_and_the_next_faster_one_does_not(mode)
        live = test_fit.of_mode(mode).live_bytes
        print(f"{mode:10} {live:>12,} bytes predicted and enough; {time.process_time() - begun:.1f} s of CPU")


if __name__ == "__main__":
    main()
