"""A page that shows whether preparation went well: aligned faces of some samples under the mouth mask."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from avatarctl.atomic import atomic_write_bytes
from avatarctl.data.samples import Sample
from avatarctl.errors import AvatarctlError, printable
from avatarctl.media import open_video
from avatarctl.perception.align import align
from avatarctl.perception.face_file import FACE_FILE, FaceFile, read_face_file

__all__ = ["draw_face_sheet"]

_KEY: Final = "avatarctl.faces"
_VERSION: Final = 1  # of how a page is drawn
_MOST: Final = 24
"""Samples on the page, from the first to the last of all."""
_FRAMES: Final = 6
_TILE: Final = 112  # pixels
_GAP: Final = 10
_LINE: Final = 18  # of text
_COLUMNS: Final = 2
_PAPER: Final = "#ffffff"
_INK: Final = "#1f2933"
_TINT: Final = np.array([255, 40, 40], np.float32)
_STRENGTH: Final = 0.35


def draw_face_sheet(
    path: Path,
    samples: Sequence[Sample],
    mask: np.ndarray,
    making: Sequence[str] = (),
    doubts: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
) -> None:
    """Writes the page as PNG, whole or not at all: of each sample `_FRAMES` aligned faces; what `mask` erases
    is red. mask: uint8 [h, w], white is kept. Samples that cannot be read any more are left out.

    making: what the samples depend on. A page that stands and was drawn of the same is kept.
    doubts: of samples by name the least presence, the filled frames and the longest step from frame to frame.
    Where there are more samples than fit, the first half of the page is of those with the worst of each.
    Raises OutputRefused and WriteFailed.
    """
    facts = [_VERSION, mask.shape, hashlib.sha256(mask.tobytes()).hexdigest(), *making]
    of_all = json.dumps([*facts, [each.name for each in samples]])
    digest = hashlib.sha256(of_all.encode()).hexdigest()
    if _drawn_of(path) == digest:
        return
    count = min(_MOST, len(samples))
    chosen, doubtful = _chosen(samples, doubts)
    width = _FRAMES * _TILE
    rows = -(-count // _COLUMNS)
    page = Image.new(
        "RGB",
        (_COLUMNS * (width + _GAP) + _GAP, _LINE + 2 * _GAP + rows * (_TILE + _LINE + _GAP)),
        _PAPER,
    )
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    first = f", the most doubtful {doubtful} first" if doubtful else ""
    title = f"{count} of {len(samples)} samples{first}; a mouth belongs into the red, eyes and nose above it"
    draw.text((_GAP, _GAP), title, _INK, font)
    red = _red(mask)
    for place, sample in enumerate(chosen):
        left = _GAP + place % _COLUMNS * (width + _GAP)
        top = _LINE + 2 * _GAP + place // _COLUMNS * (_TILE + _LINE + _GAP)
        try:
            faces, line = _faces_of(sample)
        except AvatarctlError as problem:  # prepared long ago and changed since: the checks say so
            faces, line = [], f"cannot be shown: {problem.what}"
        for column, face in enumerate(faces):
            tile = np.asarray(
                Image.fromarray(face).resize((_TILE, _TILE), Image.Resampling.BICUBIC), np.float32
            )
            page.paste(_image(tile + red * (_TINT - tile)), (left + column * _TILE, top))
        draw.text((left, top + _TILE + 2), printable(f"{sample.name[-50:]}   {line}"), _INK, font)
    data = io.BytesIO()
    told = PngImagePlugin.PngInfo()
    told.add_text(_KEY, digest)
    page.save(data, "PNG", pnginfo=told)
    atomic_write_bytes(path, data.getvalue())


def _chosen(samples: Sequence[Sample], doubts: Mapping[str, tuple[float, ...]]) -> tuple[list[Sample], int]:
    """The samples of a page, and how many of them were chosen because they are doubtful, which come first."""
    if len(samples) <= _MOST:
        return list(samples), 0
    known = [each for each in samples if each.name in doubts]
    worst = [
        sorted(known, key=lambda each: (sign * doubts[each.name][place], each.name))
        for place, sign in enumerate((1, -1, -1))
    ]
    in_turn = dict.fromkeys(each for three in zip(*worst, strict=True) for each in three)
    doubtful = list(in_turn)[: _MOST // 2]
    others = [each for each in samples if each not in set(doubtful)]
    places = np.linspace(0, len(others) - 1, _MOST - len(doubtful)).round()
    return [*doubtful, *(others[int(place)] for place in places)], len(doubtful)


def _drawn_of(path: Path) -> str | None:
    """The digest in a page; None where there is no page that could be read."""
    try:
        with Image.open(path) as page:
            return str(page.info.get(_KEY))
    except (OSError, ValueError):  # it is drawn anew
        return None


def _red(mask: np.ndarray) -> np.ndarray:
    """float32 [_TILE, _TILE, 1]: how red each pixel of a tile becomes."""
    erased = Image.fromarray(255 - mask).resize((_TILE, _TILE), Image.Resampling.BILINEAR)
    return np.asarray(erased, np.float32)[..., None] / 255 * _STRENGTH


def _faces_of(sample: Sample) -> tuple[list[np.ndarray], str]:
    """Aligned faces, uint8 [r, r, 3], of frames from the first to the last, and a line about all."""
    held = read_face_file(sample.folder / FACE_FILE)
    made = []
    with open_video(sample.video) as reader:
        frames = min(reader.frames, len(held.matrices))
        for frame in np.linspace(0, frames - 1, _FRAMES).round().astype(int).tolist():
            made.append(_aligned(reader.read(frame, frame + 1), held, frame))
    filled = int(held.found.sum() - held.seen.sum())
    return made, f"{held.resolution} px" + (f", {filled} frames filled" if filled else "")


def _aligned(pixels: np.ndarray, held: FaceFile, frame: int) -> np.ndarray:
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    made = align(image, torch.from_numpy(held.matrices[frame : frame + 1]), held.resolution)
    return np.asarray(_image(made[0].permute(1, 2, 0).numpy() * 255))


def _image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
