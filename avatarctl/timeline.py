"""Time in integers: audio samples at 16 kHz, pixel frames at 25 fps, latent frames of the Wan VAE.

One pixel frame is exactly 640 samples. The VAE codes the first pixel frame alone and then groups of
four, so T latent frames are 4T - 3 pixel frames (Wan, arXiv 2503.20314).
"""

from __future__ import annotations

import math

__all__ = [
    "FPS",
    "SAMPLES_PER_FRAME",
    "SAMPLE_RATE",
    "frames_of_samples",
    "is_clip_length",
    "latent_frames",
    "pixel_frames",
    "reference_frames_of_samples",
]

SAMPLE_RATE = 16_000
FPS = 25
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS


def frames_of_samples(samples: int) -> int:
    """Pixel frames that `samples` of 16 kHz audio fill: ceil(samples / 640), exactly."""
    return -(-samples // SAMPLES_PER_FRAME)


def reference_frames_of_samples(samples: int) -> int:
    """A published script's frame count, float rounding included.

    ceil(samples / 16000 * 25) evaluated in float64, as written there, gives k + 1 for some exact
    multiples k * 640 (k = 7, 14, 28, 55, ...). Used under `model.compat reference` only.
    """
    return math.ceil(samples / SAMPLE_RATE * FPS)


def latent_frames(pixel: int) -> int:
    """Latent frames that hold `pixel` pixel frames; exact for 4n + 1."""
    return (pixel + 3) // 4


def pixel_frames(latent: int) -> int:
    """Pixel frames of a clip of `latent` latent frames: 4 T - 3."""
    return 4 * latent - 3


def is_clip_length(pixel: int) -> bool:
    """Whether the VAE can code exactly `pixel` frames (1, 5, 9, ...)."""
    return pixel >= 1 and pixel % 4 == 1
