"""Accounts of runs that were counted before, in a folder: counting 14B takes many seconds, reading none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import avatarctl
from avatarctl.atomic import atomic_write_text
from avatarctl.config import keys_of, value_of
from avatarctl.errors import AvatarctlError
from avatarctl.events import Emit, Notice
from avatarctl.profiling.account import Account

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.registry import Row

__all__ = ["kept"]

_SIZES: Final = ("stages", "weights", "host_parts")
_NO_MATTER: Final = (
    "input.", "output.path", "model.weights", "model.lora", "runtime.seed", "runtime.log_level",
)  # fmt: skip
"""Beginnings of keys that change no shape; the prompts are the exception and stand below."""
_SHAPES: Final = ("input.prompt", "input.negative_prompt")


def kept(
    folder: Path,
    row: Row,
    cfg: RunConfig,
    count: Callable[[RunConfig], Account],
    emit: Emit,
    samples: int | None = None,
) -> Account:
    """The account of a configuration of `infer`: read, or counted and written. A file that cannot be used is
    counted again; a folder that cannot be written to is said. samples: of the recording, at 16 kHz."""
    path = folder / f"{_name(row, cfg, samples)}.json"
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
        stages, weights, waits = (_checked(numbers[name]) for name in _SIZES)
        parts = {stage: _checked(numbers["parts"][stage]) for stage in stages}
        trained, host, packing = (int(numbers[name]) for name in ("trained", "host", "packing"))
        return Account(stages, weights, parts, trained, host, packing, waits)
    except (OSError, ValueError, KeyError, TypeError):  # not counted yet, or not ours
        account = count(cfg)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps({
            "stages": dict(account.stages), "weights": dict(account.weights),
            "parts": {stage: dict(parts) for stage, parts in account.parts.items()},
            "host_parts": dict(account.host_parts), "trained": account.trained, "host": account.host,
            "packing": account.packing,
        }))  # fmt: skip
    except (OSError, AvatarctlError) as error:
        emit(Notice(f"what was counted is not kept: {error}", "warning"))
    return account


def _checked(sizes: Any) -> dict[str, int]:
    made = {str(name): int(size) for name, size in sizes.items()} if isinstance(sizes, dict) else None
    if made is None:
        raise ValueError("no sizes")
    return made


def _name(row: Row, cfg: RunConfig, samples: int | None) -> str:
    """Of everything that the account depends on: settings, sizes of the networks, our code, its libraries."""
    values = {
        dotted: str(value_of(cfg, dotted))
        for dotted in keys_of("infer")
        if dotted in _SHAPES or not dotted.startswith(_NO_MATTER)
    }
    sizes = {part: sorted(map(str, each.items())) for part, each in row.network.items()}
    libraries = [metadata.version(name) for name in ("torch", "diffusers", "transformers")]
    known = [row.family, values, sizes, samples, libraries, avatarctl.__version__, _code()]
    told = json.dumps(known, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:40]


def _code() -> list[str]:
    """Sizes and times of our modules: a line that is changed changes the answer."""
    root = Path(avatarctl.__file__).parent
    stats = [(path, path.stat()) for path in sorted(root.glob("*/*.py"))]
    return [f"{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]
