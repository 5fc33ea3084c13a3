"""SIGKILL at random moments of `convert-ckpt`: no torn file under a final name.

    python tests/torture/kill_convert.py [SEED]

Real processes convert a model of 170 MB: to a new file, over an older file, and over an older folder of
shards. One of three kills comes anywhere in the run, one while the temporary output exists, one about when
it gets its name. After each:

- the final name holds the older output or a complete new one, whose numbers, header and source hash are
  right; a name that was free may also still be free;
- an older folder may instead lie complete beside its place, as `.old-...` (see `staged_folder`);
- the source is what it was, and every other name begins with `.tmp-`.

At the end the same command runs undisturbed in what the last kill left, and removes it. Needs 1 GB in the
system's temporary folder.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from avatarctl.weights.layout import Sizes
from avatarctl.weights.layouts import omniavatar_shapes

KILLS = 15
SIZES = Sizes(
    width=768, ffn=3072, layers=8, in_channels=33, out_channels=16, text_dim=4096, freq_dim=256,
    audio_hidden_size=32, audio_input_dim=10752,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """final: what is written; older: whether something is there before."""

    final: str
    older: bool
    options: tuple[str, ...] = ()


CASES = {
    "a new file": Case("out.safetensors", older=False, options=("--to", "comfyui")),
    "over an older file": Case("out.safetensors", older=True, options=("--overwrite",)),
    "over an older folder": Case("out", older=True, options=("--overwrite", "--shard-size", "20MB")),
}


class Torn(Exception):
    """Something lies under a final name that should not."""


def command(source: Path, final: Path, options: tuple[str, ...]) -> list[str]:
    words = ["-m", "avatarctl", "convert-ckpt", str(source), "--out", str(final), "-q"]
    return [sys.executable, *words, *options]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(place: Path) -> dict[str, str]:
    """Digest of every file, by name relative to `place`; of `place` itself where it is a file."""
    if place.is_file():
        return {"": digest(place)}
    return {str(path.relative_to(place)): digest(path) for path in sorted(place.rglob("*")) if path.is_file()}


def numbers(place: Path, source_hash: str) -> dict[str, str]:
    """Digest of every tensor below `place`, after checking all that a header says."""
    found: dict[str, str] = {}
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    for path in files:
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        made_from = json.loads(header.pop("__metadata__")["avatarctl.sources"])
        if [one["sha256"] for one in made_from] != [source_hash]:
            raise Torn(f"{path.name} names {made_from} as its source")
        end = 0
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = hashlib.sha256(raw[start + begin : start + end]).hexdigest()
        if start + end != len(raw):
            raise Torn(f"{path.name} has {len(raw)} bytes, its header says {start + end}")
    if len(files) > 1:
        (index,) = place.glob("*.safetensors.index.json")
        if set(json.loads(index.read_text())["weight_map"]) != set(found):
            raise Torn(f"{index.name} names other tensors than the shards hold")
    return found


def write_older(final: Path) -> None:
    if final.suffix:
        final.write_bytes(b"older" * 1000)
    else:
        final.mkdir()
        (final / "model.safetensors").write_bytes(b"older" * 1000)
        (final / "config.json").write_text("{}")


def judge(folder: Path, case: Case, older: dict[str, str], complete: dict[str, str], source: str) -> str:
    """Which of the allowed states a kill left; raises Torn."""
    final = folder / case.final
    asides = [path for path in folder.iterdir() if path.name.startswith(".old-")]
    for path in folder.iterdir():
        if path != final and path not in asides and not path.name.startswith(".tmp-"):
            raise Torn(f"{path.name} is left")
    if not final.exists():
        if not case.older:
            return "nothing yet"
        if len(asides) == 1 and contents(asides[0]) == older:
            return "older aside"
        raise Torn("the older output is gone")
    if case.older and contents(final) == older:
        return "older"
    if numbers(final, source) == complete:
        return "new"
    raise Torn(f"{case.final} is neither the older nor the new output")


def kill_once(words: list[str], folder: Path, delay: float, after_temporary: bool) -> str:
    """Kills the command `delay` seconds after its start, or after its temporary output appeared."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while after_temporary and child.poll() is None:
            if any(path.name.startswith(".tmp-") for path in folder.iterdir()):
                break
            time.sleep(0.0005)
        time.sleep(delay)
        writing = any(path.name.startswith(".tmp-") for path in folder.iterdir())
        ended = child.poll() is not None
        child.kill()
    return "ended before" if ended else "while writing" if writing else "outside writing"


def undisturbed(words: list[str], folder: Path) -> tuple[float, float]:
    """Seconds of the run before its temporary output appears and while it exists."""
    started = time.monotonic()
    appeared = None
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            if appeared is None and any(path.name.startswith(".tmp-") for path in folder.iterdir()):
                appeared = time.monotonic()
            time.sleep(0.0005)
    if child.returncode or appeared is None:
        raise SystemExit(f"kill_convert: the command ended with exit code {child.returncode}")
    return appeared - started, time.monotonic() - appeared


def torture(title: str, case: Case, source: Path, base: Path, draw: random.Random) -> Counter[str]:
    folder = base / "work"
    final = folder / case.final
    words = command(source, final, case.options)
    source_hash = digest(source)

    def fresh() -> dict[str, str]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if case.older:
            write_older(final)
        return contents(final)

    for _ in range(2):  # the first run is slower than those after it
        fresh()
        before, during = undisturbed(words, folder)
    complete = numbers(final, source_hash)
    seen: Counter[str] = Counter()
    for number in range(KILLS):
        older = fresh()
        delay = draw.uniform(*[(0, before + during), (0, during), (0.9 * during, 1.1 * during)][number % 3])
        moment = kill_once(words, folder, delay, after_temporary=number % 3 != 0)
        state = judge(folder, case, older, complete, source_hash)
        if digest(source) != source_hash:
            raise Torn("the source has changed")
        seen[f"{moment}: {state}"] += 1
    if not any(key.startswith("while writing") for key in seen):
        raise SystemExit(f"kill_convert: no kill met the writing ({title}); run it on a quieter machine")
    for aside in folder.glob(".old-*"):  # as a user would after reading the message
        aside.rename(final)
    undisturbed(words if "--overwrite" in words else [*words, "--overwrite"], folder)
    if numbers(final, source_hash) != complete:
        raise Torn("the run after the kills wrote something else")
    if any(path.name.startswith(".tmp-") for path in folder.iterdir()):
        raise Torn("the run after the kills left what they left")
    return seen


def main() -> int:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.SystemRandom().randrange(10**6)
    print(f"kill_convert: {KILLS} kills for each of {len(CASES)} cases, seed {seed}", flush=True)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source.safetensors"
        torch.manual_seed(0)
        save_file(
            {key: (torch.randn(shape) * 0.02).bfloat16() for key, shape in omniavatar_shapes(SIZES).items()},
            source,
        )
        print(f"source: {source.stat().st_size / 1e6:.0f} MB", flush=True)
        for title, case in CASES.items():
            try:
                seen = torture(title, case, source, Path(name), draw)
            except Torn as error:
                print(f"kill_convert: FAILED, {title}: {error}", file=sys.stderr)
                return 1
            print(f"{title}: {dict(sorted(seen.items()))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
