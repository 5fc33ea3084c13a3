"""A finished video is an ordinary MP4: its tables, and what other programs make of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from avatarctl.media.finish import copy_packets
from avatarctl.media.video import VideoWriter
from tests.helpers_mp4 import Tables, order, read_tables
from tests.helpers_video import AAC_PACKET, Track, moving, probe_video, read_audio, tone

RATES = (8000, 16000, 22050, 24000, 32000, 44100, 48000)
LENGTHS = (1, 2, 30, 100)
FPS = 25
LATE = 0.002
"""Seconds by which flash and click may be apart."""


def flash_frame(frames: int) -> int:
    """At one second, or at 0 where the video is shorter."""
    return FPS if frames > FPS else 0


def clicks(frames: int, rate: int, channels: int) -> np.ndarray:
    """Silence, with a burst of 10 ms where the flash begins: `[samples, channels]`."""
    audio = np.zeros((frames * rate // FPS, channels), np.float32)
    begin = flash_frame(frames) * rate // FPS
    burst = np.random.default_rng(0).normal(size=(rate // 100, 1)) * 0.2
    audio[begin : begin + len(burst)] = burst
    return audio


Videos = Callable[[int, int, int], Path]


@pytest.fixture(scope="module")
def flash_and_click(tmp_path_factory: pytest.TempPathFactory) -> Videos:
    """The video of (frames, rate, channels), written once for all readers."""
    folder = tmp_path_factory.mktemp("finished")

    def video(frames: int, rate: int, channels: int) -> Path:
        path = folder / f"{frames}-{rate}-{channels}.mp4"
        if not path.exists():
            pixels = np.zeros((frames, 32, 32, 3), np.uint8)
            pixels[flash_frame(frames) :] = 255
            track = Track(clicks(frames, rate, channels), rate)
            with VideoWriter(path, width=32, height=32, soundtrack=track) as writer:
                writer.write(pixels)
        return path

    return video


def check_flash_and_click(luma: np.ndarray, audio: np.ndarray, frames: int, rate: int, reader: str) -> None:
    """luma: mean of each frame that was read, at a steady 25 fps; audio: `[samples, channels]`."""
    assert len(luma) == frames, reader
    flash = int(np.argmax(luma > 128)) / FPS
    source = clicks(frames, rate, 1)[:, 0]
    size = 2 * max(len(audio), len(source))
    for channel in audio.T:
        product = np.fft.rfft(channel, size) * np.fft.rfft(source, size).conj()
        lag = int(np.argmax(np.abs(np.fft.irfft(product, size))))
        click = flash_frame(frames) / FPS + (lag - size if lag > size // 2 else lag) / rate
        assert abs(click - flash) <= LATE, f"{reader}: flash at {flash:.3f} s, click at {click:.3f} s"
    assert 0 <= len(audio) - len(source) < AAC_PACKET, reader  # the last packet is decoded to its end


def check_tables(path: Path, frames: int, rate: int, *, samples: int, fps: Fraction = Fraction(FPS)) -> None:
    """What the file states of a video with `samples` of audio at `rate`, none with 0."""
    assert order(path) in (["ftyp", "moov", "mdat"], ["ftyp", "moov", "free", "mdat"])
    duration, (video, *rest) = read_tables(path)
    assert video.kind == "vide" and len(video.sizes) == len(video.deltas) == frames
    assert set(video.deltas) == {video.timescale / fps}
    assert video.media == frames / fps
    unit = Fraction(1, rest[0].timescale if rest else video.timescale)
    assert_shows(video, frames / fps, unit)
    sizes = sum(video.sizes)
    if samples:
        (audio,) = rest
        assert audio.kind == "soun" and audio.timescale == rate
        assert set(audio.deltas[:-1]) == {AAC_PACKET} and 0 < audio.deltas[-1] <= AAC_PACKET
        assert sum(audio.deltas) == AAC_PACKET + samples and len(audio.sizes) == len(audio.deltas)
        assert audio.media == Fraction(AAC_PACKET + samples, rate)
        assert_shows(audio, Fraction(samples, rate), unit, skips=Fraction(AAC_PACKET, rate))
        sizes += sum(audio.sizes)
    else:
        assert rest == []
    assert duration == max(track.shown for track in (video, *rest))
    assert sizes < path.stat().st_size < sizes + 3000 + 40 * (frames + samples // AAC_PACKET)


def assert_shows(track: Tables, seconds: Fraction, unit: Fraction, skips: Fraction = Fraction(0)) -> None:
    """One edit, from `skips` to the end; exact where the movie's unit of time divides it."""
    ((shown, begin),) = track.edits
    assert begin == skips
    for stated in (shown, track.shown):
        assert stated == seconds if seconds % unit == 0 else abs(stated - seconds) < unit


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", RATES)
def test_flash_and_click_coincide(rate: int, channels: int, flash_and_click: Videos) -> None:
    for frames in LENGTHS:
        path = flash_and_click(frames, rate, channels)
        check_tables(path, frames, rate, samples=frames * rate // FPS)
        with av.open(str(path)) as container:
            shown = [(frame.time, frame.to_ndarray()[:32].mean()) for frame in container.decode(video=0)]
        audio, decoded_rate = read_audio(path)
        assert (decoded_rate, audio.shape[1]) == (rate, channels)
        times, luma = np.array(shown).T
        assert np.allclose(times, np.arange(frames) / FPS)
        check_flash_and_click(luma, audio, frames, rate, "PyAV")


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg program on this machine")
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", RATES)
def test_the_ffmpeg_program_agrees_on_every_frame_and_sample(
    rate: int, channels: int, flash_and_click: Videos, tmp_path: Path
) -> None:
    """Any version of it; its defaults repeat frames that seem to be missing (`-vsync cfr`)."""
    paths = [flash_and_click(frames, rate, channels) for frames in LENGTHS]
    command = ["ffmpeg", "-v", "error", "-nostdin", *(word for path in paths for word in ("-i", path))]
    for index, frames in enumerate(LENGTHS):
        command += ["-map", f"{index}:v", "-f", "rawvideo", "-pix_fmt", "gray", tmp_path / f"{frames}.luma"]
        command += ["-map", f"{index}:a", "-f", "f32le", tmp_path / f"{frames}.pcm"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert told.stderr == ""
    for frames, path in zip(LENGTHS, paths, strict=True):
        luma = np.fromfile(tmp_path / f"{frames}.luma", np.uint8).reshape(-1, 32 * 32).mean(1)
        audio = np.fromfile(tmp_path / f"{frames}.pcm", np.float32).reshape(-1, channels)
        check_flash_and_click(luma, audio, frames, rate, "ffmpeg")
        ours, _ = read_audio(path)
        assert audio.shape == ours.shape and np.abs(audio - ours).max() < 1e-3


def test_opencv_counts_and_reads_the_same_frames(flash_and_click: Videos) -> None:
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed (the dev extra has it)")
    for frames in (*LENGTHS, 53):
        for rate in (8000, 16000, 48000):
            video = cv2.VideoCapture(str(flash_and_click(frames, rate, 1)))
            assert video.get(cv2.CAP_PROP_FRAME_COUNT) == frames and video.get(cv2.CAP_PROP_FPS) == FPS
            luma, times = [], []
            while (found := video.read())[0]:
                luma.append(found[1].mean())
                times.append(video.get(cv2.CAP_PROP_POS_MSEC))
            video.release()
            assert len(luma) == frames and int(np.argmax(np.array(luma) > 128)) == flash_frame(frames)
            assert np.allclose(times, np.arange(frames) * 1000 / FPS)


# The tables alone


def test_every_length_at_16_khz_is_stated_to_the_sample(tmp_path: Path) -> None:
    """400 growing files from the packets of one: what the coders give out for a length is its beginning."""
    writer = VideoWriter(tmp_path / "all.mp4", width=16, height=16, soundtrack=tone(16000, 1, 16.0))
    writer.write(moving(400, 16, 16))
    whole = writer.abandon()
    assert whole is not None
    growing, finished = tmp_path / "growing.mp4", tmp_path / "finished.mp4"
    with av.open(str(whole)) as source:
        packets = [packet for packet in source.demux() if packet.size]
        for frames in range(1, 401):
            begin_of(source, packets, growing, frames)
            copy_packets(growing, finished)
            check_tables(finished, frames, 16000, samples=640 * frames)


def begin_of(
    source: av.container.InputContainer, packets: list[av.Packet], path: Path, frames: int, times: int = 1
) -> None:
    """A growing file of the first `frames` frames and their audio, `times` one after another.

    Packets keep their times in `source`: they are moved for muxing and moved back.
    """
    units = {"video": 512, "audio": 640}  # a frame is 1/25 s: 512 of 12800, 640 of 16000
    options = {"movflags": "delay_moov+default_base_moof", "frag_duration": "320000"}
    with av.open(str(path), "w", format="mp4", container_options=options) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for turn in range(times):
            for packet in packets:
                unit = units[packet.stream.type]
                place, kept, stream = packet.pts, packet.duration, packet.stream
                if place < frames * unit and (turn == 0 or place >= 0):
                    packet.duration = min(kept, frames * unit - place)
                    packet.pts = packet.dts = place + turn * frames * unit
                    packet.stream = streams[packet.stream_index]
                    target.mux(packet)
                    packet.pts = packet.dts = place
                    packet.duration, packet.stream = kept, stream


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), Fraction(24), Fraction(12)])
@pytest.mark.parametrize("frames", [1, 7, 83])
def test_other_frame_rates(fps: Fraction, frames: int, tmp_path: Path) -> None:
    track = tone(44100, 1, 9.0)
    with VideoWriter(tmp_path / "a.mp4", width=16, height=16, fps=fps, soundtrack=track) as writer:
        writer.write(moving(frames, 16, 16))
    samples = -(-frames * 44100 // fps)
    check_tables(tmp_path / "a.mp4", frames, 44100, samples=samples, fps=fps)
    assert probe_video(tmp_path / "a.mp4").fps == fps or frames == 1


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.5, 1.999])
def test_audio_that_ends_early_or_is_absent(seconds: float, tmp_path: Path) -> None:
    track = tone(16000, 1, seconds) if seconds else None
    with VideoWriter(tmp_path / "a.mp4", width=16, height=16, soundtrack=track) as writer:
        writer.write(moving(500, 16, 16))
    check_tables(tmp_path / "a.mp4", 500, 16000, samples=round(16000 * seconds))


