"""Still images: one RGB array out of whatever people call an image."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, features

from avatarctl.errors import UnusableImage
from avatarctl.media.files import check_regular_file, file_sha256
from avatarctl.media.image_colour import ToSRGB, embedded_profile
from avatarctl.media.image_kinds import foreign_kind, way_out

__all__ = ["BACKGROUND", "StillImage", "image_from_array", "load_image"]

BACKGROUND = 128
"""The grey level (R = G = B) that shows through transparent pixels: neutral for the models."""

# Older releases of Pillow do not know the word, and some builds have no AVIF.
_AVIF = ("AVIF",) if "avif" in features.modules and features.check_module("avif") else ()
_FORMATS = ("PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF", *_AVIF)
_MAX_PIXELS = 100_000_000
_MIN_SIDE = 8
_MAX_ASPECT = 16

# EXIF orientation (tag 0x0112) to what makes [H, W, 3] upright; 1 and undefined values do nothing.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda rgb: rgb[:, ::-1],
    3: lambda rgb: rgb[::-1, ::-1],
    4: lambda rgb: rgb[::-1],
    5: lambda rgb: rgb.swapaxes(0, 1),
    6: lambda rgb: np.rot90(rgb, -1),
    7: lambda rgb: rgb[::-1, ::-1].swapaxes(0, 1),
    8: lambda rgb: np.rot90(rgb, 1),
}
_BAND_PIXELS = 1 << 22  # converted at a time, so that large images need little beside themselves


@dataclass(frozen=True, eq=False)
class StillImage:
    """An upright image without transparency.

    pixels:   uint8 [H, W, 3], RGB, C-contiguous
    name:     for messages
    sha256:   hexadecimal hash of the file's bytes, or of the array
    warnings: doubts that a person should read, without the file's name
    """

    pixels: np.ndarray
    name: str
    sha256: str
    warnings: tuple[str, ...] = ()


def load_image(path: str | Path) -> StillImage:
    """The image of a PNG, JPEG, WebP, GIF, BMP or TIFF file, and of AVIF where Pillow reads it, recognised
    by content.

    EXIF orientation is applied, colours are converted from an embedded ICC profile to sRGB, transparency is
    composited on grey 128, 16-bit grey is divided by 257 and rounded, CMYK, grey, palette and bilevel become
    RGB; of several frames the first is used.

    Raises PathNotFound when nothing is there; UnusableImage for other formats, damaged or truncated
    files, more than 100 million pixels, sides below 8 pixels and aspect ratios beyond 16:1.
    """
    checked = check_regular_file(path, UnusableImage)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pixels, doubts = _read(checked)
    told = tuple(dict.fromkeys(f"image decoder: {note.message}" for note in caught if _worth_telling(note)))
    return StillImage(pixels, str(path), file_sha256(checked), (*doubts, *told))


def image_from_array(pixels: np.ndarray, name: str) -> StillImage:
    """A `StillImage` of uint8 [H, W, 3] RGB pixels in memory.

    Raises TypeError or ValueError for another type or shape, UnusableImage for impossible sizes.
    """
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels are {pixels.dtype}, uint8 is expected")
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels have shape {pixels.shape}, [H, W, 3] is expected")
    _check_size(pixels.shape[1], pixels.shape[0], name)
    contiguous = np.ascontiguousarray(pixels)
    digest = hashlib.sha256(f"{pixels.shape} uint8 ".encode())
    digest.update(contiguous.tobytes())
    return StillImage(contiguous, name, digest.hexdigest())


def _worth_telling(note: warnings.WarningMessage) -> bool:
    # Large images have their own limit here; deprecations are for programmers.
    return not issubclass(note.category, Image.DecompressionBombWarning | DeprecationWarning)


def _read(path: Path) -> tuple[np.ndarray, list[str]]:
    """The pixels and doubts of a file.

    Decoders answer hostile bytes with nearly any exception, hence `except Exception`.
    """
    kind = foreign_kind(path)
    if kind is not None and kind not in _FORMATS:
        raise UnusableImage(f"is {kind}, which is not read", where=path, fix=way_out(kind))
    try:
        image = Image.open(path, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except MemoryError:
        raise
    except Exception as error:
        raise UnusableImage(
            "not an image, or its header is invalid",
            where=path,
            fix=f"{', '.join(_FORMATS[:-1])} and {_FORMATS[-1]} are read",
        ) from error
    with image:
        _check_size(image.width, image.height, path)
        try:
            doubts = _doubts(image)
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation)
            to_srgb, more = embedded_profile(image)
            doubts += more
            rgb = _to_rgb(image, path, to_srgb)
        except Image.DecompressionBombError as error:
            raise _too_large(path) from error
        except (MemoryError, UnusableImage):
            raise
        except Exception as error:
            raise UnusableImage(f"damaged or truncated: {error}", where=path) from error
    if isinstance(orientation, int) and orientation in _UPRIGHT:
        rgb = _UPRIGHT[orientation](rgb)
    return np.ascontiguousarray(rgb), doubts


def _too_large(path: object) -> UnusableImage:
    return UnusableImage(f"too large: more than {_MAX_PIXELS // 1_000_000} million pixels", where=path)


def _check_size(width: int, height: int, where: object) -> None:
    """Refuse from the header alone, before anything of that size is allocated."""
    if width * height > _MAX_PIXELS:
        raise _too_large(where)
    short, long = sorted((width, height))
    if short < 1 or (long > _MAX_ASPECT * short and long >= _MIN_SIDE):
        raise UnusableImage(
            f"too elongated: a size of {width}x{height} pixels, at most {_MAX_ASPECT}:1 is read", where=where
        )
    if short < _MIN_SIDE:
        raise UnusableImage(
            f"too small: a size of {width}x{height} pixels, the minimum is {_MIN_SIDE}x{_MIN_SIDE}",
            where=where,
        )


def _doubts(image: Image.Image) -> list[str]:
    # A JPEG with embedded previews or depth (MPO) is one photograph, as every phone takes them.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    return [f"has {frames} frames; the first is used"] if frames > 1 else []


def _to_rgb(image: Image.Image, path: Path, to_srgb: ToSRGB | None) -> np.ndarray:
    """uint8 [H, W, 3] of a loaded image of any mode, in sRGB, transparency composited."""
    if image.mode in ("I", "F") and image.format != "PNG":
        raise UnusableImage(
            "unsupported pixel format: 32-bit grey has no defined white",
            where=path,
            fix="save it with 8 or 16 bits",
        )
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        band = image.crop((0, top, image.width, bottom))
        rgb[top:bottom] = _composited(_shallow_grey(band) if band.mode.startswith("I") else band, to_srgb)
    return rgb


def _composited(image: Image.Image, to_srgb: ToSRGB | None) -> np.ndarray:
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))[..., None].astype(np.uint16)
    rgb = np.asarray(to_srgb(image) if to_srgb else image.convert("RGB"))
    if alpha is None:
        return rgb
    blended = rgb * alpha + BACKGROUND * (255 - alpha)  # at most 255 * 255
    return (blended + 127) // 255


def _shallow_grey(image: Image.Image) -> Image.Image:
    """16-bit grey as 8 bits: 65535 = 255 * 257, so dividing by 257 with rounding keeps both ends."""
    levels = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    key = image.info.get("transparency")  # one level that stands for "transparent"
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8)))
    return grey
