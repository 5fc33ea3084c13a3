"""How long the learners of `demo build` take on an idle machine: a few steps of each, from all its schedule.

    python tests/bench/build_time.py

Minutes of all steps follow from them. Targets on two idle cores: VAE 75, judge 15. The transformers are
trained by the trainer of `train`, which says what a step takes. Two minutes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
import time

from reporting import print_table, verdict

from avatarctl.demo.making.audio_learner import AudioLearner
from avatarctl.demo.making.judge_learner import JudgeLearner
from avatarctl.demo.making.learning import Learner
from avatarctl.demo.making.recipe import FULL
from avatarctl.demo.making.vae_learner import VaeLearner
from avatarctl.registry import ROWS

TIMED = 30
TARGETS = {"VAE": 75.0, "judge": 15.0}


def seconds(learner: Learner) -> float:
    """Of a step, mean of `TIMED` that are spread over all; the first of all is not timed."""
    learner.step(0)
    started = time.perf_counter()
    for number in range(TIMED):
        learner.step(number * learner.steps // TIMED)
    return (time.perf_counter() - started) / TIMED


def main() -> int:
    sizes = ROWS["cartoon-v2v"].network
    learners: list[Learner] = [
        VaeLearner(sizes["vae"], 1, FULL.vae_steps, FULL.score_every, FULL.watched),
        AudioLearner(sizes["audio"], 1, FULL.audio_steps, FULL.score_every),
        JudgeLearner(sizes["syncnet"], 1, FULL.judge_steps, FULL.score_every),
    ]
    rows = []
    for learner in learners:
        step = seconds(learner)
        minutes, target = step * learner.steps / 60, TARGETS.get(learner.title)
        told = ("", "") if target is None else (f"≤ {target:.0f}", verdict(minutes, target))
        rows.append((learner.title, learner.steps, f"{step:.2f}", f"{minutes:.0f}", *told))
    print_table(
        f"build_time: from {TIMED} steps of each",
        ("part", "steps at most", "s a step", "minutes of all", "target", ""),
        rows,
        "The judge ends at 97 %, which it had behind 500 steps.",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
