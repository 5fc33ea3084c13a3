"""Memory does not grow with the length of a video (the benchmark measures it; this catches a leak)."""

import numpy as np
import pytest
import torch

from avatarctl.live_bytes import LiveBytes
from avatarctl.media import audio_from_array, image_from_array
from avatarctl.pipelines.infer import generate, load
from avatarctl.pipelines.job import Job, check_job
from avatarctl.registry import configure, find_model

IMAGE = image_from_array(np.zeros((16, 16, 3), np.uint8), "black")
FAMILIES = {
    "cartoon-i2v": ("sampling.steps=1", "long_video.num_frames=33", "long_video.audio_window=5"),
    "stableavatar-tiny": ("sampling.steps=2", "long_video.num_frames=17", "long_video.overlap_frames=5"),
}
SECONDS = {"cartoon-i2v": (11, 16), "stableavatar-tiny": (2, 7)}  # a piece of audio has 11 s with its margins
# What is left after each block may differ by: one piece of features; nothing, until the last windows.
LEFT = {"cartoon-i2v": (slice(5, None), 125 * 192 * 4), "stableavatar-tiny": (slice(5, -5), 0)}


def peak_and_rest(model: str, seconds: float) -> tuple[int, list[int]]:
    """Peak live bytes of a run of `seconds`, and the live bytes after each block."""
    noise = np.random.default_rng(0).standard_normal(int(seconds * 16_000), np.float32)
    audio = audio_from_array(noise, 16_000, "noise")
    job, row = Job(IMAGE, audio, "", ""), find_model(model)
    cfg = configure(f"model.name={model}", "output.width=16", "output.height=16", *FAMILIES[model])
    plan = check_job(cfg, row, job, lambda event: None)
    modules = load(plan)
    rest = []
    with LiveBytes() as live, torch.no_grad():
        for block in generate(plan, modules=modules):
            del block
            rest.append(live.current)
    return live.peak, rest


@pytest.mark.parametrize("model", FAMILIES)
def test_live_bytes_are_flat(model: str) -> None:
    less, more = SECONDS[model]
    short, _ = peak_and_rest(model, less)
    long, rest = peak_and_rest(model, more)
    assert long <= short * 1.02, f"{long} bytes for {more} s, {short} for {less} s"
    # After each block nothing is left but the job's state and what is read next.
    blocks, slack = LEFT[model]
    assert max(rest[blocks]) - min(rest[blocks]) <= slack
