"""Alignment of faces and paste-back (spec/face-alignment.md 2, 4)."""

from __future__ import annotations

import numpy as np
import torch

from avatarctl.perception.align import Aligner, align, crop_size, template, warp
from avatarctl.perception.paste import blend_mouth, paste_back

from ..golden import Checks, Reader

checks = Checks()

_FILE = "affine.safetensors"


def _frames(reader: Reader) -> torch.Tensor:
    return reader.take("frames").permute(0, 3, 1, 2)


def _resolution(reader: Reader) -> int:
    return int(reader.take("aligned").shape[1])


@checks(_FILE, compares=("template", "matrix_*"), needs=("landmarks3",))
def matrices(reader: Reader) -> None:
    resolution = _resolution(reader)
    reader.compare("template", torch.from_numpy(template(resolution)), atol=1e-9)
    for key, smooth in (("matrix_smooth", True), ("matrix_nosmooth", False)):
        aligner = Aligner(resolution, smooth=smooth)
        fitted = [aligner.fit_centres(points.numpy()) for points in reader.take("landmarks3")]
        reader.compare(key, torch.from_numpy(np.stack(fitted)), atol=1e-4)


@checks(_FILE, compares=("p_bias_final",), needs=("landmarks3",))
def carried_bias(reader: Reader) -> None:
    aligner = Aligner(_resolution(reader))
    for points in reader.take("landmarks3"):
        aligner.fit_centres(points.numpy())
    reader.compare("p_bias_final", torch.from_numpy(aligner._bias), atol=1e-5)


@checks(_FILE, compares=("face_size_wh", "face_crop", "aligned"), needs=("frames", "matrix_smooth"))
def crops(reader: Reader) -> None:
    frames, fitted, resolution = _frames(reader).float(), reader.take("matrix_smooth"), _resolution(reader)
    height, width = crop_size(resolution)
    reader.compare("face_size_wh", torch.tensor([width, height]))
    crop = warp(frames, fitted, (height, width), 127.0).to(torch.uint8)
    reader.compare("face_crop", crop.permute(0, 2, 3, 1), atol=1)
    # Ours keeps fractions where the recording has two roundings to bytes.
    aligned = align(frames / 255, fitted, resolution) * 255
    reader.compare("aligned", aligned.permute(0, 2, 3, 1), atol=2)


@checks(_FILE, compares=("restored",), needs=("frames", "matrix_smooth", "aligned", "generated01", "mask"))
def pasted(reader: Reader) -> None:
    """At most one level on 99.9 % of the pixels, as the reference's own arithmetic is float32."""
    aligned = reader.take("aligned").permute(0, 3, 1, 2) / 255
    faces = blend_mouth(reader.take("generated01"), aligned, reader.take("mask")[None, None])
    restored = paste_back(_frames(reader), faces, reader.take("matrix_smooth")).permute(0, 2, 3, 1)
    off = (restored.int() - reader.take("restored").int()).abs()
    reader.compared.add("restored")
    assert (off <= 1).float().mean() >= 0.999 and off.max() <= 2
