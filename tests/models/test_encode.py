"""Windows of audio features: exact where one piece suffices, continuous and bounded beyond."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from avatarctl.loading.built_in import build_random_modules
from avatarctl.models.encode import AudioFeatures, pieces
from avatarctl.registry import find_model


class Wave:
    """A recording of noise that counts the longest slice asked for."""

    def __init__(self, samples: int) -> None:
        self.data = np.random.default_rng(0).standard_normal(samples).astype(np.float32) * 0.1 + 0.02
        self.longest = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        self.longest = max(self.longest, stop - start)
        out = np.zeros(stop - start, np.float32)
        got = self.data[start:stop]
        out[: len(got)] = got
        return out


@pytest.fixture(scope="module")
def encoder():
    return build_random_modules(find_model("cartoon-i2v")).audio.eval()


def features_of(encoder, wave: Wave, frames: int, window: float | None) -> AudioFeatures:
    return AudioFeatures(
        encoder,
        wave,
        samples=len(wave.data),
        mean=float(wave.data.mean()),
        variance=float(wave.data.var()),
        frames=frames,
        window_seconds=window,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(("frames", "window"), [(100, 150), (400, 150), (401, 150), (250, 150), (151, 150)])
def test_pieces_tile_the_recording_with_context(frames: int, window: int) -> None:
    cut = pieces(frames, window, 50)
    assert [p.keep for p in cut] == [0, *(p.keep_stop for p in cut[:-1])] and cut[-1].keep_stop == frames
    assert all(p.start <= p.keep < p.keep_stop <= p.stop <= frames for p in cut)
    assert all(p.stop - p.start == min(window, frames) for p in cut[:-1])
    assert all(b.start == a.stop - 50 for a, b in pairwise(cut)), "2 s are shared"
    for piece in cut:
        assert piece.start == 0 or piece.keep - piece.start >= 25, "less than a second of context in front"
        assert piece.stop == frames or piece.stop - piece.keep_stop >= 25, "or behind"


def test_one_piece_equals_the_encoder_on_the_whole(encoder) -> None:
    wave = Wave(640 * 60 + 13)
    features = features_of(encoder, wave, 64, 30)
    x = torch.zeros(1, 64 * 640)
    x[0, : len(wave.data)] = torch.from_numpy(
        (wave.data - wave.data.mean()) / np.sqrt(wave.data.var() + 1e-7)
    )
    expected = encoder.features(x, 64)
    got = torch.cat([features.rows(a, b) for a, b in ((0, 20), (19, 40), (33, 64))], dim=1)
    torch.testing.assert_close(got[:, :20], expected[:, :20], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[:, -31:], expected[:, -31:], atol=1e-5, rtol=0)


def test_frames_before_the_recording_are_zero_rows(encoder) -> None:
    rows = features_of(encoder, Wave(6400), 20, 30).rows(-1, 5)
    assert rows.shape == (1, 6, encoder.width)
    assert (rows[:, 0] == 0).all() and (rows[:, 1] != 0).any()


def test_long_recordings_are_read_in_windows_and_stay_near_the_whole(encoder) -> None:
    wave = Wave(640 * 500)
    wave.data[: 640 * 200] *= 0.05  # a quiet half: moments of a window are not those of the recording
    whole = features_of(encoder, wave, 500, None).rows(0, 500)
    wave.longest = 0
    windowed = features_of(encoder, wave, 500, 6)
    got = torch.cat([windowed.rows(start, start + 20) for start in range(0, 500, 20)], dim=1)
    assert wave.longest <= 10 * 16_000 + 10, "more than a block of the recording was read at once"
    # Only attention across a window's edge is lost; the frame grid must not slip (a slip of one frame gives
    # more than 0.3), and normalising over windows instead of the recording would give more than 0.1.
    error = (got - whole).norm() / whole.norm()
    slipped = (got[:, 1:] - whole[:, :-1]).norm() / whole.norm()
    encoder_alone = encoder.features(windowed._normalised(0, 150 * 640), 150)
    unaided = (encoder_alone[:, :100] - whole[:, :100]).norm() / whole[:, :100].norm()
    assert error < 0.02 and slipped > 0.3 and unaided > 0.1
    with pytest.raises(ValueError, match="dropped"):
        windowed.rows(0, 5)


def test_rows_do_not_depend_on_how_they_are_asked_for(encoder) -> None:
    wave = Wave(640 * 300)
    one, other = features_of(encoder, wave, 300, 6), features_of(encoder, wave, 300, 6)
    straight = torch.cat([one.rows(a, a + 50) for a in range(0, 300, 50)], dim=1)
    overlapping = torch.cat([other.rows(max(0, a - 13), a + 25)[:, -25:] for a in range(0, 300, 25)], dim=1)
    assert torch.equal(straight, overlapping)
