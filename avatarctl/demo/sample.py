"""The built-in sample: a face and a sentence of the cartoon world, neither of which the built-in model was
trained on.

Nothing is stored and nothing is downloaded, and the result is nobody's likeness and nobody's voice.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from avatarctl.demo.clips import HELD_OUT
from avatarctl.demo.faces import SIZE, draw_face, draw_motion, render
from avatarctl.demo.voices import Speech, speech
from avatarctl.media import Audio, StillImage, audio_from_array, image_from_array
from avatarctl.timeline import SAMPLE_RATE, frames_of_samples

__all__ = ["SECONDS", "face_pixels", "sample_audio", "sample_image", "sentence"]

SECONDS: Final = 4.0
"""Length of the sentence."""

_FACE: Final = HELD_OUT + 38
_VOICE: Final = HELD_OUT + 5


def sample_image() -> StillImage:
    """The face at rest, as an image of the size that the built-in model was trained for."""
    return image_from_array(face_pixels(), "built-in face")


def sample_audio(seconds: float = SECONDS) -> Audio:
    """The sentence as mono audio at 16 kHz, cut to `seconds`."""
    samples = round(seconds * SAMPLE_RATE)
    said = sentence(frames_of_samples(samples))
    return audio_from_array(said.audio[:samples], SAMPLE_RATE, "built-in voice")


def sentence(frames: int) -> Speech:
    """What the built-in voice says in so many frames, and how a mouth moves that says it."""
    return speech(_VOICE, frames, closing=True)


def face_pixels(size: int = SIZE) -> NDArray[np.uint8]:
    """The face with its mouth closed, uint8 [size, size, 3] RGB."""
    closed = np.zeros(1)
    return render(draw_face(_FACE), draw_motion(_FACE, 0, 1), closed, closed, size)[0]
