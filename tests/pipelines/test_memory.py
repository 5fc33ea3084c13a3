"""Memory does not grow with the length of a video (the benchmark measures it; this catches a leak)."""

import numpy as np
import torch

from avatarctl.live_bytes import LiveBytes
from avatarctl.media import picture_from_array, sound_from_array
from avatarctl.pipelines.infer import generate, load
from avatarctl.pipelines.job import Job, check_job
from avatarctl.registry import configure, find_model

ROW = find_model("cartoon-i2v")
PICTURE = picture_from_array(np.zeros((16, 16, 3), np.uint8), "black")


def peak_and_rest(seconds: float) -> tuple[int, list[int]]:
    """Peak live bytes of a run of `seconds`, and the live bytes after each chunk."""
    noise = np.random.default_rng(0).standard_normal(int(seconds * 16_000), np.float32)
    sound = sound_from_array(noise, 16_000, "noise")
    job = Job(PICTURE, sound, "", "")
    cfg = configure(
        "output.width=16", "output.height=16", "sampling.steps=1", "long_video.num_frames=33",
        "long_video.audio_window=6",
    )  # fmt: skip
    plan = check_job(cfg, ROW, job, lambda event: None)
    modules = load(ROW, plan)
    rest = []
    with LiveBytes() as live, torch.no_grad():
        for block in generate(ROW, job, plan, modules=modules):
            del block
            rest.append(live.current)
    return live.peak, rest


def test_live_bytes_are_flat() -> None:
    short, _ = peak_and_rest(8)
    long, rest = peak_and_rest(24)
    assert long <= short * 1.02, f"{long} bytes for 24 s, {short} for 8 s"
    # After each chunk nothing is left but the job's state and at most one window of features.
    window = 150 * 192 * 4
    assert max(rest[5:]) - min(rest[5:]) <= window
