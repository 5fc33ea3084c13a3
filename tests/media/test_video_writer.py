"""The growing MP4: what it holds when it is read back, while it grows and after a cut."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from avatarctl.media.video import LATENCY_FRAMES, VideoWriter
from tests.helpers_video import (
    AAC_PACKET,
    Track,
    count_frames,
    fragment_headers,
    frame_ends,
    moving,
    names,
    probe_video,
    read_audio,
    read_frames,
    tone,
)

RED, GREEN, BLUE, GREY = (220, 30, 20), (20, 200, 40), (30, 40, 210), (128, 128, 128)


# What is in the file


@pytest.mark.parametrize("fps", [25, Fraction(30000, 1001)])
def test_frames_size_rate_and_audio_length_come_back(tmp_path: Path, fps: int | Fraction) -> None:
    frames = 83
    seconds = float(frames / Fraction(fps))
    with VideoWriter(
        tmp_path / "a.mp4", width=64, height=48, fps=fps, soundtrack=tone(44100, 2, seconds)
    ) as writer:
        for chunk in (33, 33, 17):
            writer.write(moving(chunk))
    facts = probe_video(tmp_path / "a.mp4")
    assert (facts.frames, facts.width, facts.height, facts.fps) == (frames, 64, 48, fps)
    assert all(abs(at - index / Fraction(fps)) < 1e-4 for index, at in enumerate(facts.frame_times))
    assert (facts.audio_rate, facts.audio_channels, facts.audio_start) == (44100, 2, 0.0)
    assert abs(facts.audio_seconds - seconds) <= AAC_PACKET / 44100
    assert facts.steady
    assert names(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize(
    ("rate", "channels", "kept"),
    [
        (16000, 1, (16000, 1)),
        (44100, 2, (44100, 2)),
        (48000, 6, (48000, 6)),
        (48000, 8, (48000, 8)),
        (22050, 1, (22050, 1)),
        (8000, 4, (8000, 4)),
        (48000, 7, (48000, 2)),
        (48000, 12, (48000, 2)),
        (192000, 2, (96000, 2)),
        (6000, 1, (7350, 1)),
    ],
)
def test_audio_is_where_it_was_put_to_the_millisecond(
    tmp_path: Path, rate: int, channels: int, kept: tuple[int, int]
) -> None:
    """Noise bursts after 40 ms of silence, at the beginning, in the middle and near the end."""
    length, delay = 3 * rate, rate // 25
    audio = np.zeros((length + delay, channels))
    burst = np.random.default_rng(0).normal(size=(rate // 20, 1)) * 0.2
    burst = np.convolve(burst[:, 0], np.ones(4) / 4, "same")[:, None]  # AAC is not asked for the top octave
    for second in (0.0, 1.3, 2.7):
        begin = delay + int(second * rate)
        audio[begin : begin + len(burst)] = burst
    with VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=Track(audio, rate, 777)) as writer:
        for chunk in (33, 33, 10):
            writer.write(moving(chunk))
        notices = writer.notices
    decoded, decoded_rate = read_audio(tmp_path / "a.mp4")
    assert (decoded_rate, decoded.shape[1]) == kept
    assert len(notices) == (kept != (rate, channels))
    assert probe_video(tmp_path / "a.mp4").steady
    grid = np.arange(length + delay) / rate
    at = np.arange(len(decoded)) / decoded_rate
    for second in (0.0, 1.3, 2.7):
        window = (max(0.0, second - 0.1), second + 0.25)
        inside = (at >= window[0]) & (at < window[1])
        put = np.interp(at[inside], grid, audio[:, 0])
        size = 2 * len(put)
        product = np.fft.rfft(decoded[inside, 0], size) * np.fft.rfft(put, size).conj()
        lag = int(np.argmax(np.abs(np.fft.irfft(product, size))))
        shift = (lag - size if lag > size // 2 else lag) / decoded_rate
        assert abs(shift) <= 0.001, f"burst at {second} s is {shift * 1000:.2f} ms late"


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 8])
def test_every_channel_stays_itself(tmp_path: Path, channels: int) -> None:
    """Each channel has a tone of its own below 100 Hz, which the bass channel can carry too."""
    times = np.arange(96000) / 48000
    pitches = [30 + 10 * channel for channel in range(channels)]
    audio = np.stack([0.4 * np.sin(2 * np.pi * pitch * times) for pitch in pitches], axis=1)
    with VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=Track(audio, 48000)) as writer:
        writer.write(moving(50))
    decoded = read_audio(tmp_path / "a.mp4")[0][:96000]
    spectrum = np.abs(np.fft.rfft(decoded * np.hanning(len(decoded))[:, None], axis=0))
    assert [round(peak / 2) for peak in spectrum.argmax(axis=0)] == pitches


def test_loud_samples_are_clipped_and_no_numbers_are_muted(tmp_path: Path) -> None:
    track = tone(16000, 1, 1.0)
    track.samples *= 20
    track.samples[100:200] = np.nan
    with VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=track) as writer:
        writer.write(moving(25))
        assert len(writer.notices) == 1 and "no numbers" in writer.notices[0]
    decoded = read_audio(tmp_path / "a.mp4")[0]
    assert (
        0.8 < np.abs(decoded[4000:12000]).max() < 1.6
    )  # AAC overshoots square waves a little; 6 would be unclipped


def test_audio_longer_than_the_video_is_cut_and_pulled_no_further(tmp_path: Path) -> None:
    track = tone(16000, 1, 60.0)
    with VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=track) as writer:
        writer.write(moving(10))
        assert track.pulled <= 10 * 640 + track.block
        writer.write(moving(15))
    assert track.pulled <= 25 * 640 + track.block
    assert track.closed
    assert abs(probe_video(tmp_path / "a.mp4").audio_seconds - 1.0) <= AAC_PACKET / 16000


def test_audio_shorter_than_the_video_keeps_its_length_and_delays_no_frame(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=tone(48000, 2, 0.5))
    writer.write(moving(300))
    assert count_frames(writer.partial_path) >= 300 - LATENCY_FRAMES
    facts = probe_video(writer.finish())
    assert facts.frames == 300 and facts.steady
    assert abs(facts.audio_seconds - 0.5) <= AAC_PACKET / 48000


@pytest.mark.parametrize("track", [None, Track(np.zeros((0, 2)), 48000)], ids=["none", "empty"])
def test_without_audio(tmp_path: Path, track: Track | None) -> None:
    with VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=track) as writer:
        writer.write(moving(30))
        assert len(writer.notices) == (track is not None)
    facts = probe_video(tmp_path / "a.mp4")
    assert (facts.frames, facts.audio_rate, facts.steady) == (30, 0, True)


def test_odd_sizes_repeat_the_last_column_and_row(tmp_path: Path) -> None:
    frames = np.full((12, 33, 47, 3), GREY, np.uint8)
    frames[:, -3:, :] = RED
    frames[:, :, -3:] = BLUE
    with VideoWriter(tmp_path / "a.mp4", width=47, height=33, soundtrack=None, crf=1) as writer:
        writer.write(frames)
    back = read_frames(tmp_path / "a.mp4")
    assert back.shape == (12, 34, 48, 3)
    assert np.abs(back[:, :, 47].astype(int) - BLUE).max() <= 12
    assert np.abs(back[:, 33, :40].astype(int) - RED).max() <= 12
    assert np.abs(back[:, :28, :40].astype(int) - GREY).max() <= 12  # not rescaled


def test_one_pixel(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", width=1, height=1, soundtrack=None) as writer:
        writer.write(np.full((1, 1, 1, 3), GREEN, np.uint8))
    facts = probe_video(tmp_path / "a.mp4")
    assert (facts.frames, facts.width, facts.height) == (1, 2, 2)


@pytest.mark.parametrize(
    "colour", [RED, GREEN, BLUE, GREY, (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 255)]
)
def test_colours_are_bt709_and_say_so(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    with VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=None) as writer:
        writer.write(np.full((9, 48, 64, 3), colour, np.uint8))
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
    assert tags == (1, 1, 1, 1)  # BT.709 three times, limited range
    assert np.abs(read_frames(tmp_path / "a.mp4").astype(int) - colour).max() <= 4


def test_tags_are_written(tmp_path: Path) -> None:
    with VideoWriter(
        tmp_path / "a.mp4", width=64, height=48, soundtrack=None, metadata={"comment": "größer", "title": "t"}
    ) as writer:
        writer.write(moving(3))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"] == "größer"
        assert container.metadata["title"] == "t"


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        with VideoWriter(tmp_path / name, width=64, height=48, soundtrack=tone(16000, 1, 1)) as writer:
            writer.write(moving(25))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


# While it grows, and after a cut


@pytest.mark.parametrize("rate", [0, 16000, 48000])
def test_it_plays_while_it_grows(tmp_path: Path, rate: int) -> None:
    track = tone(rate, 1, 20.0) if rate else None
    writer = VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=track)
    for chunk in range(1, 5):
        writer.write(moving(33))
        copy = tmp_path / "copy.mp4"
        copy.write_bytes(writer.partial_path.read_bytes())
        assert 33 * chunk - LATENCY_FRAMES <= count_frames(copy) <= 33 * chunk == writer.frames_written
        if rate:
            assert probe_video(copy).audio_seconds >= (33 * chunk - LATENCY_FRAMES) / 25 - AAC_PACKET / rate
        assert not (tmp_path / "a.mp4").exists()
    assert probe_video(writer.finish()).frames == 132


@pytest.mark.parametrize("rate", [0, 16000, 48000])
def test_every_complete_frame_before_a_cut_is_readable(tmp_path: Path, rate: int) -> None:
    cut, track = tmp_path / "cut.mp4", tone(rate, 1, 3.0) if rate else None
    writer = VideoWriter(tmp_path / "a.mp4", width=64, height=48, soundtrack=track)
    writer.write(moving(60))
    path = writer.abandon()  # all frames, and not yet an ordinary MP4
    assert path is not None
    data, ends = path.read_bytes(), frame_ends(path)
    headers = fragment_headers(data)
    assert len(ends) == 60 and ends == sorted(ends) and len(headers) >= 60 // 8
    chosen = np.random.default_rng(5).integers(0, len(data), 50).tolist()
    chosen += [inside for header in headers[3:7] for inside in header[::9]]
    by_path = 0
    for end in (*chosen, *ends[:3], *(end - 1 for end in ends[:3]), *ends[-2:], len(data) - 1):
        cut.write_bytes(data[:end])
        complete = sum(frame <= end for frame in ends)
        assert count_frames(cut, forward=True) >= complete, f"cut at byte {end} of {len(data)}"
        if not any(end in header for header in headers):
            by_path += 1
            assert count_frames(cut) >= complete, f"cut at byte {end} of {len(data)}, opened by its path"
    assert by_path > 30


def test_no_system_call_ends_inside_a_fragment_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill can leave, given that it does not split a system call."""
    ends, write = [0], os.write

    def counted(descriptor: int, data: bytes) -> int:
        ends.append(ends[-1] + len(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", counted)
    writer = VideoWriter(tmp_path / "a.mp4", width=640, height=480, soundtrack=tone(16000, 1, 1.0), crf=1)
    writer.write(np.random.default_rng(0).integers(0, 256, (10, 480, 640, 3), dtype=np.uint8))
    assert writer.abandon() == tmp_path / "a.partial.mp4"
    data = (tmp_path / "a.partial.mp4").read_bytes()
    assert ends[-1] == len(data) > 1_000_000
    assert not [end for end in ends for header in fragment_headers(data) if end in header]
