"""Opening audio by content, and writing it."""

from __future__ import annotations

import hashlib
import itertools
import resource
import socket
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from avatarctl.errors import OutputRefused, PathNotFound, UnusableAudio, WriteFailed
from avatarctl.media import Audio, audio_from_array, open_audio, survey, write_audio

RATE = 16_000
NOISE = "not an audio file|cannot be decoded|channels|rate"


def voice(seconds: float = 1.0, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """float32 [n, channels]: a chirp with an onset, so that a shift shows; every channel differs."""
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.4 * np.sin(2 * np.pi * (150 + 300 * time) * time) * np.minimum(1, time * 20)
    return np.stack([tone / (1 + index) for index in range(channels)], axis=1).astype(np.float32)


def whole(audio: Audio) -> np.ndarray:
    return np.concatenate(list(audio.blocks()))


def lag(decoded: np.ndarray, wanted: np.ndarray) -> int:
    """Samples by which `decoded` comes later, at the maximum of the circular cross-correlation."""
    size = 1 << (2 * max(len(decoded), len(wanted)) - 1).bit_length()
    spectrum = np.fft.rfft(decoded, size) * np.conj(np.fft.rfft(wanted, size))
    best = int(np.argmax(np.fft.irfft(spectrum)))
    return best if best < size // 2 else best - size


def check_alike(decoded: np.ndarray, wanted: np.ndarray) -> None:
    """The same audio after lossy compression: in place, at its level, alike."""
    assert lag(decoded, wanted) == 0
    assert np.corrcoef(decoded, wanted)[0, 1] > 0.97
    assert 0.9 < decoded.std() / wanted.std() < 1.1


def encode(path: Path, codec: str, samples: np.ndarray, rate: int, video: bool = False) -> None:
    """Write float32 [n, channels] with an FFmpeg encoder, optionally beside a black video."""
    layout = {1: "mono", 2: "stereo"}[samples.shape[1]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if video:
            image = container.add_stream("mpeg4", rate=25)
            image.width = image.height = 32
            image.pix_fmt = "yuv420p"
            for _ in range(25 * len(samples) // rate):
                black = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))
                container.mux(image.encode(black))
            container.mux(image.encode(None))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        frame.rate, frame.pts = rate, 0
        wanted = stream.codec_context.format.name if stream.codec_context.format else "fltp"
        for piece in av.AudioResampler(wanted, layout, rate).resample(frame):
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))


def wav(data: bytes, *, tag=1, channels=1, rate=RATE, bits=16, align=None, declared=None) -> bytes:
    """A WAV file whose header says whatever a test wants."""
    align = channels * bits // 8 if align is None else align
    fmt = struct.pack("<HHIIHH", tag, channels, rate, rate * align % 2**32, align, bits)
    size = len(data) if declared is None else declared
    body = b"WAVEfmt " + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("container", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 2**-7),
        ("WAV", "PCM_16", 2**-15),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "PCM_32", 1e-7),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAV", "ULAW", 0.02),
        ("WAV", "ALAW", 0.02),
        ("WAVEX", "PCM_16", 2**-15),
        ("RF64", "PCM_16", 2**-15),
        ("W64", "PCM_24", 2**-23),
        ("AIFF", "PCM_16", 2**-15),
        ("AIFF", "PCM_S8", 2**-7),
        ("CAF", "FLOAT", 0),
        ("FLAC", "PCM_16", 2**-15),
        ("FLAC", "PCM_24", 2**-23),
        ("FLAC", "PCM_S8", 2**-7),
        ("OGG", "VORBIS", None),
        ("OGG", "OPUS", None),
    ],
)
@pytest.mark.parametrize("channels", [1, 7])
def test_formats_at_their_right_level(
    tmp_path: Path, container: str, subtype: str, error: float | None, channels: int
) -> None:
    samples = voice(3.0, 48_000, channels)
    path = tmp_path / "audio.bin"  # the name says nothing
    with soundfile.SoundFile(path, "w", 48_000, channels, subtype, format=container) as handle:
        for start in range(0, len(samples), 10_000):
            handle.write(samples[start : start + 10_000])
    audio = open_audio(path)
    assert (audio.rate, audio.channels, audio.name) == (48_000, channels, str(path))
    assert audio.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    decoded = whole(audio)
    assert decoded.dtype == np.float32 and decoded.shape == samples.shape
    if error is not None:
        assert np.abs(decoded - samples).max() <= error
    else:
        check_alike(decoded[:, 0], samples[:, 0])
    assert max(len(block) for block in audio.blocks()) <= 100_000
    assert (whole(audio) == decoded).all(), "a second pass starts over"
    assert audio.doubts == ()


