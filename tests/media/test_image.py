"""Images of every kind become upright 8-bit RGB, or are refused with the cause."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avatarctl.errors import AvatarctlError, PathNotFound, UnusableImage
from avatarctl.media import image_from_array, load_image
from avatarctl.media.image import _FORMATS

AVIF = pytest.param(
    "avif", marks=pytest.mark.skipif("AVIF" not in _FORMATS, reason="this Pillow has no AVIF")
)
OPTIONS = {
    "webp": {"lossless": True},
    "jpg": {"quality": 95, "subsampling": 0},
    "avif": {"quality": 95, "subsampling": "4:4:4"},
}
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quadrants(width: int = 32, height: int = 48) -> np.ndarray:
    """uint8 [H, W, 3]: red, green over blue, white."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = RED, GREEN
    pixels[height // 2 :, : width // 2], pixels[height // 2 :, width // 2 :] = BLUE, WHITE
    return pixels


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that declares a size, whatever its pixel data."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


def close(pixels: np.ndarray, expected: np.ndarray, within: int) -> bool:
    return pixels.shape == expected.shape and int(np.abs(pixels.astype(int) - expected).max()) <= within


@pytest.mark.parametrize(
    ("extension", "within"),
    [
        *[("png", 0), ("bmp", 0), ("tiff", 0), ("gif", 0), ("webp", 0), ("jpg", 12)],
        pytest.param("avif", 12, marks=AVIF.marks),
    ],
)
def test_formats(tmp_path: Path, extension: str, within: int) -> None:
    path = tmp_path / f"a.{extension}"
    options = OPTIONS.get(extension, {})
    Image.fromarray(quadrants()).save(path, **options)
    image = load_image(path)
    assert close(image.pixels, quadrants(), within)
    assert image.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert image.warnings == () and image.name == str(path)
    assert image.pixels.flags.c_contiguous and image.pixels.flags.writeable


def test_content_counts_not_the_extension(tmp_path: Path) -> None:
    Image.fromarray(quadrants()).save(tmp_path / "a.jpg", format="PNG")
    assert close(load_image(tmp_path / "a.jpg").pixels, quadrants(), 0)


# What a camera stores for each EXIF orientation, so that the upright image comes out.
STORED = {
    1: lambda up: up,
    2: lambda up: up[:, ::-1],
    3: lambda up: up[::-1, ::-1],
    4: lambda up: up[::-1],
    5: lambda up: up.transpose(1, 0, 2),
    6: lambda up: np.rot90(up, 1),  # turned clockwise when shown, so stored turned the other way
    7: lambda up: np.rot90(up, 2).transpose(1, 0, 2),
    8: lambda up: np.rot90(up, -1),
    9: lambda up: up,
    0: lambda up: up,
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tiff", AVIF])
def test_exif_orientation(tmp_path: Path, extension: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{extension}"
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](quadrants())))
    options = OPTIONS.get(extension, {})
    stored.save(path, exif=exif, **options)
    assert close(load_image(path).pixels, quadrants(), 12 if extension in ("jpg", "avif") else 0)


@pytest.mark.parametrize("extension", ["png", "webp", "tiff"])
def test_alpha_is_composited_on_mid_grey(tmp_path: Path, extension: str) -> None:
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[:] = (255, 0, 255, 0)  # magenta hides below full transparency
    rgba[:10] = (201, 43, 0, 255)
    rgba[10:12] = (201, 43, 0, 51)  # 20 %: 0.2 * colour + 0.8 * 128
    path = tmp_path / f"a.{extension}"
    Image.fromarray(rgba).save(path, **({"lossless": True, "exact": True} if extension == "webp" else {}))
    pixels = load_image(path).pixels
    assert (pixels[:10] == (201, 43, 0)).all()
    assert (pixels[10:12] == (round(142.6), round(111.0), round(102.4))).all()
    assert (pixels[12:] == 128).all()


def test_grey_with_alpha_and_palette_with_a_transparent_index(tmp_path: Path) -> None:
    grey = Image.new("LA", (16, 16), (250, 0))
    grey.paste((30, 255), (0, 0, 16, 8))
    grey.save(tmp_path / "la.png")
    pixels = load_image(tmp_path / "la.png").pixels
    assert (pixels[:8] == 30).all() and (pixels[8:] == 128).all()

    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([255, 0, 255, 10, 20, 30])
    palette.paste(1, (0, 0, 16, 8))
    for name in ("p.png", "p.gif"):
        palette.save(tmp_path / name, transparency=0)
        pixels = load_image(tmp_path / name).pixels
        assert (pixels[:8] == (10, 20, 30)).all() and (pixels[8:] == 128).all()


def test_sixteen_bit_grey_is_scaled_and_rounded(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 64 * 32).round().astype(np.uint16).reshape(32, 64)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(levels).save(tmp_path / name)
        pixels = load_image(tmp_path / name).pixels
        assert close(pixels, np.repeat(np.rint(levels / 257.0)[..., None], 3, 2).astype(np.uint8), 0)
        assert pixels.min() == 0 and pixels.max() == 255


def test_sixteen_bit_rgb_loses_only_the_low_byte(tmp_path: Path) -> None:
    high = quadrants(16, 16).astype(np.uint16) // 2 + 20
    deep = (high << 8 | 77).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    content = bytearray(png(16, 16, rows))
    content[24] = 16  # bits per channel
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    assert close(load_image(tmp_path / "a.png").pixels, high.astype(np.uint8), 1)


