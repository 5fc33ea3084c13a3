"""The mouth mask, and the one function that erases what a video-to-video model has to make.

A mask is an image: white is kept, black is made anew. It is held at its own resolution, and a keep map of
any size is made from it in one way (spec/omniavatar.md g.3), so pixels and latents agree with what published
models were trained on. Erased pixels are 0.0 in [-1, 1], mid grey (spec/omniavatar.md f.7, j 5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "HOLE",
    "MASK_SIZE",
    "MaskRule",
    "keep_map",
    "mask_name",
    "mask_tensor",
    "masked_video",
    "mouth_mask",
    "reference_range",
]

HOLE: Final = 0.0
"""Value of an erased pixel in [-1, 1]."""

MaskRule = Literal["all", "first_keep", "legacy_two_step"]

MASK_SIZE: Final = 256

# Geometry of the published mouth mask, LatentSync's (its size is in spec/omniavatar.md g.3): in these rows
# both cheeks are erased and the nose between them is kept; below, all between edges that meet at the chin.
_CHEEK_ROWS: Final = (95, 127)
_CHEEK_COLUMNS: Final = ((9, 77), (178, 246))
# (row, column) of the edges; straight lines lie between them.
_LEFT_EDGE: Final = (
    (128, 9), (129, 9), (170, 12), (188, 22), (196, 29), (208, 40), (209, 42), (214, 48), (222, 60), (233,
    82), (238, 95), (241, 108), (242, 131),
)  # fmt: skip
_RIGHT_EDGE: Final = (
    (128, 247), (169, 244), (178, 239), (193, 229), (195, 228), (214, 210), (224, 196), (231, 183), (234,
    175), (239, 164), (242, 152),
)  # fmt: skip


def mouth_mask() -> np.ndarray:
    """Our drawing of the published mouth mask: uint8 [256, 256], 255 is kept, 0 is made anew."""
    mask = np.full((MASK_SIZE, MASK_SIZE), 255, np.uint8)
    for left, right in _CHEEK_COLUMNS:
        mask[_CHEEK_ROWS[0] : _CHEEK_ROWS[1] + 1, left : right + 1] = 0
    rows = np.arange(_LEFT_EDGE[0][0], _LEFT_EDGE[-1][0] + 1)
    for row, left, right in zip(rows, _columns(_LEFT_EDGE, rows), _columns(_RIGHT_EDGE, rows), strict=True):
        mask[row, left : right + 1] = 0
    return mask


def _columns(edge: Sequence[tuple[int, int]], rows: np.ndarray) -> np.ndarray:
    """The column of an edge in each row, to the nearest."""
    corners = np.array(edge)
    return np.rint(np.interp(rows, corners[:, 0], corners[:, 1])).astype(int)


def mask_name(mask: np.ndarray) -> str:
    """What a weights' header calls a mask: "mouth" for our drawing, else the hash of its size and pixels."""
    grey = mask if mask.ndim == 2 else mask[..., 0]
    if np.array_equal(grey, mouth_mask()):
        return "mouth"
    digest = hashlib.sha256(f"{grey.shape[0]}x{grey.shape[1]} ".encode())
    digest.update(np.ascontiguousarray(grey).tobytes())
    return digest.hexdigest()


def mask_tensor(mask: np.ndarray) -> Tensor:
    """uint8 [h, w] or [h, w, 3], of which the first channel counts -> float32 [1, 1, h, w] in [0, 1]."""
    import torch

    grey = mask if mask.ndim == 2 else mask[..., 0]
    return torch.from_numpy(np.ascontiguousarray(grey)).to(torch.float32)[None, None] / 255


def keep_map(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, 1, h, w] in [0, 1] -> [B, 1, H, W] of exactly 0 and 1, where 1 is kept.

    Bilinear without antialias, then above one half. A map that has the size already is not changed.
    """
    from torch.nn import functional as F

    resized = F.interpolate(mask, size=size, mode="bilinear", align_corners=False)
    return (resized > 0.5).to(mask.dtype)


def masked_video(video: Tensor, keep: Tensor, *, first_whole: bool = False) -> Tensor:
    """[B, 3, n, H, W] in [-1, 1] with the hole at 0.0, in every frame, or in every frame but the first.

    keep: [B or 1, 1, H, W] of `keep_map`. Pixels that are kept stay as they are, bit for bit.
    """
    import torch

    erased = torch.where(keep.unsqueeze(2) > 0, video, torch.full_like(video, HOLE))
    if first_whole:
        erased[:, :, 0] = video[:, :, 0]
    return erased


def reference_range(frames: int, first: int, length: int) -> tuple[int, int]:
    """Which frames of a source of `frames` are the reference sequence of the `length` frames from `first` on.

    The `length` frames behind them, else the last ones of the source, 4n + 1 of them (spec/omniavatar.md
    g.3).
    """
    start = first + length
    if start + length > frames:
        start = max(0, frames - length)
    available = min(length, frames - start)
    return start, start + (available - 1) // 4 * 4 + 1