@pytest.mark.parametrize(
    ("name", "codec", "padding"),
    [
        ("a.mp3", "libmp3lame", 0),
        ("a.m4a", "aac", 1024),
        ("a.mkv", "aac", 1024),
        ("a.webm", "libopus", 0),
        ("a.mov", "alac", 0),
        ("a.avi", "pcm_s16le", 0),
        ("a.flac", "flac", 0),
    ],
)
@pytest.mark.parametrize("video", [False, True])
def test_compressed_audio_has_no_codec_delay(
    tmp_path: Path, name: str, codec: str, padding: int, video: bool
) -> None:
    if video and name.endswith((".mp3", ".flac", ".webm")):
        pytest.skip("no such files with mpeg4 video")
    samples = voice(2.0, 48_000, 2)
    encode(tmp_path / "plain.wav", "pcm_s16le", samples, 48_000)
    encode(tmp_path / name, codec, samples, 48_000, video)
    (tmp_path / name).rename(tmp_path / "audio.wav")  # content counts
    audio = open_audio(tmp_path / "audio.wav")
    assert (audio.rate, audio.channels) == (48_000, 2)
    decoded = whole(audio)
    assert 0 <= len(decoded) - len(samples) <= padding
    check_alike(decoded[: len(samples), 0], samples[:, 0])


@pytest.mark.parametrize(
    ("samples", "rate"), [(voice(0.02), 16_000), (voice(0.5, 96_000), 96_000), (voice(0.5, 8_000), 8_000)]
)
def test_audio_from_array(samples: np.ndarray, rate: int) -> None:
    audio = audio_from_array(samples[:, 0], rate, "made")
    assert (audio.rate, audio.channels, audio.name) == (rate, 1, "made")
    assert (whole(audio) == samples).all()
    assert audio.sha256() == audio_from_array(samples, rate, "other").sha256()
    assert audio.sha256() != audio_from_array(samples, rate + 1, "made").sha256()
    with pytest.raises(TypeError, match="float64"):
        audio_from_array(samples.astype(np.float64), rate, "made")
    with pytest.raises(UnusableAudio, match="sample rate of 0"):
        audio_from_array(samples, 0, "made")


def test_wav_headers_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    data = (voice(0.5) * 32767).astype("<i2").tobytes()

    def warnings_for(content: bytes, samples: int) -> tuple[str, ...]:
        path.write_bytes(content)
        found = survey(open_audio(path))
        assert found.samples == samples
        return found.warnings

    assert "declares 16000 samples, 8000" in warnings_for(wav(data, declared=32_000), 8_000)[0]
    assert "7999 are present" in warnings_for(wav(data[:-1], declared=16_000), 7_999)[0]
    assert "not stated" in warnings_for(wav(data, declared=0x7FFFFE00), 8_000)[0]
    assert warnings_for(wav(data, declared=0xFFFFFFFF), 8_000) == (), "written into a pipe"
    assert warnings_for(wav(data, align=0), 8_000) == ()
    assert "0 samples" in warnings_for(wav(data, declared=0), 8_000)[0]
    assert warnings_for(wav(data) + b"LIST\x04\0\0\0abcd", 8_000) == ()


