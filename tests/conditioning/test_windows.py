"""Windows cover every frame of the audio, with the audio that they show."""

from __future__ import annotations

from itertools import pairwise

import pytest

from avatarctl.conditioning.windows import WindowPlan, blend_weights, plan_windows
from avatarctl.errors import UsageError
from avatarctl.timeline import pixel_frames

OVERLAPS = (0, 2, 5, 10, 20)  # latent frames
FRAME = 640


def pixels_of(overlap: int) -> int:
    return pixel_frames(overlap) if overlap else 0


def plan(samples: int, overlap: int, length: int = 81, *, published: bool = False) -> WindowPlan:
    return plan_windows(samples, length=length, overlap=pixels_of(overlap), published=published)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_whole_windows_cover_every_frame_once_or_overlapping(overlap: int) -> None:
    for frames in range(1, 401):
        for samples in (frames * FRAME, frames * FRAME - 639):
            found = plan(samples, overlap)
            spans = list(found.spans())
            assert found.video_frames == frames and len(spans) == found.count
            assert found.latent_frames == max(-(-(frames - 1) // 4) + 1, 2)
            assert pixel_frames(found.latent_frames) >= frames
            assert [span.index for span in spans] == list(range(found.count))
            assert spans[0].start == 0 and spans[-1].start + spans[-1].frames == found.latent_frames
            # One length for all, so that batches, caches and shards agree.
            assert {span.frames for span in spans} == {min(21, found.latent_frames)}
            for before, after in pairwise(spans):
                shared = before.start + before.frames - after.start
                assert after.start > before.start
                assert shared >= overlap and (shared == overlap or after is spans[-1])


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_whole_windows_get_exactly_what_they_show(overlap: int) -> None:
    for frames in range(1, 401):
        for span in plan(frames * FRAME, overlap).spans():
            # Latent 0 of a video is one pixel frame, and every later one four.
            assert span.audio[0] == 4 * span.start * FRAME
            assert span.audio[1] - span.audio[0] == pixel_frames(span.frames) * FRAME
            assert span.audio[0] < frames * FRAME, "a window that gets no audio of the recording"


def test_the_published_plan() -> None:
    """The worked example of spec/stableavatar.md e.1."""
    found = plan(116_617, 10, published=True)
    assert [(span.start, span.start + span.frames, *span.audio) for span in found.spans()] == [
        (0, 21, 0, 53_760),
        (11, 32, 28_160, 81_920),
        (22, 43, 56_320, 110_080),
        (33, 46, 84_480, 116_617),
    ]
    assert (found.latent_frames, found.video_frames) == (46, 181)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_published_windows_end_and_leave_no_frame_out(overlap: int) -> None:
    """Where the published loop gives nothing or never ends (up to 84 frames) as well."""
    for frames in range(1, 401):
        found = plan(frames * FRAME + 137, overlap, published=True)
        spans = list(found.spans())
        assert found.latent_frames == (frames - 1) // 4 + 1
        assert found.count == (1 if found.latent_frames <= 21 else len(spans)) == len(spans)
        assert spans[-1].start + spans[-1].frames == found.latent_frames
        assert spans[-1].audio[1] == frames * FRAME + 137
        for before, after in pairwise(spans):
            assert before.start + before.frames - after.start == overlap
            assert before.frames == 21 and before.audio[1] - before.audio[0] == 84 * FRAME


@pytest.mark.parametrize(
    ("length", "overlap", "says"),
    [
        (81, 1, "one latent frame"),
        (81, 81, "does not fit windows of 81"),
        (81, 85, "does not fit windows of 81"),
        (81, 36, "does not fit windows of 81"),
        (5, 5, "does not fit windows of 5"),
        (80, 37, "cannot be coded"),
        (1, 0, "cannot be coded"),
    ],
)
def test_refused(length: int, overlap: int, says: str) -> None:
    for published in (False, True):
        with pytest.raises(UsageError, match=says):
            plan_windows(100_000, length=length, overlap=overlap, published=published)


@pytest.mark.parametrize("frames", [2, 3, 10, 20])
def test_blend_weights_go_from_the_earlier_window_to_the_later(frames: int) -> None:
    uniform, log = blend_weights(frames, "uniform"), blend_weights(frames, "log")
    for weights in (uniform, log):
        assert len(weights) == frames and list(weights) == sorted(set(weights))
        assert weights[0] == 0 and weights[-1] == pytest.approx(1, abs=1e-15)
    assert uniform[1] == pytest.approx(1 / (frames - 1))
    assert all(fast > slow for fast, slow in zip(log[1:-1], uniform[1:-1], strict=True))


def test_log_weights_of_the_specification() -> None:
    assert blend_weights(4, "log") == pytest.approx((0.0, 0.4528324, 0.7633825, 1.0), abs=1e-7)


def test_one_frame_cannot_be_blended() -> None:
    with pytest.raises(ValueError, match="too few"):
        blend_weights(1, "uniform")