@pytest.mark.parametrize(("rate", "kept"), [(6000, 7350), (37800, 44100), (192000, 96000)])
def test_resampled_audio(rate: int, kept: int, tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", width=16, height=16, soundtrack=tone(rate, 2, 2.0)) as writer:
        writer.write(moving(50, 16, 16))
    check_tables(tmp_path / "a.mp4", 50, kept, samples=2 * kept)


def test_a_growing_file_of_an_older_version_is_mended_by_copying(shared_dir: Path, tmp_path: Path) -> None:
    copy_packets(shared_dir / "field-cases" / "flash-and-click.mp4", tmp_path / "a.mp4")
    check_tables(tmp_path / "a.mp4", 50, 16000, samples=32000)


MEASURE = """
import sys
from pathlib import Path
from avatarctl.media.finish import copy_packets

def peak():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])

few, many, out = map(Path, sys.argv[1:])
copy_packets(few, out)
before = peak()
copy_packets(many, out)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_grows_by_the_tables_alone(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "all.mp4", width=16, height=16, soundtrack=tone(16000, 1, 16.0))
    writer.write(moving(400, 16, 16))
    whole, many = writer.abandon(), tmp_path / "many.mp4"
    assert whole is not None
    with av.open(str(whole)) as source:
        packets = [packet for packet in source.demux() if packet.size]
        begin_of(source, packets, many, 400, times=32)
    command = [sys.executable, "-c", MEASURE, whole, many, tmp_path / "out.mp4"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    count = sum(len(track.sizes) for track in read_tables(tmp_path / "out.mp4")[1])
    assert count > 20_000
    assert int(told.stdout) <= 200 * count, f"{int(told.stdout) / count:.0f} bytes per packet"
