"""Faces in scenes that are made here: the crop of a face from tests/golden, always; portraits beside the
checkout where they are."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from avatarctl.loading.faces import face_networks
from avatarctl.models.face_networks import FaceNetworks
from avatarctl.perception.crops import Region
from avatarctl.perception.detect import detect, look_again
from avatarctl.perception.mesh import Face, find_faces, mesh, region_of_landmarks

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "faces"
MEDIA = ROOT.parent / "shared" / "media"
NAMES = ("crop", "a", "b", "c", "d")


@functools.cache
def the_networks() -> FaceNetworks:
    torch.set_num_threads(1)
    return face_networks(torch.device("cpu"))


@pytest.fixture(scope="session")
def networks() -> FaceNetworks:
    return the_networks()


@dataclass(frozen=True)
class Portrait:
    """An image of one face, and the face in it. side: of the detector's box, as in docs/faces.md."""

    image: Image.Image
    face: Face
    side: float
    _larger: dict[tuple[int, int], Image.Image] = field(default_factory=dict)

    @property
    def middle(self) -> np.ndarray:
        return (self.face.box[:2] + self.face.box[2:]) / 2

    def put(self, scene: Image.Image, x: float, y: float, side: float, angle: float = 0.0) -> Image.Image:
        """The scene with the middle of the face at (x, y), its box `side` large, turned by `angle`
        radians."""
        scale = side / self.side
        cos, sin = math.cos(angle), math.sin(angle)
        # Twice as large as needed, so that what is drawn is smooth at any place and angle.
        size = (max(2, round(self.image.width * scale * 2)), max(2, round(self.image.height * scale * 2)))
        if size not in self._larger:  # frames of one video follow each other: one size is held
            self._larger.clear()
            self._larger[size] = self.image.resize(size, Image.Resampling.LANCZOS)
        larger = self._larger[size]
        across, down = (new / old for new, old in zip(size, self.image.size, strict=True))
        rows = np.array([[cos, sin], [-sin, cos]]) / scale
        # Only the part of the scene that the portrait reaches is drawn.
        corners = np.array([(0, 0), (1, 0), (0, 1), (1, 1)]) * self.image.size
        reached = self.points(corners, x, y, side, angle)
        left, top = np.clip(np.floor(reached.min(0)), 0, scene.size).astype(int).tolist()
        right, bottom = np.clip(np.ceil(reached.max(0)), 0, scene.size).astype(int).tolist()
        start = self.middle - rows @ (x - left, y - top)
        affine = np.hstack([rows, start[:, None]]) * np.array([[across], [down]])
        how = (
            (right - left, bottom - top),
            Image.Transform.AFFINE,
            tuple(affine.reshape(-1)),
            Image.Resampling.BICUBIC,
        )
        whole = Image.new("L", larger.size, 255).transform(*how)
        made = scene.copy()
        made.paste(larger.transform(*how), (left, top), whole)
        return made

    def points(self, own: np.ndarray, x: float, y: float, side: float, angle: float = 0.0) -> np.ndarray:
        """Where points of the portrait, [n, 2], are in such a scene."""
        cos, sin = math.cos(angle), math.sin(angle)
        return (own - self.middle) @ np.array([[cos, sin], [-sin, cos]]) * (side / self.side) + (x, y)


@functools.cache
def portrait(name: str) -> Portrait:
    """crop: the input of the mesh in tests/golden; a to d: beside the checkout, or a skip."""
    if name == "crop":
        pixels = load_file(GOLDEN / "face_mesh_raw.safetensors")["d.input"]
        (face,) = mesh(the_networks(), pixels, [Region(96, 96, 192, 0)])
        (face,) = mesh(the_networks(), pixels, [region_of_landmarks(face.landmarks)])
        return Portrait(Image.fromarray(pixels), face, _box_side(pixels))
    path = MEDIA / f"portrait_{name}.jpg"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside the checkout")
    image = Image.open(path).convert("RGB")
    pixels = np.asarray(image)
    (face,) = find_faces(the_networks(), pixels)
    return Portrait(image, face, _box_side(pixels))


def _box_side(pixels: np.ndarray) -> float:
    """Of the detector's own box, seen from near."""
    (first, *_), *_ = detect(the_networks(), pixels)
    (again,) = look_again(the_networks(), pixels, [first])
    return (again or first).side


def background(width: int = 1280, height: int = 720, seed: int = 0) -> Image.Image:
    """Soft coloured clouds."""
    cells = np.random.default_rng(seed).integers(0, 255, (9, 16, 3), np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def landscape(width: int = 1280, height: int = 720) -> np.ndarray:
    """A drawn one: sky, a sun, hills, a house with two windows and a door."""
    from PIL import ImageDraw

    image = Image.new("RGB", (width, height), (130, 180, 235))
    draw = ImageDraw.Draw(image)
    draw.ellipse((980, 60, 1100, 180), fill=(250, 230, 120))
    draw.ellipse((-200, 380, 700, 1100), fill=(80, 140, 70))
    draw.ellipse((400, 430, 1500, 1200), fill=(60, 120, 60))
    draw.rectangle((520, 330, 760, 520), fill=(200, 160, 120))
    draw.polygon([(500, 330), (780, 330), (640, 230)], fill=(150, 60, 50))
    for left in (550, 680):
        draw.rectangle((left, 370, left + 50, 420), fill=(40, 50, 80))
    draw.rectangle((615, 440, 665, 520), fill=(90, 60, 40))
    return np.asarray(image)
