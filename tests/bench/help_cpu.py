"""How much processor time a help page costs above a bare interpreter.

    python tests/bench/help_cpu.py

CPU seconds (user + system, from wait4) of `python -m avatarctl ...` against `python -c pass`, the commands
taking turns so that a busy moment of the machine hits all of them. Target: at most 0.15 s above bare
Python, and neither torch nor numpy imported.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import time

from reporting import print_table, python, timed_process, verdict

RUNS = 21
LIMIT = 0.15
HEAVY = ("torch", "numpy")
COMMANDS = {
    "`avatarctl --help`": ("--help",),
    "`avatarctl infer --help`": ("infer", "--help"),
    "`avatarctl models list`": ("models", "list"),
}


def heavy_imports(arguments: tuple[str, ...]) -> str:
    """Names among HEAVY that the command imports, seen by `-X importtime`."""
    done = subprocess.run(
        python("-X", "importtime", "-m", "avatarctl", *arguments), capture_output=True, text=True, check=False
    )
    names = set(re.findall(r"^import time:.*\|\s*(\S+)$", done.stderr, re.MULTILINE))
    return ", ".join(name for name in HEAVY if name in names) or "no"


def main() -> None:
    bare = python("-c", "pass")
    commands = {name: python("-m", "avatarctl", *arguments) for name, arguments in COMMANDS.items()}
    for command in (bare, *commands.values()):
        timed_process(command, time.perf_counter)  # byte code and file cache
    base: list[float] = []
    spent: dict[str, list[float]] = {name: [] for name in commands}
    codes: dict[str, int] = {}
    for _ in range(RUNS):
        base.append(timed_process(bare, time.perf_counter).cpu)
        for name, command in commands.items():
            used = timed_process(command, time.perf_counter)
            spent[name].append(used.cpu)
            codes[name] = used.code
    floor = statistics.median(base)
    rows = [("`python -c pass`", f"{floor:.3f}", "", "", "", 0)]
    for name, times in spent.items():
        median = statistics.median(times)
        above = median - floor
        judged = "does not run" if codes[name] else verdict(above, LIMIT)
        imported = heavy_imports(COMMANDS[name])
        rows.append((name, f"{median:.3f}", f"{above:.3f}", judged, imported, codes[name]))
    print_table(
        f"help_cpu: CPU seconds, medians of {RUNS} runs that take turns",
        ("command", "CPU s", "above bare Python", f"≤ {LIMIT} s", "imports torch or numpy", "exit code"),
        rows,
    )


if __name__ == "__main__":
    main()
