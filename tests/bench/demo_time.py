"""How long the built-in demo takes once everything is installed.

    python tests/bench/demo_time.py

Wall and CPU seconds of the whole process `python -m avatarctl infer --chunked --out FILE`, imports included:
what `make demo` does after the installation. Target: at most 60 s.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from reporting import Used, print_table, python, timed_process, verdict

RUNS = 3
LIMIT = 60.0


def main() -> int:
    runs: list[Used] = []
    with tempfile.TemporaryDirectory() as folder:
        for run in range(RUNS):
            out = Path(folder) / f"demo{run}.mp4"
            used = timed_process(
                python("-m", "avatarctl", "infer", "--chunked", "--out", str(out)), time.perf_counter
            )
            if used.code or not out.is_file():
                print(f"demo_time: the command ended with exit code {used.code}", file=sys.stderr)
                return 1
            runs.append(used)
    wall = statistics.median(used.wall for used in runs)
    cpu = statistics.median(used.cpu for used in runs)
    print_table(
        f"demo_time: the demo after installation, medians of {RUNS} runs",
        ("command", "wall s", "CPU s", f"≤ {LIMIT:.0f} s"),
        [("`avatarctl infer --chunked --out FILE`", f"{wall:.1f}", f"{cpu:.1f}", verdict(wall, LIMIT))],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
