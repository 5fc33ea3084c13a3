"""What `--dry-run` says: how much there is to do, how large it gets, how long it takes."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from avatarctl.data.windows import RawVideo
from avatarctl.errors import AvatarctlError, under_name
from avatarctl.events import Emit, Notice
from avatarctl.media import open_video

if TYPE_CHECKING:
    from avatarctl.data.prepare import Preparation

__all__ = ["plan_summary"]

_BYTES: Final = {"bfloat16": 2, "float32": 4}


def plan_summary(preparation: Preparation, emit: Emit) -> dict[str, Any]:
    """Counts, bytes and seconds; nothing is loaded, written or removed.

    Of videos that are not cut yet, or would be cut otherwise, the number of samples is the largest possible,
    for cuts are not known.
    seconds: by what samples took in the last run here; None before there was one.
    """
    raws, checked = preparation.plan()
    for each in checked:
        if each.problem is not None:
            emit(Notice(under_name(each.sample.name, each.problem), "warning"))
    windows = [_windows(raw, preparation, emit) for raw in raws]
    lacking = Counter(name for each in checked if each.todo for name in each.todo.names)
    of_sample = [each for each in preparation.artifacts if each.of == "sample"]
    cut = sum(windows)
    for artifact in of_sample:
        lacking[artifact.name] += cut
    todo = sum(each.todo is not None for each in checked) + cut
    each_took = _seconds_per_sample(preparation)
    unusable = sum(each.problem is not None for each in checked) + windows.count(0)
    size = _BYTES[preparation.cfg.data.artifact_dtype]
    shapes = {each.name: [side for side in each.shape if side] for each in of_sample}
    return {
        "model": preparation.row.name,
        "videos": len(preparation.raws or ()),
        "samples": len(checked) + cut,
        "to_do": todo,
        "up_to_date": sum(each.todo is None and each.problem is None for each in checked),
        "unusable": unusable,
        "artifacts": {name: count for name, count in lacking.items() if count},
        "bytes_at_least": sum(lacking[name] * size * math.prod(shape) for name, shape in shapes.items()),
        "seconds": None if each_took is None else round(todo * each_took, 1),
    }


def _windows(raw: RawVideo, preparation: Preparation, emit: Emit) -> int:
    cutting = preparation.cutting
    try:
        if raw.problem is not None:
            raise raw.problem
        with open_video(raw.video) as reader:
            count = max(0, (reader.frames - cutting.window) // cutting.stride + 1)
    except AvatarctlError as problem:
        emit(Notice(under_name(raw.name, problem), "warning"))
        return 0
    return count if cutting.max_windows is None else min(count, cutting.max_windows)


def _seconds_per_sample(preparation: Preparation) -> float | None:
    report = preparation.own / f"{preparation.command}.report.jsonl"
    if not report.is_file():
        return None
    lines = map(json.loads, report.read_text(encoding="utf-8").splitlines())
    took = [line["seconds"] for line in lines if line["state"] == "done" and line["kind"] == "sample"]
    return sum(took) / len(took) if took else None
