"""SIGKILL at random moments of `precompute-latents` and `precompute-audio`: the same files in the end.

    python tests/torture/kill_prepare.py [SEED [ROUNDS]]

Processes make samples of two drawn videos: one process; with two reading processes; two shards at once, one
of which is killed. They are forks of one that has imported PyTorch, or imports would take nearly all of the
time. Each case is killed several times in a row, while sources are cut or while artifacts are written, and
goes on in what the kill before left; after each kill:

- every artifact under its final name is complete and that of an undisturbed run;
- every sample's folder is complete; every other name begins with `.tmp-`.

Then the same command runs undisturbed: artifacts, folders and index are byte-equal to an undisturbed run,
and no temporary file is left. A minute on idle cores; needs 100 MB in the system's temporary folder.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import random
import select
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from avatarctl.demo.clips import clip
from avatarctl.media import write_clip

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.cli.forks import Fork, Forks

KILLS = 4
APPEARS = (
    (("sample.json", 0.1), ("*.safetensors", 0.1), (".tmp-*", 0.2)),
    (("*.safetensors", 0.05), (".tmp-*", 0.05)),
)
"""For each command: after what a kill comes, and seconds at most until it does."""

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
    common = ["--data", str(out), *SMALL, *options]
    return [["precompute-latents", "--from-videos", str(videos), *common], ["precompute-audio", *common]]


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


def finish(child: Fork) -> None:
    """Waits for a command that nobody kills; raises Torn where it fails."""
    _, said = child.communicate()
    if child.returncode:
        raise Torn(f"a command that nobody killed ended with exit code {child.returncode}: {said[-500:]}")


def found(out: Path, pattern: str) -> set[str]:
    """Paths with names like this below a folder that somebody writes into."""
    walked = os.walk(out)  # passes over what vanishes meanwhile
    paths = ((name, f"{at}/{name}") for at, folders, files in walked for name in (*folders, *files))
    return {path for name, path in paths if fnmatch.fnmatch(name, pattern)}


def stop(child: Fork, appears: str, out: Path, before: set[str], wait: float) -> bool:
    """Kills the command `wait` seconds after something new of this kind appeared; whether it still ran."""
    ended = select.poll()
    ended.register(child.stdout, 0)  # of what is always told: nobody has the other end any more
    while not ended.poll(1) and not found(out, appears) - before:
        pass
    time.sleep(wait)
    child.kill()
    child.communicate()
    return child.returncode == -9


def torture(
    forks: Forks,
    videos: Path,
    out: Path,
    options: tuple[tuple[str, ...], ...],
    whole: dict[str, str],
    draw: random.Random,
) -> Counter[str]:
    seen: Counter[str] = Counter()
    killed, *others = options
    shutil.rmtree(out, ignore_errors=True)
    beside = [forks.start(*commands(videos, out, each)[0], folder=videos) for each in others]
    for command in (0, 1):
        words = commands(videos, out, killed)[command]
        for _ in range(KILLS):
            appears, longest = draw.choice(APPEARS[command])
            before = found(out, appears)
            child = forks.start(*words, folder=videos)
            running = stop(child, appears, out, before, draw.uniform(0, longest))
            seen[judge(out, whole) if running else "ended before"] += 1
        finish(forks.start(*words, folder=videos))
        for child in beside:
            finish(child)
        following = others if command == 0 else ()
        beside = [forks.start(*commands(videos, out, each)[1], folder=videos) for each in following]
    if contents(out) != whole:
        raise Torn("the run after the kills wrote something else")
    if left := list(out.rglob(".tmp-*")):
        raise Torn(f"the run after the kills left {left[0].name}")
    return seen


def main() -> int:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.SystemRandom().randrange(10**6)
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    print(f"kill_prepare: {2 * KILLS} kills in {len(CASES)} cases, {rounds} rounds, seed {seed}", flush=True)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, Forks() as forks:
        videos, out = Path(name) / "videos", Path(name) / "out"
        videos.mkdir()
        for number, frames in enumerate((100, 60)):
            drawn = clip(number, frames)
            write_clip(videos / f"{number}.mp4", iter([drawn.frames]), audio=drawn.speech.audio)
        for words in commands(videos, out, ()):
            finish(forks.start(*words, folder=videos))
        whole = contents(out)
        for title, options in CASES.items():
            seen: Counter[str] = Counter()
            for _ in range(rounds):
                try:
                    seen += torture(forks, videos, out, options, whole, draw)
                except Torn as error:
                    print(f"kill_prepare: FAILED, {title}: {error}", file=sys.stderr)
                    return 1
            print(f"{title}: {dict(sorted(seen.items()))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
