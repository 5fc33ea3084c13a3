"""Chunks in front of a network and behind it, against torch's transforms and the published way in full."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from avatarctl.errors import PathNotFound, UnusableWeights
from avatarctl.perception import mdx_net
from avatarctl.perception.mdx_net import CHUNK, RATE, STEP, TRIM, MdxNetwork, overlapped, stereo_signal
from tests.perception.onnx_file import FLOAT16, write_onnx
from tests.repeats import repeats

Samples = NDArray[np.float32]


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> MdxNetwork:
    pytest.importorskip("onnxruntime", reason="the extra `separate` is not installed")
    return MdxNetwork(write_onnx(tmp_path_factory.mktemp("onnx") / "identity.onnx"))


class Bent:
    """A network that is not linear, so that levels and places of chunks can be seen; quick."""

    def vocals(self, chunk: Samples) -> Samples:
        assert chunk.shape == (CHUNK, 2) and chunk.dtype == np.float32
        return np.tanh(2 * chunk) * np.linspace(0.5, 1.0, CHUNK, dtype=np.float32)[:, None]


def pieces(whole: Samples, size: int) -> Iterator[Samples]:
    return (whole[first : first + size] for first in range(0, len(whole), size))


def together(blocks: Iterator[Samples]) -> Samples:
    return np.concatenate([np.zeros((0, 2), np.float32), *blocks])


def tones(length: int) -> Samples:
    """From 60 Hz to 17 kHz, between soft ends: a hard end has all frequencies. One channel turned over."""
    time = np.arange(length) / RATE
    mix = sum(0.15 * np.sin(2 * np.pi * f * time + f) for f in (60, 443, 1999, 8000, 13500, 17000))
    ramp = np.sin(np.linspace(0, np.pi / 2, min(16_000, length // 2))) ** 2
    mix[: len(ramp)] *= ramp
    mix[length - len(ramp) :] *= ramp[::-1]
    return np.stack([mix, -0.5 * mix], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    "length",
    repeats(
        [STEP - TRIM, STEP - TRIM + 1, CHUNK - TRIM, CHUNK - TRIM + 1, STEP + CHUNK - TRIM + 1],
        [CHUNK - 2 * TRIM, CHUNK - TRIM - 1, CHUNK],
    ),
)
def test_a_network_that_changes_nothing_changes_nothing(identity: MdxNetwork, length: int) -> None:
    mix = tones(length)
    given = together(overlapped(pieces(mix, 32_768), identity, float(np.abs(mix).max())))
    assert given.shape == mix.shape and given.dtype == np.float32
    assert np.abs(given - mix).max() < 1e-4


@pytest.mark.parametrize("length", [0, 1, 2, TRIM - 1, TRIM + 1])
def test_audio_shorter_than_a_window(identity: MdxNetwork, length: int) -> None:
    """It cannot be free of what the network is not shown, but it is as long, finite and no louder."""
    mix = np.full((length, 2), 0.5, np.float32)
    with np.errstate(all="raise"):
        given = together(overlapped(pieces(mix, 1000), identity, 0.5))
    assert given.shape == mix.shape
    assert np.isfinite(given).all() and np.abs(given).max(initial=0) < 0.6


def test_spectra_are_torchs(identity: MdxNetwork) -> None:
    """Periodic Hann, hop 1024, centred and reflected; three bands muted, those above 17.6 kHz silent."""
    noise = np.random.default_rng(0).standard_normal((CHUNK, 2)).astype(np.float32)
    window = torch.hann_window(7680, dtype=torch.float64)
    stft = {"n_fft": 7680, "hop_length": 1024, "window": window, "center": True}
    signal = torch.from_numpy(noise.T).double()
    spectra = torch.stft(signal, pad_mode="reflect", return_complex=True, **stft)  # type: ignore[arg-type]
    assert spectra.shape == (2, 3841, 256)
    spectra[:, :3] = spectra[:, 3072:] = 0
    expected = torch.istft(spectra, length=CHUNK, **stft)  # type: ignore[arg-type]
    np.testing.assert_allclose(identity.vocals(noise), expected.numpy().T, atol=2e-5)


def published(mix: Samples, network: Bent, peak: float) -> NDArray[np.float64]:
    """All in memory, as the published tool does it: zeros to whole chunks, each weighted by Hann."""
    scale = 0.9 / peak
    useful = CHUNK - 2 * TRIM
    behind = useful + TRIM - len(mix) % useful
    padded = np.concatenate([np.zeros((TRIM, 2)), mix * scale, np.zeros((behind, 2))])
    summed, weights = np.zeros_like(padded), np.zeros_like(padded)
    for first in range(0, len(padded), STEP):
        chunk = padded[first : first + CHUNK]
        whole = np.concatenate([chunk, np.zeros((CHUNK - len(chunk), 2))]).astype(np.float32)
        window = np.hanning(len(chunk))[:, None]
        summed[first : first + CHUNK] += network.vocals(whole)[: len(chunk)] * window
        weights[first : first + CHUNK] += window
    cut = slice(TRIM, TRIM + len(mix))
    return summed[cut] / weights[cut] / scale


@pytest.mark.parametrize(
    "length", [1, 5000, STEP - TRIM, STEP - TRIM + 1, CHUNK - 2 * TRIM, CHUNK + 1, 3 * CHUNK]
)
@pytest.mark.parametrize("size", [4096, 10**9])
def test_chunks_lie_where_the_published_tool_has_them(length: int, size: int) -> None:
    mix = np.random.default_rng(length).uniform(-0.3, 0.3, (length, 2)).astype(np.float32)
    given = together(overlapped(pieces(mix, size), Bent(), 0.3))
    np.testing.assert_allclose(given, published(mix, Bent(), 0.3), atol=1e-6)


def test_memory_does_not_depend_on_the_length() -> None:
    def peak(chunks: int) -> int:
        block = np.full((32_768, 2), 0.1, np.float32)
        tracemalloc.start()
        try:
            for _ in overlapped((block for _ in range(chunks * CHUNK // len(block))), Bent(), 0.1):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(20) < 1.02 * peak(3)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_audio_as_stereo_at_44100(channels: int) -> None:
    """Two channels keep their sides, others become their mean on both."""
    rate, seconds = 48_000, 0.5
    time = np.arange(int(rate * seconds)) / rate
    wave = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    sides = np.linspace(0.1, 0.9, channels, dtype=np.float32)
    given = together(stereo_signal(pieces(wave[:, None] * sides, 7777), rate))
    assert given.shape == (int(RATE * seconds), 2)
    expected = np.sin(2 * np.pi * 440 * np.arange(len(given)) / RATE)[:, None]
    levels = sides if channels == 2 else np.full(2, sides.mean())
    inner = slice(500, -500)
    np.testing.assert_allclose(given[inner], (expected * levels)[inner], atol=1e-3)


def text(path: Path) -> Path:
    path.write_text("this is no network\n" * 50, encoding="utf-8")
    return path


def cut(path: Path) -> Path:
    whole = write_onnx(path).read_bytes()
    path.write_bytes(whole[:-20])
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (text, "no ONNX file that can be run"),
        (cut, "no ONNX file that can be run"),
        (folder, "is a directory"),
        (lambda path: write_onnx(path, shape=(1, 4, 2048, 256)), "another network than Kim_Vocal_2"),
        (lambda path: write_onnx(path, shape=(1, 3, 224, 224)), "another network than Kim_Vocal_2"),
        (lambda path: write_onnx(path, shape=(4, 4, 3072, 256)), "another network than Kim_Vocal_2"),
        (
            lambda path: write_onnx(path, shape=("batch", 4, 2048, "frames")),
            "another network than Kim_Vocal_2",
        ),
        (lambda path: write_onnx(path, shape=(1, 3072, 256)), "another network than Kim_Vocal_2"),
        (lambda path: write_onnx(path, kind=FLOAT16), r"tensor\(float16\)"),
        (lambda path: write_onnx(path, "NoSuchOperation"), "NoSuchOperation"),
    ],
)
def test_what_is_not_the_network(make: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `separate` is not installed")
    path = make(tmp_path / "net.onnx")
    with pytest.raises(UnusableWeights, match=said) as refused:
        MdxNetwork(path)
    assert str(refused.value).startswith(str(path)) and len(str(refused.value)) < 400
    with pytest.raises(PathNotFound):
        MdxNetwork(tmp_path / "absent.onnx")


def test_sizes_that_are_names(tmp_path: Path) -> None:
    """An export that leaves its sizes open runs."""
    pytest.importorskip("onnxruntime", reason="the extra `separate` is not installed")
    network = MdxNetwork(write_onnx(tmp_path / "open.onnx", shape=("a", "b", "c", "d")))
    tone = np.repeat(np.sin(np.arange(CHUNK) * 0.1)[:, None], 2, axis=1).astype(np.float32)
    inner = slice(20_000, -20_000)
    np.testing.assert_allclose(network.vocals(tone)[inner], tone[inner], atol=1e-4)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    """The logarithm of a spectrum, which has negative parts: NaN is refused, never written."""
    pytest.importorskip("onnxruntime", reason="the extra `separate` is not installed")
    network = MdxNetwork(write_onnx(tmp_path / "log.onnx", "Log"))
    with pytest.raises(UnusableWeights, match="not finite"):
        network.vocals(np.random.default_rng(0).standard_normal((CHUNK, 2)).astype(np.float32))


def test_constants_of_the_published_network() -> None:
    assert (CHUNK, TRIM, STEP, mdx_net.COMPENSATE) == (261_120, 3840, 195_840, 1.009)
