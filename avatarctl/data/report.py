"""What a run of preparation did, and what the data set holds: an index of samples, a report of the run."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from avatarctl.atomic import atomic_write_text
from avatarctl.errors import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Done", "write_index", "write_report"]


@dataclass(frozen=True)
class Done:
    """One sample, or one source that became samples: what happened to it.

    frames: at 25 a second. artifacts: name to fingerprint, of what is up to date now. facts: of a source its
    windows and cuts, and the share of its frames with a face where faces were looked for. seconds: that it
    took.
    """

    name: str
    state: Literal["done", "skipped", "failed"]
    reason: str = ""
    frames: int = 0
    seconds: float = 0.0
    kind: Literal["sample", "source"] = "sample"
    artifacts: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def write_index(own: Path, results: Sequence[Done], names: Collection[str], *, whole: bool) -> None:
    """`index.jsonl`: every sample that has artifacts, by name, without times, so that it says the same
    however often a run was interrupted. What other commands wrote of other samples and artifacts stays; what
    is no sample any more goes: of a source that is cut otherwise now, or where `results` are the whole set.

    names: of the artifacts that this command makes.
    """
    path = own / "index.jsonl"
    samples = {each.name for each in results if each.kind == "sample"}
    sources = {each.name for each in results if each.kind == "source" and each.state != "failed"}
    with _alone(own):
        held = {
            name: entry
            for name, entry in _read(path).items()
            if name in samples
            or not (whole or any(str(folder) in sources for folder in PurePosixPath(name).parents))
        }
        for each in results:
            if each.kind == "source":
                continue
            before = held.get(each.name, {"artifacts": {}, "frames": 0})
            if each.state == "failed":  # what this command makes of it is not to be used
                artifacts = {name: made for name, made in before["artifacts"].items() if name not in names}
            else:
                artifacts = {**before["artifacts"], **each.artifacts}
            frames = each.frames or before["frames"]
            held[each.name] = {"sample": each.name, "frames": frames, "artifacts": artifacts}
        held = {name: entry for name, entry in held.items() if entry["artifacts"]}
        lines = (json.dumps(held[name], sort_keys=True) for name in sorted(held))
        atomic_write_text(path, "".join(f"{line}\n" for line in lines))


def write_report(own: Path, stem: str, results: Sequence[Done]) -> Path:
    """`STEM.report.jsonl`, a line for each, and `STEM.report.txt`, the same as a table; the latter's path."""
    lines = (json.dumps(vars(each), sort_keys=True) for each in results)
    atomic_write_text(own / f"{stem}.report.jsonl", "".join(f"{line}\n" for line in lines))
    table = own / f"{stem}.report.txt"
    atomic_write_text(table, "".join(f"{line}\n" for line in _table(results)))
    return table


def _table(results: Sequence[Done]) -> Iterator[str]:
    width = min(max((len(printable(each.name)) for each in results), default=4), 60)
    yield f"{'name':{width}}  {'state':7}  {'frames':>7}  {'seconds':>8}  {'cuts':>4}  {'faces':>5}  what"
    for each in results:
        cuts = len(each.facts["cuts"]) if "cuts" in each.facts else ""
        what = each.reason or ", ".join(each.artifacts) or _windows(each.facts)
        first = f"{printable(each.name):{width}}  {each.state:7}  {each.frames:7}"
        faces = f"{each.facts['face_share']:.0%}" if "face_share" in each.facts else ""
        yield f"{first}  {each.seconds:8.2f}  {cuts:>4}  {faces:>5}  {printable(what)}"


def _windows(facts: dict[str, Any]) -> str:
    count = len(facts.get("windows", ()))
    return f"{count} sample{'' if count == 1 else 's'}" if count else ""


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    entries = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line)
    return {entry["sample"]: entry for entry in entries}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time: two shards may end together."""
    if fcntl is None:
        yield
        return
    import os

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
