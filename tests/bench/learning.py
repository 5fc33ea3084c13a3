"""What a fresh transformer learns in the cartoon world, and what is left of it without the audio.

    python tests/bench/learning.py

Three transformers of four blocks, 200 drawn clips, one thread: with their own audio, with that of another
clip of the same step (the negative control), and with none. Scored on 32 held-out faces and voices. The first
has to follow voices; the others know nothing that they could follow. Some minutes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
import time
from pathlib import Path

import torch
from reporting import print_table

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.demo.learning import Audio, learnt, scored, short

TOLD: dict[Audio, str] = {"own": "its own", "exchanged": "another clip's", "none": "none"}
CLIPS = 32
MARGIN, CONTROL = 0.55, 0.1


def main() -> int:
    torch.set_num_threads(1)
    for module, attributes in short().items():
        for name, value in attributes.items():
            setattr(module, name, value)
    rows, missed = [], 0
    for audio, told in TOLD.items():
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            row = learnt(Path(folder), audio)
            took = time.process_time() - started
            own, other = scored(row, CLIPS)
        good = own - other >= MARGIN if audio == "own" else own - other <= CONTROL
        missed += not good
        limit = f"≥ {MARGIN}" if audio == "own" else f"≤ {CONTROL}"
        verdict_told = "met" if good else "missed"
        rows.append(
            (told, f"{took:.0f}", f"{own:.3f}", f"{other:.3f}", f"{own - other:.3f}", limit, verdict_told)
        )
    print_table(
        f"learning: r of mouths on {CLIPS} held-out clips",
        ("audio in training", "CPU s", "r", "r, another clip's audio", "margin", "limit", ""),
        rows,
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
