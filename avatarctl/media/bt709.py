"""RGB frames -> what H.264 holds, in the colour space that every video of ours has: BT.709, limited range."""

from __future__ import annotations

from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

__all__ = ["state_colours", "to_yuv"]

# ITU-T H.273 code points; 1 is BT.709 in all three tables, and 1 is limited range in FFmpeg's.
_BT709 = 1
_LIMITED_RANGE = 1
# swscale's defaults round chroma carelessly; these flags keep pure colours within two levels.
_CONVERSION = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP


def to_yuv(converter: VideoReformatter, rgb: npt.NDArray[np.uint8], pix_fmt: str | None) -> av.VideoFrame:
    """uint8 RGB [H, W, 3] -> a frame of `pix_fmt`, without a time. One converter keeps its tables."""
    return converter.reformat(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"),
        format=pix_fmt,
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=_CONVERSION,
    )


def state_colours(context: Any) -> None:
    """Writes into the codec context of a stream what its frames are."""
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    context.color_range = _LIMITED_RANGE
