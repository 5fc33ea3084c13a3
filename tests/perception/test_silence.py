"""Digital silence in a mix costs neither method anything, and changes nothing beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from avatarctl.perception import mdx_net
from avatarctl.perception.separation import _at_most_stereo
from avatarctl.perception.spectral_gate import gate
from tests.perception.mixes import mixed, voice


def gated(wave: np.ndarray) -> np.ndarray:
    blocks = wave.astype(np.float32)[:, None]
    pieces = (blocks[first : first + 20_000] for first in range(0, len(wave), 20_000))
    return np.concatenate(list(gate(pieces, 16_000)))[:, 0]


def test_the_gate_transforms_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = mixed(voice(0, 50), 16_000)
    mix = np.concatenate([spoken, np.zeros(10 * 16_000), spoken])
    nearly = gated(np.where(mix == 0, 1e-30, mix))
    counts = {"rfft": 0, "irfft": 0}
    for name in counts:
        real = getattr(np.fft, name)

        def counted(*words: Any, real: Any = real, name: str = name, **more: Any) -> Any:
            counts[name] += 1
            return real(*words, **more)

        monkeypatch.setattr(np.fft, name, counted)
    given = gated(mix)
    np.testing.assert_allclose(given, nearly, atol=1e-7)
    assert not given[len(spoken) + 2048 : -len(spoken) - 2048].any() and given.any()
    needed = 2 * len(spoken) / 2048  # groups of 8 frames of 256 samples
    assert needed <= counts["rfft"] <= needed + 8 and needed <= counts["irfft"] <= needed + 8


def test_the_network_is_not_asked_about_silence() -> None:
    """Also where it would answer with something else than silence."""

    class Talkative:
        asked = 0

        def vocals(self, chunk: np.ndarray) -> np.ndarray:
            self.asked += 1
            return chunk + 0.25

    network = Talkative()
    quiet = np.zeros((3 * mdx_net.CHUNK, 2), np.float32)
    assert not np.concatenate(list(mdx_net.overlapped(iter([quiet]), network, 0.0))).any()
    assert network.asked == 0
    quiet[0] = 0.5
    given = np.concatenate(list(mdx_net.overlapped(iter([quiet]), network, 0.5)))
    assert network.asked == 1 and given[0, 0] > 0 and not given[mdx_net.CHUNK :].any()


@pytest.mark.parametrize("peak", [1e-44, 3e-42, 1.1e-38, 1.2e-38, 1e-20])
def test_what_is_nearly_silent_reaches_the_network_as_numbers(peak: float) -> None:
    """Also where no float32 is large enough to bring it to full scale."""

    class Same:
        loudest = 0.0

        def vocals(self, chunk: np.ndarray) -> np.ndarray:
            self.loudest = max(self.loudest, float(np.abs(chunk).max()))
            return chunk

    network = Same()
    faint = np.full((1000, 2), peak, np.float32)
    given = np.concatenate(list(mdx_net.overlapped(iter([faint]), network, float(faint.max()))))
    assert np.isfinite(given).all() and float(np.abs(given).max()) <= 2 * float(faint.max())
    assert network.loudest == pytest.approx(0.9 if peak > 1.15e-38 else float(faint.max()), rel=1e-3)


def test_many_channels_become_their_mean() -> None:
    block = np.random.default_rng(0).uniform(-1, 1, (1000, 8)).astype(np.float32)
    (mono,) = _at_most_stereo([block])
    np.testing.assert_allclose(mono[:, 0], block.astype(np.float64).mean(1), atol=1e-7)
    (stereo,) = mdx_net.stereo_signal([block], mdx_net.RATE)
    assert np.array_equal(stereo, np.repeat(mono, 2, axis=1))
