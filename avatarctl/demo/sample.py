"""The built-in sample: a face, a clip of it and a sentence of the cartoon world, none of which the built-in
models were trained on.

Nothing is stored and nothing is downloaded, and the result is nobody's likeness and nobody's voice.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from avatarctl.demo.clips import HELD_OUT, clip
from avatarctl.demo.faces import SIZE, draw_face, draw_motion, render
from avatarctl.demo.voices import Speech, speech
from avatarctl.media import (
    Audio,
    StillImage,
    Video,
    audio_from_array,
    image_from_array,
    video_from_array,
)
from avatarctl.timeline import SAMPLE_RATE, frames_of_samples

__all__ = ["SECONDS", "face_pixels", "sample_audio", "sample_image", "sample_video", "sentence"]

SECONDS: Final = 4.0
"""Length of the sentence."""

_FACE: Final = HELD_OUT + 38
_VOICE: Final = HELD_OUT + 5
_CLIP: Final = HELD_OUT + 3


def sample_image(seed: int | None = None) -> StillImage:
    """The face at rest, as an image of the size that the built-in model was trained for; of another seed
    another face."""
    if seed is None:
        return image_from_array(face_pixels(), "built-in face")
    return image_from_array(face_pixels(seed=seed), f"face {seed}")


def sample_audio(seconds: float = SECONDS) -> Audio:
    """The sentence as mono audio at 16 kHz, cut to `seconds`."""
    samples = round(seconds * SAMPLE_RATE)
    said = sentence(frames_of_samples(samples))
    return audio_from_array(said.audio[:samples], SAMPLE_RATE, "built-in voice")


def sample_video(seconds: float = SECONDS, seed: int | None = None) -> Video:
    """A clip in which another face says something else: its mouth moves, and not to the sentence."""
    chosen = _CLIP if seed is None else seed
    frames = clip(chosen, frames_of_samples(round(seconds * SAMPLE_RATE))).frames
    return video_from_array(frames, "built-in clip" if seed is None else f"clip {seed}")


def sentence(frames: int) -> Speech:
    """What the built-in voice says in so many frames, and how a mouth moves that says it."""
    return speech(_VOICE, frames, closing=True)


def face_pixels(size: int = SIZE, seed: int = _FACE) -> NDArray[np.uint8]:
    """The face with its mouth closed, uint8 [size, size, 3] RGB."""
    closed = np.zeros(1)
    return render(draw_face(seed), draw_motion(seed, 0, 1), closed, closed, size)[0]
