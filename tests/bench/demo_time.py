"""How long the built-in demo takes once everything is installed.

    python tests/bench/demo_time.py

Wall and CPU seconds of the whole process `python -m avatarctl infer --chunked --out FILE`, imports included:
what `make demo` does after the installation. Targets: at most 60 s, and 15 s of CPU for these 4 s of video.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from reporting import Used, print_table, python, timed_process, verdict

RUNS = 5
LIMIT, CPU_LIMIT = 60.0, 15.0


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
        ("command", "wall s", f"≤ {LIMIT:.0f} s", "CPU s", f"≤ {CPU_LIMIT:.0f} s"),
        [
            (
                "`avatarctl infer --chunked --out FILE`",
                f"{wall:.1f}",
                verdict(wall, LIMIT),
                f"{cpu:.1f}",
                verdict(cpu, CPU_LIMIT),
            )
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
