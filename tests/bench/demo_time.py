"""How long the built-in demo takes once everything is installed.

    python tests/bench/demo_time.py

Wall and CPU seconds of whole processes, imports included: `avatarctl demo`, which is what `make demo` does
after the installation, `avatarctl demo --audio FILE` with 5 s of audio, and `avatarctl infer --chunked`.
Targets: at most 60 s, and 15 s of CPU for 5 s of video.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from reporting import Used, print_table, python, timed_process, verdict, write_voice

RUNS = 5
LIMIT, CPU_LIMIT = 60.0, 15.0


def taken(*words: str) -> tuple[float, float] | None:
    """Medians of wall and CPU seconds; None where the command failed."""
    runs: list[Used] = []
    with tempfile.TemporaryDirectory() as folder:
        for run in range(RUNS):
            out = Path(folder) / f"demo{run}.mp4"
            used = timed_process(python("-m", "avatarctl", *words, "--out", str(out)), time.perf_counter)
            if used.code or not out.is_file():
                print(f"demo_time: {words[0]} ended with exit code {used.code}", file=sys.stderr)
                return None
            runs.append(used)
    return statistics.median(used.wall for used in runs), statistics.median(used.cpu for used in runs)


def main() -> int:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        voice = str(write_voice(Path(folder) / "voice.wav", 5))
        commands = {
            "`avatarctl demo`, 4 s": ("demo",),
            "`avatarctl demo --audio`, 5 s": ("demo", "--audio", voice),
            "`avatarctl infer --chunked`, 4 s": ("infer", "--chunked"),
        }
        for told, words in commands.items():
            found = taken(*words)
            if found is None:
                return 1
            wall, cpu = found
            rows.append((told, f"{wall:.1f}", verdict(wall, LIMIT), f"{cpu:.1f}", verdict(cpu, CPU_LIMIT)))
    print_table(
        f"demo_time: the demo after installation, medians of {RUNS} runs",
        ("command", "wall s", f"≤ {LIMIT:.0f} s", "CPU s", f"≤ {CPU_LIMIT:.0f} s"),
        rows,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