def test_bilevel_grey_and_cmyk(tmp_path: Path) -> None:
    checks = np.indices((16, 16)).sum(0) % 2 == 0
    Image.fromarray(checks).save(tmp_path / "1.png")
    assert close(load_image(tmp_path / "1.png").pixels, np.repeat(checks[..., None], 3, 2) * 255, 0)

    Image.new("L", (16, 16), 77).save(tmp_path / "l.png")
    assert (load_image(tmp_path / "l.png").pixels == 77).all()

    for name in ("c.jpg", "c.tiff"):
        Image.fromarray(quadrants()).convert("CMYK").save(tmp_path / name)
        assert close(load_image(tmp_path / name).pixels, quadrants(), 40)


def test_thirty_two_bit_grey_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((16, 16), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(UnusableImage, match="no defined white"):
        load_image(tmp_path / "f.tiff")


@pytest.mark.parametrize("extension", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame_is_used_with_a_warning(tmp_path: Path, extension: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / f"a.{extension}"
    options = {"lossless": True} if extension == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    image = load_image(path)
    assert (image.pixels == RED).all()
    assert image.warnings == ("has 3 frames; the first is used",)


def test_a_photograph_with_an_embedded_preview_is_no_animation(tmp_path: Path) -> None:
    main, preview = Image.new("RGB", (32, 32), RED), Image.new("RGB", (16, 16), BLUE)
    main.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[preview])
    image = load_image(tmp_path / "phone.jpg")
    assert close(image.pixels, np.full((32, 32, 3), RED), 3) and image.warnings == ()


@pytest.mark.parametrize(
    ("size", "cause"),
    [
        ((1, 1), "too small"),
        ((7, 30), "too small"),
        ((60_000, 10), "too elongated"),
        ((4_000, 6), "too elongated"),
        ((161, 10), "too elongated"),
        ((20_000, 20_000), "too large"),
        ((100_000, 100_000), "too large"),
        ((12_000, 9_000), "too large"),  # Pillow itself would only warn
        ((0, 10), "invalid"),
    ],
)
def test_sizes_are_judged_by_the_header(tmp_path: Path, size: tuple[int, int], cause: str) -> None:
    (tmp_path / "a.png").write_bytes(png(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnusableImage, match=cause) as caught:
            load_image(tmp_path / "a.png")
    assert "a.png" in str(caught.value)


def test_sizes_at_the_limits_are_accepted(tmp_path: Path) -> None:
    for size in ((8, 8), (160, 10), (8, 128)):
        Image.new("RGB", size, GREEN).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png").pixels.shape == (size[1], size[0], 3)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "gif", "bmp", "tiff", AVIF])
def test_truncated_files_are_refused(tmp_path: Path, extension: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format={"jpg": "JPEG"}.get(extension, extension.upper()))
    content = buffer.getvalue()
    path = tmp_path / f"a.{extension}"
    for share in (0.01, 0.1, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UnusableImage, match=r": (damaged or truncated|not an image)"):
            load_image(path)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "gif", "bmp", "tiff", AVIF])
def test_damaged_bytes_never_raise_anything_else(
    tmp_path: Path, extension: str, capfd: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    options = {} if extension in ("gif", "bmp") else {"exif": exif}
    Image.fromarray(quadrants()).save(
        buffer, format={"jpg": "JPEG"}.get(extension, extension.upper()), **options
    )
    draw = random.Random(7)
    path = tmp_path / f"a.{extension}"
    for _ in range(150):
        content = bytearray(buffer.getvalue())
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(min(len(content), 400))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            assert load_image(path).pixels.dtype == np.uint8
        except AvatarctlError as error:
            assert isinstance(error, UnusableImage)
    assert capfd.readouterr() == ("", ""), "decoders keep quiet"


def test_strangers_and_absent_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with pytest.raises(UnusableImage, match="not an image"):
        load_image(tmp_path / "a.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "b.ppm")
    with pytest.raises(UnusableImage, match="not an image"):
        load_image(tmp_path / "b.ppm")
    with pytest.raises(PathNotFound):
        load_image(tmp_path / "absent.png")


def test_decoder_warnings_become_warnings_of_the_image(tmp_path: Path) -> None:
    Image.fromarray(quadrants()).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\x00")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(tmp_path / "a.jpg")
    assert image.pixels.shape == (48, 32, 3)
    assert any("EXIF" in warning for warning in image.warnings)


def test_image_from_array() -> None:
    image = image_from_array(quadrants(), "drawn")
    other = image_from_array(255 - quadrants(), "drawn")
    assert (image.pixels == quadrants()).all() and image.name == "drawn"
    assert image.sha256 == image_from_array(quadrants(), "again").sha256 != other.sha256
    with pytest.raises(TypeError, match="float64"):
        image_from_array(np.zeros((16, 16, 3)), "drawn")
    with pytest.raises(ValueError, match="shape"):
        image_from_array(np.zeros((16, 16), np.uint8), "drawn")
    with pytest.raises(UnusableImage, match="too small"):
        image_from_array(np.zeros((2, 2, 3), np.uint8), "drawn")
