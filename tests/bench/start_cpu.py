"""How much processor time passes before a plan is shown, and how much a run spends on imports.

    python tests/bench/start_cpu.py

CPU seconds (user + system, from wait4) of whole processes, the commands taking turns. `infer --dry-run` with
a built-in row, with a tiny release whose transformer is safetensors, and with the same as a `.pt`: at most
1.5 s where no file is a pickle. Then the imports of a run alone, and which packages they are: the own time of
each module by `-X importtime` (wall time), added up by package, as a share.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from reporting import print_table, python, timed_process, verdict

RUNS = 3
LIMIT = 1.5
DRY = ("-m", "avatarctl", "infer", "--dry-run")
RUN = "import avatarctl.pipelines.job, avatarctl.pipelines.infer"
PACKAGES = 8


def write_files(root: Path) -> None:
    """A tiny release, and its model whole in both formats. In a child: the parent imports no torch."""
    import torch
    from safetensors.torch import save_file

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the writer of the release
    from tests.pipelines import tiny_release as tiny

    release = tiny.tiny_release()
    release.write(root)
    whole = release.base | {name: held for name, held in release.adapter.items() if "lora" not in name}
    for name in ("whole", "pickle"):
        (root / name).mkdir()
        tiny.write_json(root / name / "config.json", {"num_heads": tiny.TINY.heads})
    save_file(whole, root / "whole" / "model.safetensors")
    torch.save(whole, root / "pickle" / "model.pt")


def packages() -> list[tuple[str, float, int]]:
    """Name, share of the time and modules of the packages that a run's imports spend most on."""
    done = subprocess.run(python("-X", "importtime", "-c", RUN), capture_output=True, text=True, check=True)
    spent: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for own, name in re.findall(r"^import time:\s*(\d+) \|.*\|\s*(\S+)$", done.stderr, re.MULTILINE):
        package = name.partition(".")[0]
        spent[package] += int(own)
        modules[package] += 1
    whole = spent.total()
    return [(name, own / whole, modules[name]) for name, own in spent.most_common(PACKAGES)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        subprocess.run(python(__file__, folder), check=True)
        of_release = ("--weights-root", folder, "--size", "64x64", "--model")
        commands = {
            "`python -c pass`": ("-c", "pass"),
            "`infer --dry-run`, built-in row": DRY,
            "`infer --dry-run`, safetensors files": (*DRY, *of_release, str(root / "whole")),
            "`infer --dry-run`, a `.pt` among them": (*DRY, *of_release, str(root / "pickle")),
            "`import torch`": ("-c", "import torch"),
            "all imports of a run": ("-c", RUN),
        }
        spent: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(RUNS + 1):
            for name, words in commands.items():
                used = timed_process(python(*words), time.perf_counter)
                if used.code:
                    sys.exit(f"{name} ended with {used.code}")
                if turn:  # the first fills the file cache and writes byte code
                    spent[name].append(used.cpu)
    rows = []
    for name, times in spent.items():
        median = statistics.median(times)
        limited = "dry-run" in name and ".pt" not in name
        rows.append((name, f"{median:.2f}", verdict(median, LIMIT) if limited else ""))
    print_table(
        f"start_cpu: CPU seconds, medians of {RUNS} runs that take turns",
        ("what", "CPU s", f"≤ {LIMIT} s"),
        rows,
    )
    print_table(
        "The imports of a run by package",
        ("package", "share of the time", "modules"),
        [(name, f"{share:.0%}", count) for name, share, count in packages()],
    )


if __name__ == "__main__":
    if len(sys.argv) == 2:
        write_files(Path(sys.argv[1]))
    else:
        main()
