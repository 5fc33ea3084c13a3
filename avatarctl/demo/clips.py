"""Clips of the cartoon world: a face that speaks, with what its mouth truly does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from avatarctl.demo.faces import Face, draw_face, draw_motion, render
from avatarctl.demo.voices import Speech, speech

__all__ = ["HELD_OUT", "Clip", "clip"]

HELD_OUT: Final = 1_000_000
"""Seeds of faces and voices below are for training; from here on they are never trained on, so that what is
measured on them is not remembered. The weights that come with the program kept to it."""


@dataclass(frozen=True)
class Clip:
    """frames uint8 [F, 64, 64, 3] of `face`, and the speech that drives them."""

    frames: NDArray[np.uint8]
    speech: Speech
    face: Face


def clip(seed: int, frames: int) -> Clip:
    """The face and the voice of one seed."""
    face, said = draw_face(seed), speech(seed, frames)
    return Clip(render(face, draw_motion(seed, 0, frames), said.opening, said.spread), said, face)
