"""SIGKILL at random moments of `precompute-latents` and `precompute-audio`: the same files in the end.

    python tests/torture/kill_prepare.py [SEED]

Real processes make samples of two drawn videos: one process; with two reading processes; two shards at once,
one of which is killed. Each case is killed several times in a row, anywhere in the run, while sources are cut
or while artifacts are written, and goes on in what the kill before left; after each kill:

- every artifact under its final name is complete and that of an undisturbed run;
- every sample's folder is complete; every other name begins with `.tmp-`.

Then the same command runs undisturbed: artifacts, folders and index are byte-equal to an undisturbed run,
and no temporary file is left. Needs 100 MB in the system's temporary folder.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from avatarctl.demo.clips import clip
from avatarctl.media import write_clip

ROUNDS = 3
KILLS = 4
SMALL = ("--size", "32x32", "--frames", "9")
CASES = {
    "one process": ((),),
    "two reading processes": (("--workers", "2"),),
    "two shards at once": (("--shard", "0/2"), ("--shard", "1/2")),
}
TOLD = (".report.jsonl", ".report.txt", ".run.yaml")
"""What tells of times, or names places."""


class Torn(Exception):
    """The files are in none of the allowed states."""


def commands(videos: Path, out: Path, options: tuple[str, ...]) -> list[list[str]]:
    base = [sys.executable, "-m", "avatarctl"]
    common = ["--data", str(out), *SMALL, *options]
    return [
        [*base, "precompute-latents", "--from-videos", str(videos), *common],
        [*base, "precompute-audio", *common],
    ]


def contents(out: Path) -> dict[str, str]:
    held = {}
    for folder, folders, files in os.walk(out):
        folders[:] = [name for name in folders if not name.startswith(".tmp-") and name != "known"]
        for name in files:
            if not name.endswith(TOLD) and not name.startswith(".tmp-"):  # another shard may be writing it
                path = Path(folder) / name
                held[path.relative_to(out).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return held


def judge(out: Path, whole: dict[str, str]) -> str:
    """How far a killed run had come; raises Torn."""
    held = contents(out)
    for name, digest in held.items():
        if name.endswith("index.jsonl"):
            continue
        if name not in whole:
            raise Torn(f"{name} is left")
        if digest != whole[name]:
            raise Torn(f"{name} differs from that of an undisturbed run")
    for name in held:
        if name.endswith("/sample.json"):
            whole_folder = {
                f"{Path(name).parent}/{part}" for part in ("sub_clip.mp4", "audio.wav", "prompt.txt")
            }
            if lacking := whole_folder - held.keys():
                raise Torn(f"{lacking} are missing")
    if any(name.endswith(".safetensors") for name in held):
        return "artifacts"
    return "folders" if held else "nothing yet"


def run(words: list[str]) -> float:
    started = time.monotonic()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - started


def found(out: Path, pattern: str) -> int:
    """Names like this below a folder that somebody writes into."""
    walked = os.walk(out)  # passes over what vanishes meanwhile
    return sum(fnmatch.fnmatch(name, pattern) for _, folders, files in walked for name in (*folders, *files))


def stop(words: list[str], appears: str, out: Path, wait: float) -> bool:
    """Kills the command `wait` seconds after something new of this kind appeared; whether it still ran."""
    before = found(out, appears)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while child.poll() is None and found(out, appears) <= before:
            time.sleep(0.001)
        time.sleep(wait)
        running = child.poll() is None
        child.kill()
    return running


def torture(
    videos: Path, out: Path, options: tuple[tuple[str, ...], ...], whole: dict[str, str], draw: random.Random
) -> Counter[str]:
    seen: Counter[str] = Counter()
    killed, *others = options
    shutil.rmtree(out, ignore_errors=True)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    beside = [subprocess.Popen(commands(videos, out, each)[0], **quiet) for each in others]
    for command in (0, 1):
        words = commands(videos, out, killed)[command]
        for _ in range(KILLS):
            appears = draw.choice(("*.json", "*.safetensors", ".tmp-*"))
            running = stop(words, appears, out, draw.uniform(0, 0.1))
            seen[judge(out, whole) if running else "ended before"] += 1
        run(words)
        for child in beside:
            if child.wait():
                raise Torn(f"the shard that nobody killed ended with exit code {child.returncode}")
        for each in others:
            run(commands(videos, out, each)[command])
        beside = []
    if contents(out) != whole:
        raise Torn("the run after the kills wrote something else")
    if left := list(out.rglob(".tmp-*")):
        raise Torn(f"the run after the kills left {left[0].name}")
    return seen


def main() -> int:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.SystemRandom().randrange(10**6)
    print(
        f"kill_prepare: {2 * KILLS} kills in {ROUNDS} rounds of {len(CASES)} cases, seed {seed}", flush=True
    )
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        videos, out = Path(name) / "videos", Path(name) / "out"
        videos.mkdir()
        for number, frames in enumerate((100, 60)):
            drawn = clip(number, frames)
            write_clip(videos / f"{number}.mp4", iter([drawn.frames]), audio=drawn.speech.audio)
        for words in commands(videos, out, ()):
            run(words)
        whole = contents(out)
        for title, options in CASES.items():
            seen: Counter[str] = Counter()
            for _ in range(ROUNDS):
                try:
                    seen += torture(videos, out, options, whole, draw)
                except Torn as error:
                    print(f"kill_prepare: FAILED, {title}: {error}", file=sys.stderr)
                    return 1
            print(f"{title}: {dict(sorted(seen.items()))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
