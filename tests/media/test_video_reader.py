"""Video in by time: rates, seeking, and what decoders hand over in odd shapes."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from avatarctl.errors import PathNotFound, UnusableVideo
from avatarctl.media import open_video
from avatarctl.media.video_track import Playback
from tests.media.videos import SIDE, number_of, numbered, on_screen, steady, write_video

FILM, NTSC = Fraction(24000, 1001), Fraction(30000, 1001)
MILLI = Fraction(1, 1000)
OPEN_GOP = {"bf": "3", "g": "40", "x264-params": "open-gop=1"}
X265 = {"x265-params": "keyint=40:log-level=none"}


def variable(count: int) -> list[Fraction]:
    """Times as a phone has them: 30 fps, slower in the dark, now and then a frame left out."""
    draw, now, times = np.random.default_rng(5), Fraction(0), []
    for _ in range(count):
        times.append(now)
        now += Fraction(int(draw.choice([3003, 3003, 3754, 6006, 12000])), 90_000)
    return times


@pytest.mark.parametrize(
    ("name", "codec", "times", "tick", "options"),
    [
        ("film.mp4", "libx264", steady(140, FILM), Fraction(1, 24_000), OPEN_GOP),
        ("ntsc.mkv", "libx264", steady(150, NTSC), MILLI, OPEN_GOP),
        ("fifty.ts", "libx264", steady(260, 50), Fraction(1, 90_000), OPEN_GOP),
        ("variable.mp4", "libx264", variable(120), Fraction(1, 90_000), OPEN_GOP),
        ("variable.mkv", "libx264", variable(120), MILLI, OPEN_GOP),
        ("same.mp4", "libx265", steady(120, 25), Fraction(1, 12_800), X265),
        ("same.avi", "mpeg4", steady(120, 25), Fraction(1, 25), {"bf": "2", "g": "24"}),
        ("packed.avi", "libx264", steady(120, 25), Fraction(1, 25), OPEN_GOP),
        ("same.mpg", "mpeg2video", steady(120, 25), Fraction(1, 25), {"bf": "2", "g": "12"}),
        ("thirty.flv", "libx264", steady(150, 30), MILLI, OPEN_GOP),
        ("same.webm", "libvpx-vp9", steady(120, 25), MILLI, {"g": "40", "deadline": "realtime"}),
        ("sixty.mov", "prores_ks", steady(120, 60), Fraction(1, 600), {}),
    ],
)  # fmt: skip
def test_frames_are_those_of_their_time_from_anywhere(
    tmp_path: Path, name: str, codec: str, times: list[Fraction], tick: Fraction, options: dict[str, str]
) -> None:
    pix_fmt = "yuv422p10le" if codec == "prores_ks" else "yuv420p"
    rate = round(1 / (times[1] - times[0])) if codec == "mpeg4" else 1 / (times[1] - times[0])
    write_video(tmp_path / name, times, codec=codec, rate=rate, tick=tick, options=options, pix_fmt=pix_fmt)
    stated = [round(time / tick) * tick for time in times]
    with open_video(tmp_path / name) as video:
        assert (video.width, video.height, video.warnings) == (SIDE, SIDE, ())
        until_last = (stated[-1] - stated[0]) * 25
        if "variable" in name:  # how long the last frame stays is the encoder's guess
            assert until_last - Fraction(1, 2) <= video.frames <= until_last + 4
        else:
            assert abs(video.frames - until_last - (stated[1] - stated[0]) * 25) <= Fraction(1, 2)
        whole = video.read(0, video.frames)
        assert whole.dtype == np.uint8 and whole.flags.c_contiguous
        want = [on_screen(stated, Fraction(frame, 25)) for frame in range(video.frames)]
        assert [number_of(frame) for frame in whole] == want
        for start in np.random.default_rng(1).permutation(video.frames - 3)[:25]:
            assert np.array_equal(video.read(start, start + 3), whole[start : start + 3]), start


def test_a_read_that_goes_on_does_not_seek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", steady(250, 50), rate=50, options={"g": "30"})
    sought = []
    real = Playback._go_to
    monkeypatch.setattr(Playback, "_go_to", lambda self, tick: (sought.append(tick), real(self, tick)))
    with open_video(tmp_path / "a.mp4") as video:
        for start in range(0, 125, 5):
            video.read(start, start + 5)
        assert sought == []
        video.read(10, 11)
        assert len(sought) == 1
        assert video.read(3, 3).shape == (0, SIDE, SIDE, 3)
        for wrong in ((-1, 2), (124, 126), (3, 2)):
            with pytest.raises(ValueError, match="of 125"):
                video.read(*wrong)
    with pytest.raises(ValueError, match="closed"):
        video.read(0, 1)


def test_the_last_frames_of_three_hours_at_one_frame_per_second(tmp_path: Path) -> None:
    times = steady(3 * 3600, 1)
    write_video(tmp_path / "a.mp4", times, codec="mpeg4", rate=1, tick=MILLI, options={"g": "100"},
                draw=lambda number: numbered(number, 16, 16))  # fmt: skip
    with open_video(tmp_path / "a.mp4") as video:
        assert video.frames == 3 * 3600 * 25
        assert [number_of(frame) for frame in video.read(269_970, 270_000)] == [10_798] * 5 + [10_799] * 25
    write_video(tmp_path / "b.mp4", times[:1])
    with open_video(tmp_path / "b.mp4") as video:
        assert video.frames == 1 and number_of(video.read(0, 1)[0]) == 0


QUARTERS = np.array([[(220, 30, 30), (30, 200, 30)], [(30, 30, 220), (230, 230, 230)]], np.uint8)


def quarters(_: int = 0) -> np.ndarray:
    return QUARTERS.repeat(32, axis=0).repeat(48, axis=1)  # [64, 96, 3]


def middles(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    return frame[height // 4 :: height // 2, width // 4 :: width // 2].astype(int)


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), QUARTERS),
        ((0, 1, -1, 0), np.rot90(QUARTERS, -1)),  # clockwise, as a telephone held upright writes it
        ((-1, 0, 0, -1), np.rot90(QUARTERS, 2)),
        ((0, -1, 1, 0), np.rot90(QUARTERS, 1)),
        ((-1, 0, 0, 1), QUARTERS[:, ::-1]),
        ((1, 0, 0, -1), QUARTERS[::-1]),
        ((0, 1, 1, 0), QUARTERS.swapaxes(0, 1)),
        ((0, -1, -1, 0), np.rot90(QUARTERS, 2).swapaxes(0, 1)),
    ],
)
@pytest.mark.parametrize("aspect", [None, Fraction(2), Fraction(1, 2)])
def test_rotation_and_sample_aspect(
    tmp_path: Path, matrix: tuple[int, ...], shown: np.ndarray, aspect: Fraction | None
) -> None:
    a, b, c, d = (65_536 * each for each in matrix)

    def configure(stream: av.VideoStream) -> None:
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect

    write_video(tmp_path / "a.mp4", steady(2, 25), draw=quarters, configure=configure)
    with open_video(tmp_path / "a.mp4") as video:
        size = (round(96 * (aspect or 1)), 64)
        assert (video.width, video.height) == (size if matrix[0] else size[::-1])
        assert np.abs(middles(video.read(0, 1)[0]) - shown).max() <= 6


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "colours"),
    [
        ("a.mkv", "ffv1", "yuv420p", (5, 1)),  # BT.601, limited
        ("a.mkv", "ffv1", "yuv420p", (1, 1)),
        ("a.mkv", "ffv1", "yuv444p", (1, 2)),  # full range
        ("a.mkv", "ffv1", "yuv420p10le", (1, 1)),
        ("a.mkv", "ffv1", "yuv422p12le", (9, 1)),  # BT.2020
        ("a.mp4", "libx265", "yuv420p10le", (1, 1)),
        ("a.mov", "prores_ks", "yuv422p10le", (1, 1)),
        ("a.mkv", "ffv1", "bgr0", (0, 2)),
        ("a.avi", "mjpeg", "yuvj420p", (5, 2)),
    ],
)
def test_colours(tmp_path: Path, name: str, codec: str, pix_fmt: str, colours: tuple[int, int]) -> None:
    space, full = colours
    with av.open(str(tmp_path / name), "w") as container:
        # One frame alone gets a decoding time from x265 only where no frame may be reordered.
        options = {"x265-params": "log-level=none:bframes=0"} if codec == "libx265" else {}
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = space, full
        frame = av.VideoFrame.from_ndarray(quarters(), format="rgb24").reformat(
            format=pix_fmt, dst_colorspace=space or 1, src_color_range=2, dst_color_range=full
        )
        frame.pts = 0
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    with open_video(tmp_path / name) as video:
        assert np.abs(middles(video.read(0, 1)[0]) - QUARTERS).max() <= 6


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("a.webm", "libvpx", "yuva420p"),
    ],
)
def test_transparency_shows_the_grey_of_images(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    def draw(number: int) -> np.ndarray:
        alpha = np.zeros((64, 96, 1), np.uint8)
        alpha[:, 48:] = 255
        return np.concatenate([np.roll(quarters(), number, axis=0), alpha], axis=2)

    write_video(tmp_path / name, steady(30, 25), codec=codec, pix_fmt=pix_fmt, draw=draw, frame_format="rgba",
                tick=MILLI, options={"g": "10", "auto-alt-ref": "0"} if name == "a.webm" else {})  # fmt: skip
    with open_video(tmp_path / name) as video:
        whole = video.read(0, 30)
        seen = middles(whole[0])
        assert np.abs(seen[:, 0] - 128).max() <= 3, "what is transparent is grey"
        assert np.abs(seen[:, 1] - QUARTERS[:, 1]).max() <= 12
        assert np.array_equal(video.read(17, 20), whole[17:20])


def test_interlaced_and_hdr_are_read_and_said(tmp_path: Path) -> None:
    def make(name: str, codec: str, times: int = 3, **more: object) -> tuple[str, ...]:
        write_video(tmp_path / name, steady(times, 25), codec=codec, **more)
        with open_video(tmp_path / name) as video:
            assert [number_of(frame) for frame in video.read(0, times)] == list(range(times))
            return video.warnings

    def hdr(transfer: int):
        def configure(stream: av.VideoStream) -> None:
            stream.codec_context.color_trc = transfer
            stream.codec_context.color_primaries = stream.codec_context.colorspace = 9

        return configure

    params = {"x265-params": "log-level=none"}
    assert make("plain.mkv", "libx264") == ()
    (line,) = make("fields.mkv", "libx264", options={"x264-params": "tff=1"})
    assert "interlaced" in line
    (line,) = make("fields.mpg", "mpeg2video", tick=Fraction(1, 25), options={"flags": "+ildct+ilme"})
    assert "interlaced" in line
    for transfer, name in ((16, "PQ"), (18, "HLG")):
        (line,) = make("hdr.mp4", "libx265", pix_fmt="yuv420p10le", options=params, configure=hdr(transfer))
        assert f"HDR ({name})" in line


def test_two_video_tracks_and_cover_art(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        tracks = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for place, track in enumerate(tracks):
            track.width = track.height = 64
            track.disposition = place  # the second is the default one
        for number in range(5):
            for track, shift in zip(tracks, (100, 0), strict=True):
                frame = av.VideoFrame.from_ndarray(numbered(number + shift), format="rgb24")
                container.mux(track.encode(frame))
        for track in tracks:
            container.mux(track.encode(None))
    with open_video(tmp_path / "a.mkv") as video:
        assert "2 video tracks; number 2 (h264, 64x64)" in video.warnings[0]
        assert [number_of(frame) for frame in video.read(0, 5)] == list(range(5))


# --- what cannot be used ---------------------------------------------------------------------------


def test_a_change_of_resolution_is_refused_where_it_comes(tmp_path: Path) -> None:
    write_video(tmp_path / "a.ts", steady(25, 25), options={"bf": "0"})
    later = [1 + time for time in steady(25, 25)]
    write_video(tmp_path / "b.ts", later, options={"bf": "0"}, draw=lambda number: numbered(number, 96, 96))
    (tmp_path / "c.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    with open_video(tmp_path / "c.ts") as video:
        assert video.frames == 50
        assert number_of(video.read(20, 21)[0]) == 20
        for start in (20, 40):
            with pytest.raises(UnusableVideo, match=r"c.ts: changes its resolution from 64x64 to 96x96 at"):
                video.read(start, 45)


def test_two_recordings_in_one_file_are_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "a.ts", steady(60, 25))
    (tmp_path / "b.ts").write_bytes((tmp_path / "a.ts").read_bytes() * 2)
    with pytest.raises(UnusableVideo, match=r"jump back by 2\.\d s"):
        open_video(tmp_path / "b.ts")


@pytest.mark.parametrize(("name", "says"), [("a.mp4", r"\d+ of 100 frames"), ("a.mkv", r"an end at 4\.00 s")])
def test_a_cut_file_is_read_as_far_as_it_goes_and_said(tmp_path: Path, name: str, says: str) -> None:
    write_video(tmp_path / name, steady(100, 25), tick=MILLI, options={"g": "20"},
                draw=lambda number: noisy(number), container_options={"movflags": "faststart"})  # fmt: skip
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 55 // 100])
    with open_video(tmp_path / name) as video:
        assert len(video.warnings) == 1 and "cut short" in video.warnings[0]
        assert re.search(says, video.warnings[0])
        assert 30 < video.frames < 80
        assert len(video.read(0, video.frames)) == video.frames


def noisy(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_damage_is_refused_where_it_comes(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mov", steady(50, 25), codec="png", pix_fmt="rgb24", draw=noisy)
    content = bytearray((tmp_path / "a.mov").read_bytes())
    with av.open(str(tmp_path / "a.mov")) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][30]
    content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    (tmp_path / "a.mov").write_bytes(content)
    with open_video(tmp_path / "a.mov") as video:
        video.read(0, 25)
        for start in (0, 26):
            with pytest.raises(UnusableVideo, match=r"a.mov: damaged at about 1\.\d+ s"):
                video.read(start, 50)


def test_a_file_that_is_replaced_is_noticed(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", steady(50, 25))
    with open_video(tmp_path / "a.mp4") as video:
        assert len(video.sha256()) == 64
        video.read(40, 50)
        write_video(tmp_path / "a.mp4", steady(60, 25))
        with pytest.raises(UnusableVideo, match="changed while"):
            video.sha256()
        with pytest.raises(UnusableVideo, match="changed while"):
            video.read(0, 1)


def test_playlists_scripts_and_addresses_open_nothing(tmp_path: Path) -> None:
    write_video(tmp_path / "victim.ts", steady(25, 25))
    with av.open(str(tmp_path / "victim.ts")) as container:
        assert container.streams.video
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)  # who was connected to waits here already
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/victim.ts"
        hls = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\n{}\n#EXT-X-ENDLIST\n"
        scripts = [
            "ffconcat version 1.0\nfile 'victim.ts'\n",
            hls.format("victim.ts"),
            hls.format(tmp_path.as_uri() + "/victim.ts"),
            hls.format(address),
            "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 50040 RTP/AVP 96\n",
            f"<?xml version='1.0'?>\n<MPD profiles='urn:dash:'><BaseURL>{address}</BaseURL></MPD>",
            "<ivtc/>\n# AviSynth\nDirectShowSource('victim.ts')\n",
        ]
        for text in scripts:
            for suffix in ("mp4", "m3u8", "sdp", "avs", "txt"):
                (tmp_path / f"list.{suffix}").write_text(text)
                with pytest.raises(UnusableVideo, match="not a video that can be read"):
                    open_video(tmp_path / f"list.{suffix}")
        for name in (
            address,
            f"concat:{tmp_path}/victim.ts",
            "pipe:0",
            f"file:{tmp_path}/victim.ts",
            "lavfi:x",
        ):
            with pytest.raises(PathNotFound):
                open_video(name)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_audio_and_nonsense_are_no_video(tmp_path: Path) -> None:
    for content in (b"", b"plain text\n" * 50, np.random.default_rng(3).bytes(9000)):
        (tmp_path / "a.mp4").write_bytes(content)
        with pytest.raises(UnusableVideo, match=r"a\.mp4"):
            open_video(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    with pytest.raises(UnusableVideo, match="no video stream"):
        open_video(tmp_path / "a.m4a")


def test_damaged_files_are_read_or_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(12)
    for name in ("a.mp4", "a.mkv", "a.ts", "a.avi"):
        write_video(tmp_path / name, steady(12, 25), tick=MILLI)
        content = (tmp_path / name).read_bytes()
        for _ in range(25):
            damaged = bytearray(content)
            for at in draw.integers(0, len(content), 6):
                damaged[at] = draw.integers(256)
            (tmp_path / "x").write_bytes(damaged)
            try:
                with open_video(tmp_path / "x") as video:
                    video.read(0, min(video.frames, 20))
            except UnusableVideo as error:
                assert str(tmp_path / "x") in str(error) and "\n" not in str(error)
    assert capfd.readouterr() == ("", ""), "decoders keep quiet"


READ_ALL = """
import re, sys
from pathlib import Path
from avatarctl.media import open_video

def peak():  # KiB
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

with open_video(sys.argv[1]) as video:
    for start in range(0, 100, 25):
        video.read(start, start + 25)
    before = peak()
    for start in range(100, video.frames, 25):
        video.read(start, min(start + 25, video.frames))
    print(video.frames, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux")
def test_memory_does_not_depend_on_the_length(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", steady(1500, 25), codec="mpeg4", tick=Fraction(1, 25),
                draw=lambda number: numbered(number, 192, 192))  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, tmp_path / "a.mp4"], capture_output=True, text=True, check=True
    )
    frames, grown = map(int, done.stdout.split())
    assert frames == 1500
    assert grown < 16 * 1024, "155 MB of frames went through"