def test_a_cut_aiff_is_noticed(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.aiff", voice(), RATE, format="AIFF")
    content = (tmp_path / "a.aiff").read_bytes()
    assert survey(open_audio(tmp_path / "a.aiff")).warnings == ()
    (tmp_path / "a.aiff").write_bytes(content[: len(content) // 2])
    assert "declares 16000 samples" in survey(open_audio(tmp_path / "a.aiff")).warnings[0]


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_a_cut_ogg_is_noticed(tmp_path: Path, subtype: str) -> None:
    path = tmp_path / "a.ogg"
    write_audio(path, voice(30.0), RATE, subtype)
    assert survey(open_audio(path)).warnings == ()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = survey(open_audio(path))
    assert 100_000 < found.samples < 400_000
    assert "cut short" in found.warnings[0]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (wav(b"\0" * 64, channels=0), "0 channels"),
        (wav(b"\0" * 64, rate=0), "sample rate of 0"),
        (wav(b"\0" * 400, channels=200), "200 channels"),
        (wav(b"\0" * 64, rate=4_000_000_000), "sample rate"),
        (wav(b"\0" * 64, tag=0x7777), "not an audio file"),
        (b"RIFF", "not an audio file"),
        (b"plain text\n" * 100, "not an audio file"),
        (b"<html>error</html>" * 10, "not an audio file"),
        *(
            pytest.param(np.random.default_rng(seed).bytes(20_000), NOISE, id=f"noise {seed}")
            for seed in range(5)
        ),
        (b"", "0 bytes"),
    ],
)
def test_refused_content(tmp_path: Path, content: bytes, cause: str) -> None:
    (tmp_path / "name.wav").write_bytes(content)
    with pytest.raises(UnusableAudio, match=cause) as caught:
        survey(open_audio(tmp_path / "name.wav"))
    assert "name.wav" in str(caught.value)


def test_absent_files_and_streams(tmp_path: Path) -> None:
    with pytest.raises(PathNotFound):
        open_audio(tmp_path / "absent.wav")
    with av.open(str(tmp_path / "mute.mp4"), "w") as container:
        image = container.add_stream("mpeg4", rate=25)
        image.width = image.height = 32
        image.pix_fmt = "yuv420p"
        container.mux(image.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(image.encode(None))
    with pytest.raises(UnusableAudio, match="no audio"):
        open_audio(tmp_path / "mute.mp4")


def test_a_raw_or_odd_extension_does_not_choose_the_decoder(tmp_path: Path) -> None:
    for name in ("a.raw", "a.vox", "-a.mp3", "concat:a|b.wav", "a b\nc.wav"):
        (tmp_path / name).write_bytes(wav((voice(0.1) * 32767).astype("<i2").tobytes()))
        assert survey(open_audio(tmp_path / name)).samples == 1_600
    encode(tmp_path / "b.mp3", "libmp3lame", voice(0.5, 48_000), 48_000)
    (tmp_path / "b.mp3").rename(tmp_path / "concat:a|b.mp3")
    assert survey(open_audio(tmp_path / "concat:a|b.mp3")).native_samples == 24_000


# --- playlists -----------------------------------------------------------------------------------


def test_playlists_open_nothing_else(tmp_path: Path) -> None:
    encode(tmp_path / "victim.ts", "aac", voice(1.0, 48_000), 48_000)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)  # who was connected to waits here already
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x.ts"
        hls = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\n{}\n#EXT-X-ENDLIST\n"
        sdp = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 50040 RTP/AVP 0\n"
        scripts = {
            "ffconcat": "ffconcat version 1.0\nfile 'victim.ts'\n",
            "hls relative": hls.format("victim.ts"),
            "hls absolute": hls.format(tmp_path / "victim.ts"),
            "hls url": hls.format("file://" + str(tmp_path / "victim.ts")),
            "hls network": hls.format(address),
            "sdp": sdp,
            "dash": f"<?xml version='1.0'?>\n<MPD profiles='urn:dash:'><BaseURL>{address}</BaseURL></MPD>",
            "m3u": address + "\n",
        }
        for (kind, text), extension in itertools.product(scripts.items(), ("wav", "mp4", "m3u8")):
            path = tmp_path / f"list.{extension}"
            path.write_text(text)
            with pytest.raises(UnusableAudio, match="not an audio file"):
                open_audio(path)
            with pytest.raises(BlockingIOError):
                listener.accept()[0].close()
            assert kind


def test_the_playlist_attack_is_real(tmp_path: Path) -> None:
    """Without the allow-list the same file does open its sibling: the test above can fail."""
    encode(tmp_path / "victim.ts", "aac", voice(1.0, 48_000), 48_000)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile 'victim.ts'\n")
    with av.open(str(tmp_path / "list.mp4")) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) > 40_000


# --- damage --------------------------------------------------------------------------------------


