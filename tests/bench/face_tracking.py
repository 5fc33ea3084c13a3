"""How many frames of 720p a second can faces be followed in, on one thread?

    python tests/bench/face_tracking.py

A face of 20 % of the long side, made of the face in tests/golden, moves over a soft background; frames are
made before the clock starts, decoding is not counted. Frames a second are of CPU seconds, so that a busy
machine changes them less; limit 40. Beside it: what one search, one face's mesh and their parts cost.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from reporting import print_table, verdict

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from avatarctl.loading.faces import face_networks
from avatarctl.perception.crops import crop_region
from avatarctl.perception.detect import detect
from avatarctl.perception.mesh import find_faces, mesh, region_of_landmarks
from avatarctl.perception.track import track_faces
from tests.perception.conftest import background, portrait

FRAMES = 100
LIMIT = 40.0


def milliseconds(run: Callable[[], object], times: int = 15) -> str:
    spent = []
    for _ in range(times):
        started = time.process_time()
        run()
        spent.append(time.process_time() - started)
    return f"{statistics.median(spent) * 1000:.1f} (least {min(spent) * 1000:.1f})"


def main() -> None:
    torch.set_num_threads(1)
    networks, scene, held = face_networks(torch.device("cpu")), background(), portrait("crop")
    places = [(500 + 3 * i / 2, 350 + 20 * math.sin(i / 9)) for i in range(FRAMES)]
    frames = np.stack([np.asarray(held.put(scene, *place, 256)) for place in places])
    list(track_faces(networks, [frames[:5]]))
    rates = []
    for _ in range(5):
        started = time.process_time()
        found = list(track_faces(networks, [frames]))
        rates.append(FRAMES / (time.process_time() - started))
        assert all(each.faces for each in found)
    frame, rate = frames[0], statistics.median(rates)
    region = region_of_landmarks(find_faces(networks, frame)[0].landmarks)
    print_table(
        f"face_tracking: {FRAMES} frames of 1280x720, one face of 256 pixels, one thread",
        ["what", "measured", "limit", ""],
        [
            ("tracked frames a CPU second", f"{rate:.0f} ({min(rates):.0f} to {max(rates):.0f})", "40",
             verdict(LIMIT, rate)),
            ("one search of the whole frame: ms", milliseconds(lambda: find_faces(networks, frame)), "", ""),
            ("with tiles, near: ms", milliseconds(lambda: find_faces(networks, frame, "near")), "", ""),
            ("with tiles, far: ms", milliseconds(lambda: find_faces(networks, frame, "far"), 5), "", ""),
            ("detector alone: ms", milliseconds(lambda: detect(networks, frame)), "", ""),
            ("mesh of a face, with crop: ms", milliseconds(lambda: mesh(networks, frame, [region])), "", ""),
            ("its crop: ms", milliseconds(lambda: crop_region(frame, region)), "", ""),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
