"""Audio with many channels in a container."""

from pathlib import Path

import av
import numpy as np
import pytest

from avatarctl.errors import UnusableAudio
from avatarctl.media import open_audio, survey, write_audio


@pytest.mark.parametrize("channels", [6, 8])
def test_surround_in_a_container_is_read_to_the_last_channel(tmp_path: Path, channels: int) -> None:
    """Eight planar channels crash PyAV's own conversion: the process would die, not raise."""
    layout = {6: "5.1", 8: "7.1"}[channels]
    path = tmp_path / "surround.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48_000, layout=layout)
        tones = (
            np.sin(np.arange(48_000) * 2 * np.pi * 440 / 48_000)[None]
            * np.linspace(0.1, 0.5, channels)[:, None]
        )
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(tones.T.astype(np.float32)).reshape(1, -1), format="flt", layout=layout
        )
        frame.sample_rate = 48_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    audio = open_audio(path)
    decoded = np.concatenate(list(audio.blocks()))
    assert decoded.shape[1] == audio.channels == channels
    loud = np.sqrt((decoded[8_000:40_000] ** 2).mean(0))
    loud = np.delete(loud, 3)  # the low-frequency channel does not carry 440 Hz
    assert loud.min() > 0.02, "a channel is missing"
    assert (np.diff(loud) > 0).all(), "channels are mixed up"


@pytest.mark.parametrize("samples", [3_000, None])
def test_a_audio_that_changes_between_two_passes_is_refused(tmp_path: Path, samples: int | None) -> None:
    path = tmp_path / "a.wav"
    write_audio(path, np.zeros(16_000, np.float32), 16_000)
    audio = open_audio(path)
    assert sum(len(block) for block in audio.blocks()) == 16_000
    path.unlink()
    if samples is not None:
        write_audio(path, np.zeros(samples, np.float32), 16_000)
    says = r"changed while|cannot be read any more"
    with pytest.raises(UnusableAudio, match=says):
        list(audio.blocks())
    with pytest.raises(UnusableAudio, match=says):
        audio.sha256()


def test_audio_that_starts_late_in_its_container_is_whole_and_said(tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 24_000  # 1.5 s late
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    decoded = survey(open_audio(path))
    assert decoded.samples == 16_000
    assert not any("cut short" in text for text in decoded.warnings), decoded.warnings
