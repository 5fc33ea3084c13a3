"""Decoded frames as people see them: upright, of square pixels, opaque, RGB."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import Type as SideData
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from avatarctl.errors import UnusableVideo
from avatarctl.media.image import BACKGROUND

__all__ = ["Seen"]

_MIN_SIDE, _MAX_SIDE, _MAX_ASPECT = 8, 16_384, 16
_HD_HEIGHT = 720  # what states no colour matrix is BT.709 from here on and BT.601 below, as players have it
_HDR = {16: "PQ", 18: "HLG"}  # ITU-T H.273, table 3
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}  # ITU-T H.273, table 4
_FULL_RANGE = 2  # FFmpeg's AVCOL_RANGE_JPEG
# swscale's defaults round chroma carelessly; see `video.py`.
_CONVERSION = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.FULL_CHR_H_INT
)


class Seen:
    """How the frames of one track become uint8 RGB `[height, width, 3]`; judged by its first frame.

    first:         a decoded frame
    sample_aspect: width of a stored pixel by its height, None or 0 for square ones
    name:          the file, for messages
    width, height: of what is seen
    doubts:        what a person should read, without the file's name

    Sample aspect changes the width and keeps the height; then the display matrix turns and mirrors in
    steps of 90 degrees. Transparency is composited on the grey of images. Interlaced frames are not
    taken apart, HDR is not tone-mapped.

    Raises UnusableVideo for a size that no video of people has.
    """

    def __init__(self, first: VideoFrame, sample_aspect: Fraction | None, name: object) -> None:
        self._name = name
        self._stored = (first.width, first.height)
        _check_size(first.width, first.height, name)
        self._width = first.width if not sample_aspect else max(1, round(first.width * sample_aspect))
        self._turned, self._mirrored, self._flipped, askew = _display(first)
        self.width, self.height = self._width, first.height
        if self._turned:
            self.width, self.height = self.height, self.width
        _check_size(self.width, self.height, name)
        self._convert = VideoReformatter()
        self.doubts = tuple(_doubts(first, askew))

    def rgb(self, frame: VideoFrame) -> npt.NDArray[np.uint8]:
        """uint8 [height, width, 3]; raises UnusableVideo for a frame of another size than the first."""
        if (frame.width, frame.height) != self._stored:
            was, now = (f"{width}x{height}" for width, height in (self._stored, (frame.width, frame.height)))
            raise UnusableVideo(
                f"changes its resolution from {was} to {now} at {frame.time or 0:.2f} s",
                where=self._name,
                fix="cut it there, or convert it to one size",
            )
        transparent = any(component.is_alpha for component in frame.format.components)
        matrix = _MATRICES.get(frame.colorspace)
        if matrix is None:
            matrix = Colorspace.ITU709 if frame.height >= _HD_HEIGHT else Colorspace.ITU601
        full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
        converted: Any = self._convert.reformat(
            frame,
            width=self._width,
            height=frame.height,
            format="rgba" if transparent else "rgb24",
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range=ColorRange.JPEG if full or frame.format.is_rgb else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=_CONVERSION,
        ).to_ndarray()
        return self._upright(_opaque(converted) if transparent else converted)

    def _upright(self, rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if self._turned:
            rgb = rgb.swapaxes(0, 1)
        if self._mirrored:
            rgb = rgb[:, ::-1]
        return rgb[::-1] if self._flipped else rgb


def _opaque(rgba: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    alpha = rgba[..., 3:].astype(np.uint16)
    blended = rgba[..., :3] * alpha + BACKGROUND * (255 - alpha)  # at most 255 * 255
    return ((blended + 127) // 255).astype(np.uint8)


def _display(frame: VideoFrame) -> tuple[bool, bool, bool, bool]:
    """Whether the display matrix swaps the axes, mirrors columns, flips rows, and is not of these alone.

    ISO/IEC 14496-12, 8.5.2: [a b u; c d v; x y w], rows of 16.16 fixed-point numbers; a point (x, y) is
    shown at (a x + c y, b x + d y).
    """
    side_data: Any = frame.side_data  # its stubs know no keys of this type
    found = side_data.get(SideData.DISPLAYMATRIX)
    if found is None:
        return False, False, False, False
    a, b, _, c, d = struct.unpack_from("=5i", bytes(found))
    straight, crossed = abs(a) + abs(d), abs(b) + abs(c)
    askew = min(straight, crossed) > max(straight, crossed) / 100
    if crossed > straight:
        return True, c < 0, b < 0, askew
    return False, a < 0, d < 0, askew


def _check_size(width: int, height: int, name: object) -> None:
    short, long = sorted((width, height))
    if short < _MIN_SIDE or long > _MAX_SIDE or long > _MAX_ASPECT * short:
        raise UnusableVideo(
            f"a size of {width}x{height} pixels is not read (sides of {_MIN_SIDE} to {_MAX_SIDE}, at most "
            f"{_MAX_ASPECT}:1)",
            where=name,
        )


def _doubts(first: VideoFrame, askew: bool) -> list[str]:
    found = []
    if first.interlaced_frame:
        found.append(
            "is interlaced: both fields of a frame are shown at once, which makes combs where it moves"
        )
    if first.color_trc in _HDR:
        found.append(
            f"is HDR ({_HDR[first.color_trc]}): its colours are not tone-mapped and will look pale; "
            "convert it to SDR for a better result"
        )
    if askew:
        found.append("is turned by an odd angle: it is shown at the nearest multiple of 90 degrees")
    return found
