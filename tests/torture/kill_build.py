"""`demo build` stopped and killed on its way: the same files in the end.

    python tests/torture/kill_build.py [SEED]

Real processes make everything on the short schedule, with one thread: first undisturbed; then stopped
(SIGTERM) in the middle of the VAE, of a transformer and of the judge, each time gone on with by the same
command; then on a disk that is full when the audio encoder is to be saved, and with two parts at once, each
killed (SIGKILL) at a random moment. What is shipped is byte-equal in the end; the card tells of minutes, and
is not compared. Some minutes on two cores; needs 50 MB in the system's temporary folder.
"""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHORT = ("--short", "--threads", "1", "--seed", "3")
STOPS = ("vae", "v2v", "judge")
"""Parts in whose middle a build is stopped."""
KILLS = 3
LATE = (0.1, 3.0)
"""Seconds behind the beginning of a part, whose networks are imported by then."""
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


class Torn(Exception):
    """The end is another one."""


def line(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "avatarctl", "demo", "build", "--out", str(out), *SHORT, *more]


def made(out: Path) -> dict[str, bytes]:
    files = (path for path in (out / "cartoon").iterdir() if path.suffix in (".safetensors", ".json"))
    return {path.name: path.read_bytes() for path in files}


def is_made(out: Path, part: str) -> bool:
    return (out / "made" / part / "build.json").is_file()


def stopped_in(out: Path, part: str) -> None:
    """Runs until `part` was begun, and asks it to stop there. Raises Torn where it ends otherwise."""
    with subprocess.Popen(line(out), **QUIET) as child:
        while child.poll() is None and not (out / "made" / part).is_dir():
            time.sleep(0.001)
        time.sleep(0.2)
        child.send_signal(signal.SIGTERM)
        code = child.wait()
    if code != 6 or is_made(out, part):
        raise Torn(f"stopped in {part}: ended with {code}")


def killed(out: Path, part: str, seconds: float) -> bool:
    """Whether a process was killed so many seconds behind the beginning of its part; not where that was done
    before."""
    if is_made(out, part):
        return False
    with subprocess.Popen(line(out, "--part", part), **QUIET) as child:
        while child.poll() is None and not (out / "made" / part).is_dir():
            time.sleep(0.001)
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            return True
    return False


def on_a_full_disk(out: Path, part: str) -> None:
    """No file may be larger than what a part saves: it ends with a line, and leaves nothing half written."""

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    words = line(out, "--part", part)
    ended = subprocess.run(words, preexec_fn=little, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = ended.stderr.decode().splitlines()
    if ended.returncode != 3 or not said[-1].startswith("error: ") or "no space left" not in said[-1]:
        raise Torn(f"{part} on a full disk: ended with {ended.returncode}, {said[-1:]}")
    if is_made(out, part) or list(out.rglob("*.safetensors")):
        raise Torn(f"{part} on a full disk left files")


def finish(*lines: list[str]) -> None:
    """Runs them beside each other."""
    children = [subprocess.Popen(words, **QUIET) for words in lines]
    if any(child.wait() != 0 for child in children):
        raise Torn("a build that nobody stopped failed")


def torture(base: Path, draw: random.Random) -> str:
    finish(line(base / "whole"))
    wanted = made(base / "whole")
    for part in STOPS:
        stopped_in(base / "stopped", part)
    finish(line(base / "stopped"))
    if made(base / "stopped") != wanted:
        raise Torn("stopped three times, it ended otherwise")
    count, out = 0, base / "killed"
    on_a_full_disk(out, "audio")
    for _ in range(KILLS):
        count += killed(out, "vae", draw.uniform(*LATE))
        count += killed(out, "judge", draw.uniform(*LATE))
    if not count:
        raise Torn("every part was done before it was killed")
    finish(line(out, "--part", "vae"), line(out, "--part", "judge"))
    finish(line(out))
    if made(out) != wanted:
        raise Torn("killed, and made by two processes, it ended otherwise")
    return f"{len(STOPS)} stops, a full disk and {count} kills: {len(wanted)} files are the same"


def main() -> int:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.SystemRandom().randrange(10**6)
    print(f"kill_build: seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        try:
            print(torture(Path(name), random.Random(seed)))
        except Torn as error:
            print(f"kill_build: FAILED: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
