"""Generated faces back into their frames, with a soft edge, in float32 (spec/face-alignment.md 4)."""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from avatarctl.perception.align import crop_size, warp

__all__ = ["Paste", "blend_mouth", "paste_back", "soft_mask"]

Paste = Literal["face", "mouth-only"]

_FILL: Final = (127 + 1) / 2
"""Outside the crop, in [0, 1]: the published 127 is meant for bytes and used in [-1, 1], so that what lies
half outside is white. It counts where the crop's edge meets the frame's."""


def blend_mouth(generated: Tensor, aligned: Tensor, keep: Tensor) -> Tensor:
    """[n, 3, R, R] where the mask generates, the aligned source where it keeps; keep: [1 or n, 1, R, R], soft
    edges allowed."""
    return generated * (1 - keep) + aligned * keep


def paste_back(
    frames: Tensor,
    faces: Tensor,
    matrices: Tensor,
    *,
    paste: Paste = "face",
    keep: Tensor | None = None,
) -> Tensor:
    """uint8 [n, 3, H, W] with the faces in them -> uint8 [n, 3, H, W].

    faces: float [n, 3, R, R] in [0, 1], see `blend_mouth`. matrices: [n, 2, 3], frame to crop.
    paste: the whole crop, or only what `keep` ([1 or n, 1, R, R] in [0, 1]) does not keep: the upper face
    then does not go through two warps. Where the soft mask is 0 a frame keeps its bytes.
    Raises ValueError for "mouth-only" without `keep`.
    """
    with torch.autocast(frames.device.type, enabled=False):
        resolution = faces.shape[-1]
        size = crop_size(resolution)
        back = _inverse(matrices.to(frames.device))
        crop = F.interpolate(faces.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
        result = torch.empty_like(frames)
        for number in range(len(frames)):  # one at a time: masks and sums are of the frame's size
            one = slice(number, number + 1)
            height, width = frames.shape[-2:]
            face = warp(crop[one], back[one], (height, width), _FILL).clamp(0, 1) * 255
            if paste == "face":
                soft, inside = soft_mask(back[one], size, (height, width))
            else:
                if keep is None:
                    raise ValueError("mouth-only pastes what a mask does not keep, and there is no mask")
                wanted = 1 - keep[min(number, len(keep) - 1)][None].to(frames.device, torch.float32)
                wanted = F.interpolate(
                    wanted, size=size, mode="bilinear", align_corners=False, antialias=True
                )
                soft = warp(wanted, back[one], (height, width), 0.0).clamp(0, 1)
                inside = torch.ones_like(soft)
            frame = frames[one].float()
            mixed = soft * (inside * face) + (1 - soft) * frame
            result[one] = torch.where(soft > 0, mixed.clamp(0, 255).to(torch.uint8), frames[one])
        return result


def soft_mask(back: Tensor, size: tuple[int, int], frame: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How much of a pasted crop counts in its frame, and where it lies at all.

    back: [1, 2, 3], crop to frame; size: (height, width) of the crop; frame: of the frame.
    Returns two float32 [1, 1, H, W] in [0, 1]: soft edges inside the crop, and the crop without its last
    pixel.
    """
    whole = torch.ones(1, 1, *size, device=back.device)
    inside = _erode(warp(whole, back, frame, 0.0), 2)
    edge = int(math.sqrt(float(inside.sum()))) // 20
    if edge < 1:  # a face of a few pixels has no room for a soft edge
        return inside, inside
    return _blurred(_erode(inside, 2 * edge), edge), inside


def _erode(mask: Tensor, side: int) -> Tensor:
    """The least of a square of `side` pixels that reaches one pixel further up and left than down and right
    where `side` is even; outside the frame nothing is missing."""
    before, after = side // 2, (side - 1) // 2
    padded = F.pad(mask, (before, after, before, after), value=1.0)
    # A square is a row of columns: one after the other costs less than the whole square.
    rows = -F.max_pool2d(-padded, (side, 1), stride=1)
    return -F.max_pool2d(-rows, (1, side), stride=1)


def _blurred(mask: Tensor, edge: int) -> Tensor:
    """A Gaussian of 2 edge + 1 pixels, with the deviation that OpenCV gives to this size; the frame's edge is
    a mirror."""
    sigma = 0.3 * (edge - 1) + 0.8
    offsets = torch.arange(-edge, edge + 1, dtype=torch.float32, device=mask.device)
    taps = torch.exp(-(offsets**2) / (2 * sigma**2))
    taps = taps / taps.sum()
    for axis, shape in ((2, (1, 1, -1, 1)), (3, (1, 1, 1, -1))):
        # Reflection has to be shorter than the frame is.
        mask = _mirrored(mask, axis, edge)
        mask = F.conv2d(mask, taps.reshape(shape))
    return mask


def _mirrored(mask: Tensor, axis: int, edge: int) -> Tensor:
    """`edge` more pixels on both ends of an axis, mirrored about the outermost pixel, however short it is."""
    length = mask.shape[axis]
    period = max(2 * (length - 1), 1)
    places = torch.arange(-edge, length + edge, device=mask.device) % period
    return mask.index_select(axis, torch.where(places < length, places, period - places).clamp(0, length - 1))


def _inverse(matrices: Tensor) -> Tensor:
    """[n, 2, 3] -> [n, 2, 3], the other way round."""
    exact = matrices.double()
    turn = torch.linalg.inv(exact[:, :, :2])
    return torch.cat([turn, -turn @ exact[:, :, 2:]], 2)
