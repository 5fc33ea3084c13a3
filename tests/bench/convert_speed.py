"""How fast `convert-ckpt` writes a file of more than 2 GB, against `cp` and `sync`, and in how much memory.

    python tests/bench/convert_speed.py [FOLDER]

An OmniAvatar 1.3B in the published layout, random bf16 weights, as safetensors and as a zip `.pt`. Whole
processes, imports included, take turns: `cp` and `sync` of the source, then `convert-ckpt`, which also scans
for NaN, hashes the source and flushes its output to the disk. Memory is the largest resident set above that
of `convert-ckpt --inspect` of the same file. Targets: at least 0.8 x the speed of the copy, at most 300 MB.

FOLDER (default: the system's temporary one) needs 9 GB and is left as it was. Files are read from the page
cache where they fit: that is the harder case, as hashing then has nothing to wait for.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reporting import Used, print_table, python, timed_process, verdict

RUNS = 5
SLOWEST = 1 / 0.8
MOST_MEMORY = 300e6

# A process of its own, because torch's memory here would count as that of the commands measured.
WRITE_SOURCES = """
import sys
import torch
from safetensors.torch import save_file
from avatarctl.weights.layout import Sizes
from avatarctl.weights.layouts import omniavatar_shapes

sizes = Sizes(width=1536, ffn=8960, layers=30, in_channels=33, out_channels=16, text_dim=4096, freq_dim=256,
              audio_hidden_size=32, audio_input_dim=10752)
state = {name: torch.empty(shape, dtype=torch.int16).random_(0, 0x3F80).view(torch.bfloat16)
         for name, shape in omniavatar_shapes(sizes).items()}
save_file(state, sys.argv[1])
torch.save(state, sys.argv[2])
"""

CASES = {
    "safetensors": ("source.safetensors", ()),
    "safetensors, 33 → 49 channels": ("source.safetensors", ("--channels", "49")),
    "safetensors, to ComfyUI names": ("source.safetensors", ("--to", "comfyui")),
    "zip .pt": ("source.pt", ()),
}


def timed(command: list[str], written: Path) -> Used:
    """One command after the disk came to rest; its output is removed."""
    os.sync()
    used = timed_process(command, time.perf_counter)
    if used.code or (written.name != "-" and not written.is_file()):
        raise SystemExit(f"convert_speed: {' '.join(command)} ended with exit code {used.code}")
    if written.name != "-":
        written.unlink()
    return used


def convert(source: Path, *arguments: str) -> list[str]:
    return python("-m", "avatarctl", "convert-ckpt", str(source), *arguments)


def measure(folder: Path) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    copied, out = folder / "copied", folder / "out.safetensors"
    for title, (name, options) in CASES.items():
        source = folder / name
        # Reflinks would copy no bytes; only this file is waited for, not what others write.
        copy = ["sh", "-c", 'cp --reflink=never "$1" "$2" && sync "$2"', "cp", str(source), str(copied)]
        command = convert(source, "--out", str(out), *options)
        timed(copy, copied)
        timed(command, out)  # byte code and page cache
        pairs = [(timed(copy, copied), timed(command, out)) for _ in range(RUNS)]
        looked = timed(convert(source, "--inspect"), Path("-"))
        plain = statistics.median(pair[0].wall for pair in pairs)
        ours = statistics.median(pair[1].wall for pair in pairs)
        ratio = statistics.median(pair[1].wall / pair[0].wall for pair in pairs)
        above = max(pair[1].peak for pair in pairs) - looked.peak
        rows.append(
            (
                title,
                f"{source.stat().st_size / 1e9:.2f}",
                f"{plain:.2f}",
                f"{ours:.2f}",
                f"{1 / ratio:.2f}",
                verdict(ratio, SLOWEST),
                f"{looked.peak / 1e6:.0f}",
                f"{above / 1e6:.0f}",
                verdict(above, MOST_MEMORY),
            )
        )
    return rows


def main() -> int:
    where = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        sources = [str(folder / "source.safetensors"), str(folder / "source.pt")]
        subprocess.run(python("-c", WRITE_SOURCES, *sources), check=True)
        rows = measure(folder)
    print_table(
        f"convert_speed: medians of {RUNS} runs that take turns",
        (
            "source", "GB", "cp + sync s", "convert-ckpt s", "speed of cp + sync", "≥ 0.8",
            "--inspect MB", "above it MB", "≤ 300 MB",
        ),
        rows,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
