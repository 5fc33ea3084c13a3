"""Levels that separation goes by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from avatarctl.cli import app
from avatarctl.data.mixes import Mix
from avatarctl.data.separate import Separation
from avatarctl.events import Notice
from avatarctl.media.audio_readers import Samples
from avatarctl.perception.separation import SpectralGate, Unchanged
from tests.perception.onnx_file import write_onnx


class Told(SpectralGate):
    """Gives the mix back, and keeps what it was told."""

    peak = 0.0

    def speech(self, mix: Iterable[Samples], rate: int, peak: float) -> Iterator[Samples]:
        self.peak = peak
        return iter(mix)


@pytest.mark.parametrize(("channels", "expected"), [(1, 0.9), (2, 0.9), (6, 0.15)])
def test_the_peak_is_that_of_what_is_separated(channels: int, expected: float, tmp_path: Path) -> None:
    """With six channels that is their mean: speech in one of them alone is a sixth as loud in it, and a
    network is to get it at 0.9."""
    wave = np.zeros((8000, channels))
    wave[100:7000, channels // 2] = 0.9 * np.sin(np.arange(6900) / 3)
    soundfile.write(tmp_path / "mix.wav", wave, 16_000, "FLOAT")
    told = Told()
    mix = Mix("mix", tmp_path / "mix.wav", tmp_path / "vocal.wav")
    (done,) = Separation(told, lambda event: None, lambda: False).run([mix])
    assert done.state == "done" and told.peak == pytest.approx(expected, rel=1e-3)


class Share(SpectralGate):
    """Calls so much of the mix speech, some blocks late."""

    def __init__(self, share: float) -> None:
        self.share = share

    def speech(self, mix: Iterable[Samples], rate: int, peak: float) -> Iterator[Samples]:
        held = list(mix)
        yield np.concatenate(held)[:777] * np.float32(self.share)
        yield np.concatenate(held)[777:] * np.float32(self.share)


@pytest.mark.parametrize(("share", "hardly_any"), [(0.92, True), (0.88, False), (1.0, True), (0.0, False)])
def test_hardly_any_music_is_said(share: float, hardly_any: bool, tmp_path: Path) -> None:
    """-20 dB of energy is a tenth of the amplitude."""
    soundfile.write(tmp_path / "mix.wav", 0.5 * np.sin(np.arange(40_000) / 3), 16_000)
    mix, said = Mix("mix", tmp_path / "mix.wav", tmp_path / "vocal.wav"), list[Any]()
    work = Separation(Share(share), said.append, lambda: False)
    (done,) = work.run([mix])
    lines = [each.text for each in said if isinstance(each, Notice)]
    assert any("hardly any music: --backend none" in line for line in lines) == hardly_any
    (again,) = work.run([mix])
    assert again.state == "skipped" and again.seconds == done.seconds == 2.5


def test_nothing_is_said_of_silence_or_of_all_of_the_audio(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(tmp_path / "mix.wav", 0.5 * np.sin(np.arange(16_000) / 3), 16_000)
    for name, separator in (("silent", SpectralGate()), ("mix", Unchanged())):
        said = list[Any]()
        mix = Mix(name, tmp_path / f"{name}.wav", tmp_path / f"{name}.vocal.wav")
        Separation(separator, said.append, lambda: False).run([mix])
        assert not any("hardly" in each.text for each in said if isinstance(each, Notice))


def test_another_network_is_doubted_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `separate` is not installed")
    soundfile.write(tmp_path / "mix.wav", 0.5 * np.sin(np.arange(16_000) / 3), 16_000)
    network = write_onnx(tmp_path / "net.onnx")
    words = ["separate", str(tmp_path / "mix.wav"), "--out", str(tmp_path / "o.wav")]
    words += ["--weights", f"mdx={network}"]
    doubt = f"{network}: is not the published Kim_Vocal_2.onnx"
    made, again = (CliRunner().invoke(app, words) for _ in range(2))
    assert made.exit_code == again.exit_code == 0
    assert doubt in made.stderr and "published" not in again.stderr  # which makes nothing
    own = hashlib.sha256(network.read_bytes()).hexdigest()
    monkeypatch.setattr("avatarctl.perception.separation.PUBLISHED", own)
    assert "published" not in CliRunner().invoke(app, [*words, "--overwrite"]).stderr
