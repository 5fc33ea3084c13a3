"""Colours as an embedded ICC profile means them, in sRGB.

The same numbers are other colours in Adobe RGB, Display P3 (every newer phone) or a printer's CMYK; networks
have learned from sRGB.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

__all__ = ["ToSRGB", "embedded_profile"]

# The colour space that a profile names (ICC.1:2022, 7.2.6) to the mode of the pixels that it describes.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_GREYS = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B")
_SAME = 1  # level of 255 by which a profile may differ from sRGB and is left out: rounding, not colour


class ToSRGB:
    """Turns images from the colours of one profile, in pixels of `mode`, into sRGB.

    Raises ImageCms.PyCMSError where the profile is unfit.
    """

    def __init__(self, profile: ImageCms.ImageCmsProfile | ImageCms.core.CmsProfile, mode: str) -> None:
        self.mode = mode
        self._transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image in mode "RGB"; transparency is left out."""
        colours = image if image.mode == self.mode else image.convert(self.mode)
        converted = ImageCms.applyTransform(colours, self._transform)
        if converted is None:
            raise RuntimeError("a transform that was not asked to work in place returned nothing")
        return converted

    def changes_anything(self) -> bool:
        """Whether any colour of a grid comes out as another, beyond rounding."""
        if self.mode == "CMYK":
            return True
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        if self.mode == "L":
            grid = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)
        probe = Image.fromarray(grid)
        return bool(np.abs(np.asarray(self(probe)).astype(int) - grid).max() > _SAME)


def embedded_profile(image: Image.Image) -> tuple[ToSRGB | None, list[str]]:
    """What turns the colours of a loaded image into sRGB, and doubts.

    None where there is nothing to do: no profile, sRGB itself, or a profile that cannot be used. The last is
    a doubt: the image is read as if it had none, as by programs that know no profiles. A grey or palette
    image may carry an RGB profile, which then describes what its values stand for.
    """
    if image.mode == "LAB":  # says itself what its numbers mean, and Pillow converts it in no other way
        return ToSRGB(ImageCms.createProfile("LAB"), "LAB"), []
    if "icc_profile" not in image.info:
        return None, []
    try:
        # None, or not bytes, where the decoder could not put the profile together.
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"] or b""))
        space = profile.profile.xcolor_space.strip()
        if not _describes(space, image.mode):
            return None, [f"has a colour profile for {space} and is {image.mode}; the profile is ignored"]
        to_srgb = ToSRGB(profile, _MODES[space])
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError, ImportError):
        return None, ["has a colour profile that cannot be read; it is ignored"]
    return (to_srgb if to_srgb.changes_anything() else None), []


def _describes(space: str, mode: str) -> bool:
    if space == "CMYK" or mode == "CMYK":
        return space == mode
    return space == "RGB" or (space == "GRAY" and mode in _GREYS)
