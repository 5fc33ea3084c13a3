"""Embedded colour profiles: what the pixels mean, not what the numbers are."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from avatarctl.media import image, load_image
from tests.media import icc
from tests.media.test_image import quadrants

FIELD = Path(__file__).resolve().parents[3] / "shared" / "field-cases"
COLOURS = ((189, 44, 53), (20, 160, 90), (224, 180, 160), (255, 255, 255), (0, 0, 0))
EXACT = {"webp": {"lossless": True, "exact": True}, "jpg": {"quality": 100, "subsampling": 0}}
ADOBE = icc.rgb_profile("Adobe RGB", 2.2)


def stripes(colours: tuple[tuple[int, ...], ...], mode: str) -> Image.Image:
    """Every colour over 16 rows."""
    drawn = Image.new(mode, (32, 16 * len(colours)))
    for row, colour in enumerate(colours):
        drawn.paste(colour if len(colour) > 1 else colour[0], (0, 16 * row, 32, 16 * row + 16))
    return drawn


def middles(path: Path) -> np.ndarray:
    """int [n, 3]: the colour in the middle of each stripe, with no doubts about the image."""
    loaded = load_image(path)
    assert loaded.warnings == ()
    return loaded.pixels[8::16, 16].astype(int)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tiff", "avif"])
@pytest.mark.parametrize(("space", "gamma"), [("Adobe RGB", 2.2), ("Display P3", 2.2), ("sRGB", 1.0)])
def test_rgb_profiles(tmp_path: Path, extension: str, space: str, gamma: float) -> None:
    if extension == "avif" and "AVIF" not in image._FORMATS:
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / f"a.{extension}"
    options = EXACT.get(extension, {"quality": 100, "subsampling": "4:4:4"} if extension == "avif" else {})
    stripes(COLOURS, "RGB").save(path, icc_profile=icc.rgb_profile(space, gamma), **options)
    wanted = np.array([icc.srgb_of_rgb(space, gamma, colour) for colour in COLOURS])
    lossy = 4 if gamma > 1 else 9  # of a level that coding changed; dark linear levels are far apart
    within = lossy if extension in ("jpg", "avif") else 2
    assert np.abs(middles(path) - wanted).max() <= within
    assert np.abs(np.array(COLOURS) - wanted).max() > 20, "the profile matters"


@pytest.mark.parametrize("extension", ["png", "jpg", "tiff"])
def test_grey_profiles(tmp_path: Path, extension: str) -> None:
    path, greys = tmp_path / f"a.{extension}", ((0,), (30,), (128,), (255,))
    profile = icc.grey_profile(1.0)
    stripes(greys, "L").save(path, icc_profile=profile, **EXACT.get(extension, {}))
    wanted = np.array([[icc.srgb_of_grey(1.0, level)] * 3 for (level,) in greys])
    assert np.abs(middles(path) - wanted).max() <= 2

    if extension != "jpg":
        levels = np.repeat(np.array([level * 257 for (level,) in greys], np.uint16), 16)[:, None].repeat(
            32, 1
        )
        Image.fromarray(levels).save(path, icc_profile=profile)
        assert np.abs(middles(path) - wanted).max() <= 2, "16 bits"


def test_a_grey_or_palette_image_with_an_rgb_profile(tmp_path: Path) -> None:
    profile = icc.rgb_profile("Adobe RGB", 1.4)
    stripes(((60,), (200,)), "L").save(tmp_path / "l.png", icc_profile=profile)
    wanted = np.array([icc.srgb_of_rgb("Adobe RGB", 1.4, (level,) * 3) for level in (60, 200)])
    assert np.abs(middles(tmp_path / "l.png") - wanted).max() <= 2

    stripes(COLOURS, "RGB").quantize(8).save(tmp_path / "p.png", icc_profile=ADOBE)
    wanted = np.array([icc.srgb_of_rgb("Adobe RGB", 2.2, colour) for colour in COLOURS])
    assert np.abs(middles(tmp_path / "p.png") - wanted).max() <= 2


@pytest.mark.parametrize("extension", ["jpg", "tiff"])
def test_cmyk_profiles(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    inks = tuple(tuple(255 * ink for ink in each) for each in icc.INKS)
    stripes(inks, "CMYK").save(path, icc_profile=icc.cmyk_profile(), **EXACT.get(extension, {}))
    wanted = np.array([icc.srgb_of_inks(each) for each in icc.INKS])
    assert np.abs(middles(path) - wanted).max() <= 3  # 8-bit L*a*b* in the profile
    stripes(inks, "CMYK").save(path, **EXACT.get(extension, {}))
    assert np.abs(middles(path)[1] - (0, 255, 255)).max() <= 2, "without a profile as ever"


@pytest.mark.parametrize("extension", ["png", "webp", "tiff"])
def test_transparency_is_laid_on_the_same_grey(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    colours = ((189, 44, 53, 255), (189, 44, 53, 51), (189, 44, 53, 0))
    stripes(colours, "RGBA").save(path, icc_profile=ADOBE, **EXACT.get(extension, {}))
    red = icc.srgb_of_rgb("Adobe RGB", 2.2, (189, 44, 53))
    wanted = np.array([red, 0.2 * red + 0.8 * 128, [128] * 3])
    assert np.abs(middles(path) - wanted).max() <= 2


def test_transparent_greys_and_keys(tmp_path: Path) -> None:
    profile, light = icc.grey_profile(1.0), icc.srgb_of_grey(1.0, 60)
    stripes(((60, 255), (60, 0)), "LA").save(tmp_path / "la.png", icc_profile=profile)
    assert np.abs(middles(tmp_path / "la.png") - [[light] * 3, [128] * 3]).max() <= 1
    stripes(((60,), (61,)), "L").save(tmp_path / "l.png", icc_profile=profile, transparency=61)
    assert np.abs(middles(tmp_path / "l.png") - [[light] * 3, [128] * 3]).max() <= 1
    deep = Image.fromarray(
        np.repeat(np.array([60 * 257, 60 * 257 + 1], np.uint16), 16)[:, None].repeat(32, 1)
    )
    deep.save(tmp_path / "i.png", icc_profile=profile, transparency=60 * 257 + 1)
    assert np.abs(middles(tmp_path / "i.png") - [[light] * 3, [128] * 3]).max() <= 1


def test_srgb_itself_changes_no_bit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    curve = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(noise).save(tmp_path / "a.png", icc_profile=curve)
    assert (load_image(tmp_path / "a.png").pixels == noise).all()


def test_bands_meet_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (70, 40, 4), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png", icc_profile=ADOBE)
    whole = load_image(tmp_path / "a.png").pixels
    monkeypatch.setattr(image, "_BAND_PIXELS", 40 * 9)
    assert (load_image(tmp_path / "a.png").pixels == whole).all()


def bent(profile: bytes) -> list[bytes]:
    """A profile cut, and with other numbers in its table of tags."""
    draw = random.Random(3)
    tables = [bytes(draw.randrange(256) for _ in range(80)) for _ in range(3)]
    return [
        profile[:100],
        profile[:300],
        b"no profile",
        *(profile[:132] + each + profile[212:] for each in tables),
    ]


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tiff"])
def test_a_broken_profile_is_ignored_with_one_line(
    tmp_path: Path, extension: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"a.{extension}"
    for profile in (*bent(ADOBE), icc.cmyk_profile(), icc.grey_profile(1.0)):
        Image.fromarray(quadrants()).save(path, icc_profile=profile, **EXACT.get(extension, {}))
        loaded = load_image(path)
        (warning,) = loaded.warnings
        assert "colour profile" in warning and "ignored" in warning
        assert np.abs(loaded.pixels.astype(int) - quadrants()).max() <= 2
    stripes(((255, 0, 0, 0),), "CMYK").save(tmp_path / "c.tiff", icc_profile=ADOBE)
    assert "for RGB" in load_image(tmp_path / "c.tiff").warnings[0]
    assert capfd.readouterr() == ("", ""), "the library of profiles keeps quiet"


def test_a_profile_that_the_file_did_not_keep_whole(tmp_path: Path) -> None:
    Image.fromarray(quadrants()).save(tmp_path / "a.png", icc_profile=ADOBE)
    content = (tmp_path / "a.png").read_bytes()
    packed = zlib.compress(ADOBE)
    start = content.find(packed)
    spoiled = b"iCCP" + content[content.find(b"iCCP") + 4 : start] + b"\xff" * len(packed)
    checked = spoiled + zlib.crc32(spoiled).to_bytes(4, "big")
    at = start + len(packed) + 4 - len(checked)
    (tmp_path / "a.png").write_bytes(content[:at] + checked + content[at + len(checked) :])

    Image.fromarray(quadrants()).save(tmp_path / "b.jpg", icc_profile=ADOBE, **EXACT["jpg"])
    content = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(content.replace(b"ICC_PROFILE\0\x01\x01", b"ICC_PROFILE\0\x01\x02"))
    for name in ("a.png", "b.jpg"):
        loaded = load_image(tmp_path / name)
        assert loaded.warnings == ("has a colour profile that cannot be read; it is ignored",)
        assert np.abs(loaded.pixels.astype(int) - quadrants()).max() <= 2


def test_colours_in_lab(tmp_path: Path) -> None:
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    lab = ImageCms.applyTransform(stripes(COLOURS, "RGB"), to_lab)
    assert lab is not None
    lab.save(tmp_path / "a.tiff")
    assert np.abs(middles(tmp_path / "a.tiff") - COLOURS).max() <= 4  # 8-bit L*a*b*


@pytest.mark.skipif(not FIELD.is_dir(), reason="../shared/field-cases is absent")
def test_field_case() -> None:
    loaded = load_image(FIELD / "red-adobe-rgb.png")
    assert np.abs(loaded.pixels.astype(int) - (220, 40, 50)).max() <= 2 and loaded.warnings == ()