def test_a_cut_flac_is_used_up_to_the_cut(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", voice(3.0), RATE)
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(content[: len(content) // 2])
    found = survey(open_audio(tmp_path / "a.flac"))
    assert 10_000 < found.samples < 40_000
    assert any("declares 48000 samples" in warning for warning in found.warnings)


def with_damage(path: Path, codec: str, samples: np.ndarray) -> None:
    """Encode at 48 kHz and overwrite 2000 bytes in the middle."""
    encode(path, codec, samples, 48_000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2_000] = np.random.default_rng(3).bytes(2_000)
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "codec"), [("a.m4a", "aac"), ("a.flac", "flac")])
def test_damage_in_the_middle_does_not_shift_what_follows(tmp_path: Path, name: str, codec: str) -> None:
    samples = voice(4.0, 48_000)
    with_damage(tmp_path / name, codec, samples)
    audio = open_audio(tmp_path / name)
    decoded = whole(audio)
    assert abs(lag(decoded[3 * 48_000 :, 0], samples[3 * 48_000 :, 0])) <= 96, "2 ms"
    assert audio.doubts


@pytest.mark.parametrize(("name", "codec"), [("a.m4a", "aac"), ("a.flac", "flac"), ("a.mka", "aac")])
def test_a_single_lost_packet_is_replaced_by_silence_of_its_length(
    tmp_path: Path, name: str, codec: str
) -> None:
    """21 ms of AAC or 96 ms of FLAC: less than the jitter that is let through elsewhere."""
    samples = voice(2.0, 48_000)
    path = tmp_path / name
    encode(path, codec, samples, 48_000)
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
    content = path.read_bytes()
    assert content.count(packets[9]) == 1
    path.write_bytes(content.replace(packets[9], b"\xff" * len(packets[9])))
    audio = open_audio(path)
    decoded = whole(audio)[:, 0]
    assert abs(lag(decoded[72_000:96_000], samples[72_000:, 0])) <= 96, "2 ms"
    assert audio.doubts


@pytest.mark.parametrize(("name", "codec"), [("a.mp3", "libmp3lame"), ("a.mka", "aac")])
def test_damage_is_told_where_the_timeline_cannot_be_kept(tmp_path: Path, name: str, codec: str) -> None:
    with_damage(tmp_path / name, codec, voice(4.0, 48_000))
    found = survey(open_audio(tmp_path / name))
    assert found.native_samples > 48_000
    assert any("damaged" in warning or "cut short" in warning for warning in found.warnings)


def test_fuzzed_files_are_read_or_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(11)
    sources = {
        "a.wav": "pcm_s16le",
        "a.mp3": "libmp3lame",
        "a.flac": "flac",
        "a.m4a": "aac",
        "a.ogg": "libopus",
    }
    for name, codec in sources.items():
        encode(tmp_path / name, codec, voice(0.5, 48_000), 48_000)
        content = (tmp_path / name).read_bytes()
        for _ in range(40):
            damaged = bytearray(content)
            for at in draw.integers(0, min(len(content), 1_200), 4):
                damaged[at] = draw.integers(256)
            (tmp_path / "x").write_bytes(damaged)
            try:
                survey(open_audio(tmp_path / "x"))
            except UnusableAudio as error:
                assert str(tmp_path / "x") in str(error)
    assert capfd.readouterr() == ("", ""), "decoders keep quiet"


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "subtype", "error"),
    [
        ("a.wav", "PCM_16", 2**-15),
        ("a.wav", "FLOAT", 0),
        ("a.flac", "PCM_24", 2**-23),
        ("a.ogg", "VORBIS", 0.05),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_written_audio_is_read_back(
    tmp_path: Path, name: str, subtype: str, error: float, channels: int
) -> None:
    samples = voice(4.0, 44_100, channels)
    write_audio(tmp_path / name, iter(np.array_split(samples, 3)), 44_100, subtype)
    audio = open_audio(tmp_path / name)
    assert (audio.rate, audio.channels) == (44_100, channels)
    assert np.abs(whole(audio) - samples).max() <= error
    write_audio(tmp_path / name, samples[:9_999, 0], 16_000, subtype)
    assert whole(open_audio(tmp_path / name)).shape == (9_999, 1), "replaced"


def test_one_large_array_is_written_in_pieces(tmp_path: Path) -> None:
    """libsndfile's Vorbis encoder overflows the stack on a call with millions of samples."""
    write_audio(tmp_path / "a.ogg", np.zeros((3_000_000, 2), np.float32), 48_000, "VORBIS")
    assert soundfile.info(tmp_path / "a.ogg").frames == 3_000_000


def test_integers_clip_and_do_not_wrap(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", np.array([3.0, -3.0, 0.5], np.float32), RATE)
    assert np.allclose(whole(open_audio(tmp_path / "a.wav"))[:, 0], [1, -1, 0.5], atol=1e-4)


def test_writing_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    for path, subtype in (
        (tmp_path / "a.xyz", "PCM_16"),
        (tmp_path / "a.ogg", "PCM_16"),
        (tmp_path / "no" / "a.wav", "PCM_16"),
    ):
        with pytest.raises(OutputRefused):
            write_audio(path, voice(), RATE, subtype)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_leaves_nothing(tmp_path: Path) -> None:
    def source():
        yield voice()
        raise UnusableAudio("broken", where="source")

    with pytest.raises(UnusableAudio):
        write_audio(tmp_path / "a.wav", source(), RATE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).standard_normal((200_000, 1)).astype(np.float32) * 0.2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(WriteFailed, match=name) as told:
            write_audio(tmp_path / name, noise, RATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_media_needs_no_torch() -> None:
    script = "import sys, avatarctl.media; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
