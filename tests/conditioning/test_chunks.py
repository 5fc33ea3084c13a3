"""Chunk plans against a plain re-reading of spec/omniavatar.md f.4, and against properties."""

import math

import pytest

from avatarctl.conditioning.chunks import plan_chunks
from avatarctl.errors import UsageError
from avatarctl.timeline import frames_of_samples, reference_frames_of_samples


def published_padding(audio_frames: int, length: int, overlap: int) -> tuple[int, int]:
    """Padded audio frames and chunk count as the published script finds them (offset 1)."""
    first = length - 1
    if audio_frames < first:
        padded = first
    else:
        padded = audio_frames
        while (padded - first) % (length - overlap):
            padded += 1
    count = (padded - length + 1) // (length - overlap) + 1
    if count * (length - overlap) + overlap < padded:
        count += 1
    return padded, count


def fork_padding(audio_frames: int, length: int, overlap: int) -> tuple[int, int]:
    """The fork's variant (offset 0)."""
    padded = length
    while padded < audio_frames:
        padded += length - overlap
    return padded, 1 + math.ceil((padded - length) / (length - overlap))


@pytest.mark.parametrize(("length", "overlap"), [(5, 1), (9, 5), (33, 1), (57, 13), (105, 13), (17, 13)])
def test_padding_and_count_follow_the_spec(length: int, overlap: int) -> None:
    for audio_frames in range(1, 4 * length):
        for offset, rule in ((1, published_padding), (0, fork_padding)):
            plan = plan_chunks(audio_frames, length=length, overlap=overlap, offset=offset)
            assert (plan.padded_frames, plan.count) == rule(audio_frames, length, overlap)


@pytest.mark.parametrize("offset", [0, 1])
def test_every_video_frame_is_made_once_and_gets_its_own_audio(offset: int) -> None:
    plan = plan_chunks(200, length=33, overlap=5, offset=offset)
    frame = 0
    for span in plan.spans():
        assert span.start * 4 + span.keep_from == frame, "chunks do not join"
        # Video frame f gets audio frame f - offset: the first kept frame of the chunk says so.
        driving = span.audio[0] // 640 + span.keep_from
        assert driving == frame - offset
        assert (span.audio[1] - span.audio[0]) == 33 * 640
        frame += 33 - span.keep_from
    assert frame >= plan.video_frames == 200 + offset
    assert span.audio[1] == plan.padded_frames * 640


def test_frame_count_is_exact_and_the_reference_quirk_is_reproduced() -> None:
    assert [frames_of_samples(n) for n in (0, 1, 640, 641, 64_000)] == [0, 1, 1, 2, 100]
    quirks = [k for k in range(1, 20_001) if reference_frames_of_samples(640 * k) != k]
    assert quirks[:6] == [7, 14, 28, 55, 56, 109] and len(quirks) == 1148  # spec/omniavatar.md b.3
    assert all(reference_frames_of_samples(640 * k) == k + 1 for k in quirks)
    table = {640: 1, 641: 2, 4480: 8, 8960: 15, 16_000: 25, 35_200: 56, 92_800: 145, 97_600: 153}
    assert {n: reference_frames_of_samples(n) for n in table} == table


@pytest.mark.parametrize(
    ("length", "overlap", "offset"),
    [(32, 1, 0), (1, 1, 0), (33, 2, 0), (33, 33, 0), (33, 37, 1), (33, 0, 0), (33, 1, 2)],
)
def test_impossible_plans_are_refused(length: int, overlap: int, offset: int) -> None:
    with pytest.raises(UsageError):
        plan_chunks(100, length=length, overlap=overlap, offset=offset)
