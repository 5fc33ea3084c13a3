"""Frames to aligned faces and back, against arithmetic by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from avatarctl.perception.align import Aligner, align, crop_size, template, warp
from avatarctl.perception.paste import _erode, blend_mouth, paste_back, soft_mask

from .conftest import ROOT


def similarity(points: np.ndarray, scale: float, angle: float, x: float, y: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return scale * points @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


@pytest.mark.parametrize("angle", [0.0, 0.6, -1.2, 3.0])
def test_points_of_the_template_come_back_to_it(angle: float) -> None:
    points = similarity(template(256), 0.7, angle, 300, 200)
    matrix = Aligner(256, smooth=False).fit(points + 0.5)
    assert points @ matrix[:, :2].T + matrix[:, 2] == pytest.approx(template(256), abs=1e-3)


def test_a_mirrored_face_is_turned_and_never_mirrored() -> None:
    matrix = Aligner(256).fit(template(256)[:, ::-1])
    assert np.linalg.det(matrix[:, :2]) > 0


def test_the_bias_is_carried_until_it_is_reset() -> None:
    aligner, other = Aligner(256), template(256) + np.array([(0, 0), (0, 0), (9, 4)])
    first = aligner.fit(other)
    second = aligner.fit(template(256))
    assert not np.allclose(second, Aligner(256).fit(template(256)))
    aligner.reset()
    assert np.array_equal(aligner.fit(other), first)


def test_points_in_one_place_are_refused() -> None:
    with pytest.raises(ValueError, match="no direction"):
        Aligner(256).fit(np.ones((3, 2)))


def test_what_is_at_a_point_comes_to_its_place_in_the_crop() -> None:
    """A soft spot around each point of the frame, whose pixels count from their edge; in the crop its centre
    of mass is where the template has it, counted from pixel centres."""
    points = similarity(template(256), 0.9, 0.3, 120, 60)
    matrix = torch.from_numpy(Aligner(256, smooth=False).fit(points))[None]
    y, x = np.mgrid[:400, :500] + 0.5
    for point, place in zip(points, template(256), strict=True):
        spot = np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / 18)
        crop = warp(torch.from_numpy(spot).float()[None, None], matrix, crop_size(256), 0.0)[0, 0].numpy()
        down, across = np.mgrid[: crop.shape[0], : crop.shape[1]]
        centre = (crop * across).sum() / crop.sum(), (crop * down).sum() / crop.sum()
        assert centre == pytest.approx(place, abs=0.05)


def test_training_can_go_through_it() -> None:
    """The gradient against differences, in directions drawn here."""
    frame = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    matrix = torch.from_numpy(Aligner(32).fit(similarity(template(32), 1.1, 0.2, 6, 4)))[None]
    weights = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (align(frame, matrix, 32) * weights).sum().backward()
    step = torch.rand(frame.shape, generator=torch.Generator().manual_seed(2)) - 0.5
    with torch.no_grad():
        ends = [(align(frame + sign * 0.1 * step, matrix, 32) * weights).sum() for sign in (1, -1)]
    assert frame.grad is not None
    assert (ends[0] - ends[1]).item() / 0.2 == pytest.approx((frame.grad * step).sum().item(), rel=1e-3)


def test_it_is_float32_whatever_the_run_computes_in() -> None:
    frame, matrix = torch.rand(1, 3, 40, 50), torch.tensor([[[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]])
    plain = align(frame, matrix, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(align(frame, matrix, 32), plain)


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(ROOT / "tests" / "golden" / "losses" / "affine.safetensors")


def test_an_unchanged_face_changes_only_pixels_inside_the_soft_mask(
    recorded: dict[str, torch.Tensor],
) -> None:
    frames, fitted = recorded["frames"].permute(0, 3, 1, 2), recorded["matrix_smooth"]
    aligned = align(frames.float() / 255, fitted, 64)
    pasted = paste_back(frames, aligned, fitted)
    assert not torch.equal(pasted, frames)
    for number in range(len(frames)):
        turn = torch.linalg.inv(fitted[number, :, :2].double())
        back = torch.cat([turn, -turn @ fitted[number, :, 2:].double()], 1)[None]
        soft, _ = soft_mask(back, crop_size(64), (frames.shape[2], frames.shape[3]))
        outside = (soft == 0).expand(1, 3, -1, -1)[0]
        assert 0.3 < outside.float().mean() < 0.95
        assert torch.equal(pasted[number][outside], frames[number][outside])


def test_mouth_only_leaves_what_the_mask_keeps(recorded: dict[str, torch.Tensor]) -> None:
    """The middle of the upper face keeps its bytes; the whole crop goes through two warps otherwise."""
    frames, fitted = recorded["frames"].permute(0, 3, 1, 2), recorded["matrix_smooth"]
    keep = torch.ones(1, 1, 64, 64)
    keep[..., 32:, 8:56] = 0
    faces = blend_mouth(torch.ones(2, 3, 64, 64), align(frames.float() / 255, fitted, 64), keep)
    pasted = paste_back(frames, faces, fitted, paste="mouth-only", keep=keep)
    for place, kept in (((26.0, 10.0), True), ((26.0, 52.0), False)):  # the nose's root, the mouth
        there = torch.tensor(place).double() - fitted[0, :, 2]
        x, y = torch.linalg.solve(fitted[0, :, :2].double(), there).round().int().tolist()
        assert torch.equal(pasted[0, :, y, x], frames[0, :, y, x]) == kept
        assert (pasted[0, :, y, x] >= 250).all() != kept
    with pytest.raises(ValueError, match="no mask"):
        paste_back(frames, faces, fitted, paste="mouth-only")


@pytest.mark.parametrize("scale", [30.0, 8.0, 3.0])
def test_a_face_of_a_few_pixels(scale: float) -> None:
    """The soft edge of a tiny face would be nothing, and its kernel empty."""
    frames = torch.full((1, 3, 48, 64), 100, dtype=torch.uint8)
    matrix = torch.tensor([[[scale, 0.0, -scale * 20], [0.0, scale, -scale * 20]]])
    pasted = paste_back(frames, torch.ones(1, 3, 256, 256), matrix)
    assert (pasted != 100).any() and (pasted[..., :18, :] == 100).all()


def test_erosion_reaches_up_and_left_first() -> None:
    """One hole takes itself, the pixel to the right and the one below with a square of two."""
    mask = torch.ones(1, 1, 5, 5)
    mask[..., 2, 2] = 0
    assert (_erode(mask, 2)[0, 0] == 0).nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    around = [[row, column] for row in range(1, 5) for column in range(1, 5)]
    assert (_erode(mask, 4)[0, 0] == 0).nonzero().tolist() == around
