"""Transformers and judge of another seed, on the encoders of the package: do they reach the same?

    python tests/bench/another_seed.py FOLDER [SEED]

FOLDER is a build (`avatarctl demo build`) in which both encoders are made already; the same command goes on
in it. Then both builds are scored on the same held-out clips. A score of the other seed may be worse than the
shipped one by 0.02, beside its standard error. About an hour and a half on two idle cores.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import shutil
import sys
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from reporting import print_table
from safetensors.torch import save_file

from avatarctl.cli.signals import stop_on_signals
from avatarctl.demo.benchmark import benchmark
from avatarctl.demo.making.audio_learner import feature_statistics
from avatarctl.demo.making.build import CARD, Build, built_row
from avatarctl.demo.making.recipe import FULL
from avatarctl.events import silent
from avatarctl.loading.modules import load_parts
from avatarctl.loading.sources import find_sources
from avatarctl.registry import configure, find_model

CLIPS = range(1_000_000, 1_000_064)
WORSE = 0.02
CPU = torch.device("cpu")
ROWS = {"i2v": "cartoon-i2v", "v2v": "cartoon-v2v", "sync": "cartoon-v2v"}
LOOKED_AT = {
    "i2v": {"r_opening": 1, "r_shuffled": -1, "slope": 1, "colour_change": -1},
    "v2v": {"r_opening": 1, "r_shuffled": -1, "slope": 1, "outside_box": -1},
    "sync": {"accuracy": 1},
}
"""By part: what is compared, and whether more of it is better."""


def prepared(folder: Path, seed: int) -> Build:
    """A build whose encoders are those of the package."""
    build = Build(folder, seed, FULL, silent)
    home, statistics = folder / "cartoon", folder / "audio" / "statistics.safetensors"
    home.mkdir(parents=True, exist_ok=True)
    with as_file(files("avatarctl") / "assets" / "cartoon") as shipped:
        for name in ("vae.safetensors", "config.json", "audio.safetensors", "text.safetensors"):
            if not (home / name).is_file():
                shutil.copy(shipped / name, home / name)
    if not statistics.is_file():
        row, cfg = find_model("cartoon-i2v"), configure("model.name=cartoon-i2v", "runtime.device=cpu")
        loaded: Any = load_parts(row, find_sources(row, cfg.model), None, cfg, ("audio",), CPU, silent)
        mean, deviation = feature_statistics(loaded["audio"], FULL.statistics)
        statistics.parent.mkdir(exist_ok=True)
        save_file({"mean": mean, "deviation": deviation}, statistics)
    for part in ("vae", "audio"):
        card = folder / "made" / part / CARD
        if not card.is_file():
            card.parent.mkdir(parents=True, exist_ok=True)
            told = {"made_by": build._made_by(part), "seed": seed, "part": {"from": "the package"}}
            card.write_text(json.dumps(told))
    return build


def compared(part: Any, folder: Path) -> list[tuple[str, ...]]:
    shipped = benchmark(part, find_model(ROWS[part]), CLIPS)
    other = benchmark(part, built_row(ROWS[part], folder), CLIPS)
    return [_row(part, name, better, shipped[name], other[name]) for name, better in LOOKED_AT[part].items()]


def _row(
    part: str, name: str, better: int, shipped: Mapping[str, float], other: Mapping[str, float]
) -> tuple[str, ...]:
    worse = better * (shipped["mean"] - other["mean"])
    verdict = "met" if worse <= WORSE + other["standard_error"] else "missed"
    told = [f"{each['mean']:.3f} ± {each['standard_error']:.3f}" for each in (shipped, other)]
    return (f"{part}: {name}", *told, f"{max(worse, 0):.3f}", verdict)


def main() -> int:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2
    build = prepared(folder, seed)
    with stop_on_signals() as should_stop:
        build.run(should_stop)
    rows = [row for part in LOOKED_AT for row in compared(part, folder)]
    print_table(
        f"another_seed: seed {seed} beside the package, {len(CLIPS)} held-out clips",
        ("score", "package", f"seed {seed}", "worse by", f"≤ {WORSE}"),
        rows,
    )
    return any(row[-1] == "missed" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
