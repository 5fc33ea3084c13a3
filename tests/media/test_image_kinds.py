"""Known formats that are not read are named, whatever the file is called."""

from __future__ import annotations

import re
import struct
import time
from pathlib import Path

import pytest
from PIL import Image, TiffImagePlugin

from avatarctl.errors import UnusableImage
from avatarctl.media import image, load_image

FIELD = Path(__file__).resolve().parents[3] / "shared" / "field-cases"


def ftyp(major: bytes, *compatible: bytes) -> bytes:
    """The first box of an ISO media file, and what could follow."""
    brands = major + bytes(4) + b"".join(compatible)
    return struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + b"\0\0\0\x10meta" + bytes(600)


def tiff(order: str, *directories: list[tuple[int, int, int, int]]) -> bytes:
    """Directories of (tag, type, count, value) one behind the other, each 60 bytes from the one before; from
    place 8 on. Only the first is in the chain."""
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    for entries in directories:
        packed = b"".join(
            struct.pack(f"{order}HHI{'H2x' if kind == 3 else 'I'}", tag, kind, count, value)
            for tag, kind, count, value in entries
        )
        content += (struct.pack(f"{order}H", len(entries)) + packed + bytes(4)).ljust(60, b"\0")
    return content + bytes(600)


PREVIEW = [(262, 3, 1, 2), (259, 3, 1, 6)]
CONTENTS = {
    "HEIC": [
        ftyp(b"heic", b"mif1", b"heic"),
        ftyp(b"heix", b"mif1"),
        ftyp(b"hevc", b"msf1"),
        ftyp(b"mif1", b"miaf", b"MiHB", b"heic"),
    ],
    "HEIF": [ftyp(b"mif1", b"miaf"), ftyp(b"msf1")],
    "JPEG XL": [
        b"\xff\x0a\xfa\x1f\x01" + bytes(100),
        b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl " + bytes(99),
    ],
    "camera raw (CR3)": [ftyp(b"crx ", b"crx ", b"isom")],
    "camera raw (RAF)": [b"FUJIFILMCCD-RAW 0201FF383501X-T2" + bytes(200)],
    "camera raw (ORF)": [b"IIRO\x08\0\0\0" + bytes(200), b"IIRS\x08\0\0\0" + bytes(200), b"MMOR" + bytes(99)],
    "camera raw (RW2)": [b"IIU\0\x18\0\0\0" + bytes(200)],
    "camera raw (X3F)": [b"FOVb\x00\x00\x02\x00" + bytes(200)],
    "camera raw (MRW)": [b"\0MRM\x00\x00\x01\x00" + bytes(200)],
    "camera raw (CRW)": [b"II\x1a\0\0\0HEAPCCDR\x02\0\x01\0" + bytes(200)],
    "camera raw (CR2)": [b"II*\0\x10\0\0\0CR\x02\0" + bytes(200)],
    "camera raw (DNG)": [tiff(order, [*PREVIEW, (50706, 1, 4, 0x01040000)]) for order in "<>"],
    "camera raw": [
        *(tiff(order, [*PREVIEW, (330, 4, 1, 68)], [(262, 3, 1, 32803)]) for order in "<>"),  # ARW, PEF
        tiff("<", [*PREVIEW, (330, 13, 1, 68)], [(262, 3, 1, 34892)]),
        # NEF: the places 68 and 128 stand at 190, as both do not fit into the entry
        tiff(">", [*PREVIEW, (330, 4, 2, 190)], PREVIEW, [(262, 3, 1, 32803)], [(0, 68, 128, 0)]),
    ],
}


@pytest.mark.parametrize(
    ("kind", "content"), [(kind, content) for kind, contents in CONTENTS.items() for content in contents]
)
def test_foreign_formats_are_named(tmp_path: Path, kind: str, content: bytes) -> None:
    for name in ("photo.jpg", "photo.HEIC", "photo"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnusableImage, match=re.escape(f"{name}: is {kind}, which")) as caught:
            load_image(tmp_path / name)
        assert "save it" in str(caught.value) or "develop it" in str(caught.value)


def test_a_raw_file_with_a_preview_that_could_be_read(tmp_path: Path) -> None:
    """As cameras write them: a small RGB image first. It would become the video's image."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    Image.new("RGB", (160, 120), (9, 8, 7)).save(tmp_path / "plain.tiff", tiffinfo=tags)
    assert load_image(tmp_path / "plain.tiff").pixels.shape == (120, 160, 3)
    tags[50706] = b"\x01\x04\0\0"
    tags.tagtype[50706] = 1
    Image.new("RGB", (160, 120), (9, 8, 7)).save(tmp_path / "a.dng", format="TIFF", tiffinfo=tags)
    with pytest.raises(UnusableImage, match=r"camera raw \(DNG\)"):
        load_image(tmp_path / "a.dng")


def test_tiff_directories_that_lead_nowhere(tmp_path: Path) -> None:
    """Circles, places behind the end, and directories that say they have more than the file."""
    began = time.perf_counter()
    for content in (
        tiff("<", [*PREVIEW, (330, 4, 1, 8)]),
        tiff("<", [*PREVIEW, (330, 4, 0xFFFFFFFF, 8)]),
        tiff("<", [(330, 4, 1, 0xFFFFFFF0)] * 4),
        b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 330, 4, 0xFFFF, 8) * 65_535,
        b"MM\0*",
        b"MM\0*\0\0\0\x08\0",
    ):
        (tmp_path / "a.tiff").write_bytes(content)
        with pytest.raises(UnusableImage, match=r"not an image|damaged"):
            load_image(tmp_path / "a.tiff")
    assert time.perf_counter() - began < 5


def test_avif_is_named_where_this_pillow_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "_FORMATS", ("PNG", "JPEG"))
    for content in (ftyp(b"avif", b"mif1"), ftyp(b"mif1", b"avif"), ftyp(b"avis", b"msf1", b"avif")):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(UnusableImage, match=r"is AVIF, which is not read.*avifdec"):
            load_image(tmp_path / "a.png")


def test_videos_are_not_called_images_of_a_foreign_format(tmp_path: Path) -> None:
    for major in (b"isom", b"mp42", b"qt  "):
        (tmp_path / "a.mp4").write_bytes(ftyp(major, b"isom", b"iso2"))
        with pytest.raises(UnusableImage, match="not an image"):
            load_image(tmp_path / "a.mp4")


@pytest.mark.skipif(not FIELD.is_dir(), reason="../shared/field-cases is absent")
def test_field_case() -> None:
    with pytest.raises(UnusableImage, match=r"iphone-heic\.jpg: is HEIC, which is not read"):
        load_image(FIELD / "iphone-heic.jpg")
