"""Sound with many channels in a container."""

from pathlib import Path

import av
import numpy as np
import pytest

from avatarctl.media import open_sound


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
    sound = open_sound(path)
    heard = np.concatenate(list(sound.blocks()))
    assert heard.shape[1] == sound.channels == channels
    loud = np.sqrt((heard[8_000:40_000] ** 2).mean(0))
    loud = np.delete(loud, 3)  # the low-frequency channel does not carry 440 Hz
    assert loud.min() > 0.02, "a channel is missing"
    assert (np.diff(loud) > 0).all(), "channels are mixed up"
