"""The faces format: raw outputs of both networks, and final numbers on the portraits beside the checkout."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from avatarctl.loading.faces import face_networks
from avatarctl.models.face_networks import FaceNetworks, anchors
from avatarctl.perception.crops import Region
from avatarctl.perception.detect import Detection, decode, detect, suppress
from avatarctl.perception.mesh import Face, mesh, region_of_landmarks

from .golden import Checks, Format, Listed, Reader

checks = Checks()

_MEDIA = Path(__file__).resolve().parents[3] / "shared" / "media"
_WHERE = 1.0
"""Tolerances of the recording's README: final boxes and points, % of the box's side."""


@functools.cache
def networks() -> FaceNetworks:
    return face_networks(torch.device("cpu"))


@checks("blazeface_raw.safetensors", compares=("*.box", "*.score"), needs=("*.input",))
def detector(reader: Reader) -> None:
    for key in reader.keys("*.input"):
        name = key.removesuffix(".input")
        scores, boxes = networks().detect(reader.take(key).permute(2, 0, 1)[None])
        reader.compare(f"{name}.box", boxes[0], atol=5e-3)
        reader.compare(f"{name}.score", scores[0], atol=1e-2)
        assert len(suppress(decode(scores[0].numpy(), boxes[0].numpy()))) == {"none": 0, "two": 2}.get(
            name, 1
        )


@checks("blazeface_raw.safetensors", compares=("anchors",))
def anchor_centres(reader: Reader) -> None:
    reader.compare("anchors", anchors(), atol=1e-7)


@checks("face_mesh_raw.safetensors", compares=("*.landmarks", "*.flag"), needs=("*.input",))
def mesh_points(reader: Reader) -> None:
    for key in reader.keys("*.input"):
        name = key.removesuffix(".input")
        points, flags = networks().landmarks(reader.take(key).permute(2, 0, 1)[None])
        reader.compare(f"{name}.landmarks", points[0], atol=2e-3)
        reader.compare(f"{name}.flag", flags, atol=1e-4)


def _frame(reader: Reader, name: str) -> np.ndarray:
    """The portrait that the numbers were recorded on; `two` is a part of one beside its mirror image."""
    path = _MEDIA / f"portrait_{'b' if name == 'two' else name}.jpg"
    stated = reader.metadata.get(f"{path.stem}_sha256")
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != stated:
        pytest.skip(f"{path.name} is not beside the checkout, or is another one")
    image = np.asarray(Image.open(path).convert("RGB"))
    if name != "two":
        return image
    part = image[:, 216:616]
    return np.concatenate([part, part[:, ::-1]], 1)


def _near(actual: np.ndarray, expected: np.ndarray, side: float, percent: float) -> None:
    assert np.abs(actual - expected).max() <= side * percent / 100


@checks(
    "final.safetensors",
    compares=("*.detections", "*.landmarks", "*.landmarks_refined", "*.presence", "*.presence_refined"),
    needs=("*.roi", "*.roi_refined"),
)
def portraits(reader: Reader) -> None:
    for key in reader.keys("*.detections"):
        name = key.removesuffix(".detections")
        expected = reader.take(key).double().numpy()
        reader.compared.add(key)
        if not len(expected):  # its frame was not stored; the raw outputs of it are compared above
            continue
        frame = _frame(reader, name)
        (found,) = detect(networks(), frame)
        assert len(found) == len(expected)
        for number, (one, row) in enumerate(zip(found, expected, strict=True)):
            assert abs(one.score - row[0]) <= 0.005
            side = float((row[3:5] - row[1:3]).max())
            _near(one.box, row[1:5], side, _WHERE)
            _near(one.points.reshape(-1), row[5:], side, _WHERE)
            _meshes(reader, f"{name}.{number}" if len(found) > 1 else name, frame, one, side)


def _meshes(reader: Reader, name: str, frame: np.ndarray, found: Detection, side: float) -> None:
    """Both passes: from our own regions, and with the stored ones."""
    own = mesh(networks(), frame, [found.region])[0]
    refined = mesh(networks(), frame, [region_of_landmarks(own.landmarks)])[0]
    for face, suffix in ((own, ""), (refined, "_refined")):
        stored = Region(*reader.take(f"{name}.roi{suffix}").tolist())
        _face(reader, name, suffix, face, side, _WHERE)
        _face(reader, name, suffix, mesh(networks(), frame, [stored])[0], side, 0.2)


def _face(reader: Reader, name: str, suffix: str, face: Face, side: float, percent: float) -> None:
    points, presence = (f"{name}.{what}{suffix}" for what in ("landmarks", "presence"))
    _near(face.landmarks[:, :2], reader.take(points)[:, :2].numpy(), side, percent)
    assert abs(face.presence - float(reader.take(presence))) <= 0.005
    reader.compared |= {points, presence}


FACES = Format(
    name="faces",
    checks=tuple(checks),
    waits_for=(),
    defects=(
        Listed(
            "final.safetensors", "*.mediapipe_detection",
            "spec/face-models.md 0: MediaPipe shrinks without antialias, which moves its boxes by up to 8 %",
        ),
    ),
)  # fmt: skip
