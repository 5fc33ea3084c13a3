"""What a run takes at most with every network on the device: arithmetic from shapes, without torch.

A bound, not a count: it is there to say in a moment that a run surely fits. Where it does not say so the run
is counted (`avatarctl.profiling`). The factors below are of the largest accounts in docs/memory.md, with a
margin; `tests/pipelines/test_at_most.py` holds the bound against them.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Final

from avatarctl.timeline import SAMPLE_RATE, pixel_frames

if TYPE_CHECKING:
    from avatarctl.pipelines.job import JobPlan

__all__ = ["at_most", "weights_of"]

_TEXT_ROWS: Final = 512
_IMAGE_ROWS: Final = 257
_FULL: Final = 4
"""Bytes of a float32."""

_OF_A_TOKEN: Final = (28, 4)
"""Numbers that a step keeps of a token: so many of the network's width, and of its feed-forward's."""
_ONE_BY_ONE: Final = 4096
"""Tokens from which no family takes the branches of a step as one batch unless it is told to; the largest
number at which one does is 512."""
_OF_A_PIXEL: Final = 24
"""Maps of the codec's first width that are alive at full resolution while four frames are coded."""
_OF_A_SAMPLE: Final = 4
"""Maps of the audio encoder's first layer, which has one vector for five samples."""


def weights_of(plan: JobPlan) -> int:
    """Bytes of all networks of the run, as far as something states them."""
    return sum(seat.weights for seat in plan.seating.seats)


def at_most(plan: JobPlan) -> int | None:
    """Bytes, weights included; None where nothing states the size of a network."""
    network = plan.row.network
    dit = network.get("dit", {})
    if plan.seating.unknown or "num_layers" not in dit or "vae" not in network or not plan.row.width:
        return None
    half = 2 if plan.cfg.runtime.dtype == "bfloat16" else _FULL
    frames = max(span.frames for span in itertools.islice(plan.video.spans(), 2))
    branches = len(plan.family.branches(plan.family.guidance(plan.cfg), 0))
    return weights_of(plan) + (
        _step(plan, frames, branches, half) + _pixels(plan, frames, half) + _audio(plan, dit) + _text(network)
    )


def _step(plan: JobPlan, frames: int, branches: int, half: int) -> int:
    """Tokens of a pass over the network, and what each block keeps of texts and image for all passes."""
    dit, width = plan.row.network["dit"], plan.row.width
    _, height, wide = plan.video.shape
    tokens = frames * (height // 2) * (wide // 2)
    of_width, of_ffn = _OF_A_TOKEN
    asked = plan.cfg.sampling.batch_branches
    together = branches if asked or (asked is None and tokens <= _ONE_BY_ONE) else 1
    numbers = together * tokens * (of_width * width + of_ffn * dit["ffn_dim"])
    kept = 2 * branches * dit["num_layers"] * (_TEXT_ROWS + _IMAGE_ROWS) * width
    latents = math.prod(plan.video.shape) * (plan.video.frames // 4 + frames)
    return half * (numbers + kept) + 3 * _FULL * latents


def _pixels(plan: JobPlan, frames: int, half: int) -> int:
    """Coding four frames, and all frames of a span as pixels, made and given."""
    vae = plan.row.network["vae"]
    _, height, wide = plan.video.shape
    pixels = 64 * height * wide
    return pixels * (4 * _OF_A_PIXEL * vae["base_dim"] * half + 2 * 3 * _FULL * pixel_frames(frames))


def _audio(plan: JobPlan, dit: Any) -> int:
    """The window that is encoded in one piece, and features of as much."""
    encoder = plan.row.network["audio"]
    window = round(plan.cfg.long_video.audio_window * SAMPLE_RATE)
    whole = plan.cfg.model.compat == "reference"
    samples = plan.samples if whole else min(plan.samples, 2 * window)
    features = dit.get("audio_input_dim", encoder["hidden_size"]) * samples // 320
    return _FULL * (_OF_A_SAMPLE * encoder["conv_dim"][0] * samples // 5 + 2 * features)


def _text(network: Any) -> int:
    text = network["text"]
    return _FULL * _TEXT_ROWS * (3 * text["num_heads"] * _TEXT_ROWS + 6 * text["d_ff"])
