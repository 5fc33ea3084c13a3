"""Masks: what is kept, what is erased, and which frames a reference sequence is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avatarctl.conditioning.channels import given_frames, mask_channel
from avatarctl.conditioning.masking import (
    keep_map,
    mask_tensor,
    masked_video,
    mouth_mask,
    reference_range,
)


def test_the_mouth_is_erased_and_the_eyes_are_kept() -> None:
    mask = mouth_mask()
    assert mask.shape == (256, 256) and set(np.unique(mask)) == {0, 255}
    assert (mask[:95] == 255).all() and (mask[243:] == 255).all()
    assert (mask[95:128, 78:178] == 255).all()  # the nose
    assert (mask[95:128, 9:78] == 0).all() and (mask[95:128, 178:247] == 0).all()
    widths = (mask == 0).sum(1)[128:243]
    assert (np.diff(widths) <= 0).all()  # narrows towards the chin
    assert (mask == 0).mean() == pytest.approx(0.407, abs=0.001)


@pytest.mark.parametrize("size", [(64, 64), (50, 90), (8, 12), (512, 512)])
def test_a_keep_map_is_nothing_but_kept_and_erased(size: tuple[int, int]) -> None:
    keep = keep_map(mask_tensor(mouth_mask()), size)
    assert keep.shape == (1, 1, *size) and set(keep.unique().tolist()) == {0, 1}
    assert torch.equal(keep_map(keep, size), keep)


def test_a_grey_border_is_cut_at_one_half() -> None:
    grey = np.repeat(np.arange(0, 256, dtype=np.uint8)[None], 4, 0)
    keep = keep_map(mask_tensor(grey), (4, 256))[0, 0]
    assert (keep[:, :128] == 0).all() and (keep[:, 128:] == 1).all()
    colour = np.stack([grey, 255 - grey, grey], -1)
    assert torch.equal(mask_tensor(colour), mask_tensor(grey))


def test_the_hole_is_mid_grey_and_the_rest_is_untouched() -> None:
    video = torch.rand(1, 3, 5, 8, 8) * 2 - 1
    keep = torch.zeros(1, 1, 8, 8)
    keep[..., :4, :] = 1
    erased = masked_video(video, keep)
    assert (erased[..., 4:, :] == 0.0).all() and torch.equal(erased[..., :4, :], video[..., :4, :])
    first = masked_video(video, keep, first_whole=True)
    assert torch.equal(first[:, :, 0], video[:, :, 0]) and torch.equal(first[:, :, 1:], erased[:, :, 1:])


def test_given_frames_are_counted_per_sample_whatever_the_mask_keeps() -> None:
    """A mouth mask keeps the corner of every frame: nothing is frozen by that."""
    given = given_frames((0, 2, 1), 4, torch.device("cpu"))
    assert given[:, 0, :, 0, 0].tolist() == [[False] * 4, [True, True, False, False], [True] + [False] * 3]
    keep = torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    mask = mask_channel(given, keep)
    assert mask.shape == (3, 1, 4, 2, 2)
    made, kept = [[0, 0], [0, 1]], [[0, 0], [0, 0]]
    assert mask[:, 0].tolist() == [[made] * 4, [kept, kept, made, made], [kept, made, made, made]]


@pytest.mark.parametrize(
    ("frames", "first", "expected"),
    [
        (100, 0, (17, 34)),  # behind the chunk
        (100, 66, (83, 100)),
        (100, 67, (83, 100)),  # not enough behind it: the last ones
        (34, 0, (17, 34)),
        (33, 0, (16, 33)),
        (17, 0, (0, 17)),
        (16, 0, (0, 13)),  # 4n + 1
        (1, 0, (0, 1)),
        (20, 400, (3, 20)),  # a chunk behind the source's end
    ],
)
def test_the_reference_sequence_lies_behind_its_chunk(
    frames: int, first: int, expected: tuple[int, int]
) -> None:
    assert reference_range(frames, first, 17) == expected
