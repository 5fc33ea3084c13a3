"""Output size, chunk length and the fit of an image into a frame, as published scripts choose them.

Each family names the specification that its numbers come from. Sizes are (height, width) unless a name says
otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "SIZE_BUCKETS",
    "choose_bucket",
    "chunk_frames",
    "cover_size",
    "distortion",
    "fit_image",
    "nearest_shape",
]

# Published size buckets by the largest side allowed, (height, width).
SIZE_BUCKETS: dict[int, tuple[tuple[int, int], ...]] = {
    720: ((400, 720), (720, 720), (720, 400)),
    1280: ((720, 720), (528, 960), (960, 528), (720, 1280), (1280, 720)),
}

# A latent frame holds 4 pixel frames and a token 16 x 16 pixels.
_PIXELS_PER_TOKEN = 16 * 16 * 4


def choose_bucket(height: int, width: int, max_size: int) -> tuple[int, int]:
    """The bucket whose height/width ratio is nearest to the image's.

    Of equally near buckets the first wins, unless a later one's longer side differs from the image's
    longer side by exactly as much (the published tie rule; it keeps the later one).
    """
    ratio = height / width
    best = SIZE_BUCKETS[max_size][0]
    for bucket in SIZE_BUCKETS[max_size][1:]:
        distance, best_distance = abs(bucket[0] / bucket[1] - ratio), abs(best[0] / best[1] - ratio)
        as_large = abs(max(bucket) - max(height, width)) == abs(max(best) - max(height, width))
        if distance < best_distance or (distance == best_distance and as_large):
            best = bucket
    return best


def distortion(image: tuple[int, int], frame: tuple[int, int]) -> float:
    """By how much an image that is stretched to a frame is scaled more in one direction than in the other:
    1 where the shapes agree, else above 1."""
    ratio = (frame[0] / image[0]) / (frame[1] / image[1])
    return max(ratio, 1 / ratio)


def nearest_shape(image: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose shape is nearest to the image's; the first of equally near ones."""
    return min(sizes, key=lambda size: distortion(image, size))


def cover_size(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """The image's size after scaling it, aspect kept, until it covers the target.

    Truncation to whole pixels may leave one pixel short, as published.
    """
    scale = max(target[0] / height, target[1] / width)
    return int(height * scale), int(width * scale)


def fit_image(image: Tensor, target: tuple[int, int]) -> Tensor:
    """[B, 3, h, w] float -> [B, 3, H, W]: bilinear with antialias to cover, then a centre crop.

    The odd pixel of a crop goes at the top and left, the odd pixel of a pad at the bottom and right, as in
    the reference: top = floor(difference / 2).
    """
    from torch.nn import functional as F  # here: the rest is arithmetic, and plans are made with it

    scaled = F.interpolate(
        image,
        size=cover_size(image.shape[-2], image.shape[-1], target),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    missing_h, missing_w = target[0] - scaled.shape[-2], target[1] - scaled.shape[-1]
    top, left = math.floor(missing_h / 2), math.floor(missing_w / 2)
    return F.pad(scaled, (left, missing_w - left, top, missing_h - top))


def chunk_frames(max_tokens: int, height: int, width: int) -> int:
    """Pixel frames of a chunk under a token budget, always 4n + 1 (spec/omniavatar.md f.3 point 4).

    The divisions run left to right in float64 and are truncated once, as published.
    """
    frames = int(max_tokens * _PIXELS_PER_TOKEN / height / width)
    return frames // 4 * 4 + 1 if frames % 4 else frames - 3
