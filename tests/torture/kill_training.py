"""SIGKILL at random moments of `train`: the same bits in the end.

    python tests/torture/kill_training.py [SEED]

Real processes train 8 steps: with auxiliary losses on the clips that are drawn where no data is named; and
on four clips from scratch with an average, and an adapter of the built-in image model under accumulation.
First undisturbed; then 4 steps, a kill, and the rest; then 2, a
kill, 2, a kill, and 4, so that a resumed run is resumed; then killed many times anywhere: while it starts,
between steps, while a checkpoint is written, renamed, or an older one removed. Each goes on with
`--resume auto`, with another number of reading processes every time, and nobody removes a lock. After each
kill every checkpoint under its final name is whole. In the end weights, average, moments and log are
byte-equal to those of the run that nobody disturbed, and no temporary folder is left. Needs 300 MB in the
system's temporary folder.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from avatarctl.demo.samples import write_samples
from avatarctl.loading.trained import checkpoints, damage

STEPS, KILLS = 8, 6
FIXED = ("--size", "32x32", "--max-steps", str(STEPS), "--keep-last", "2", "-o", "checkpoint.every=1")
CASES = {
    "as typed, on the drawn clips": ("v2v", "--aux", "sync,lpips", "--frames", "17"),
    "v2v, full, average": ("v2v", "--batch-size", "2", "--ema", "0.9", "--frames", "9"),
    "i2v, adapter, accumulated": (
        "i2v", "--mode", "lora", "--lora-rank", "2", "--batch-size", "1",
        "-o", "train.gradient_accumulation=2", "--frames", "9",
    ),
}  # fmt: skip
COMPARED = ("trainable_weights.safetensors", "ema_weights.safetensors", "optimizer.safetensors")
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


class Torn(Exception):
    """A checkpoint is not whole, or the end is another one."""


def line(data: Path, run: Path, case: tuple[str, ...], workers: int) -> list[str]:
    which, *words = case
    words += [] if "--aux" in words else ["--data", str(data)]
    fixed = ["--out", str(run), *FIXED, "--resume", "auto", "--workers", str(workers)]
    return [sys.executable, "-m", "avatarctl", "train", which, *words, *fixed]


def bits(run: Path) -> list[bytes]:
    last = run / f"checkpoint-{STEPS}"
    held = [last / name for name in COMPARED if (last / name).is_file()]
    return [*(path.read_bytes() for path in held), (run / "log.jsonl").read_bytes()]


def finish(words: list[str]) -> None:
    subprocess.run(words, check=True, **QUIET)


def judge(run: Path) -> int:
    """The newest checkpoint of a killed run, 0 for none. Raises Torn."""
    newest = 0
    for step, path in checkpoints(run):
        if wrong := damage(path):
            raise Torn(f"{path.name}: {wrong}")
        newest = step
    return newest


def killed_at(words: list[str], run: Path, step: int) -> None:
    """Kills the command as soon as it has saved `step`."""
    with subprocess.Popen(words, **QUIET) as child:
        while child.poll() is None and not (run / f"checkpoint-{step}").is_dir():
            time.sleep(0.001)
        child.kill()


def killed_anywhere(words: list[str], run: Path, draw: random.Random) -> str:
    """Kills the command some time after it did something; what it was seen to do."""
    started = {path.name for path in run.iterdir()} if run.is_dir() else set()
    appears = draw.choice((r"lock", r"\.tmp-.*", r"checkpoint-\d+", r"\.tmp-.*"))
    wait = draw.choice((0, 0, 0.01, 0.1, 0.4)) * draw.random()
    with subprocess.Popen(words, **QUIET) as child:
        while child.poll() is None:
            names = {path.name for path in run.iterdir()} if run.is_dir() else set()
            if any(re.fullmatch(appears, name) for name in names - started):
                break
            if appears == "lock" and "lock" in names:
                break
            time.sleep(0.0005)
        time.sleep(wait)
        running = child.poll() is None
        child.kill()
    return appears if running else "ended before"


def torture(data: Path, base: Path, case: tuple[str, ...], draw: random.Random) -> Counter[str]:
    shutil.rmtree(base, ignore_errors=True)
    whole = base / "whole"
    finish(line(data, whole, case, 0))
    wanted = bits(whole)
    for name, stops in (("once", (4,)), ("twice", (2, 4))):
        run = base / name
        for workers, stop in enumerate(stops):
            killed_at(line(data, run, case, workers), run, stop)
            judge(run)
        finish(line(data, run, case, 2))
        if bits(run) != wanted:
            raise Torn(f"killed {name}, it ended otherwise")
    seen: Counter[str] = Counter()
    run = base / "often"
    for kill in range(KILLS):
        did = killed_anywhere(line(data, run, case, kill % 3), run, draw)
        seen[did] += 1
        seen[f"behind step {judge(run)}"] += 1
    finish(line(data, run, case, 0))
    if bits(run) != wanted:
        raise Torn("killed often, it ended otherwise")
    if left := list(run.glob(".tmp-*")):
        raise Torn(f"{left[0].name} is left")
    return seen


def main() -> int:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.SystemRandom().randrange(10**6)
    print(f"kill_training: {3 + KILLS} kills in each of {len(CASES)} cases, seed {seed}", flush=True)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "samples"
        write_samples(data, range(4), 17, "audio.wav")
        for title, case in CASES.items():
            try:
                seen = torture(data, Path(name) / "runs", case, draw)
            except Torn as error:
                print(f"kill_training: FAILED, {title}: {error}", file=sys.stderr)
                return 1
            print(f"{title}: {dict(sorted(seen.items()))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
