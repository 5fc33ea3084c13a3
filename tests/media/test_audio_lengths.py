"""The length that a header declares against what is there: less, more, or a number that states nothing."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avatarctl.media import open_audio, survey
from tests.media.test_audio_files import RATE, voice, wav

FIELD = Path(__file__).resolve().parents[3] / "shared" / "field-cases"
DATA = (voice(0.5) * 32767).astype("<i2").tobytes()


def read_back(path: Path, content: bytes) -> tuple[int, tuple[str, ...]]:
    """Samples and warnings of a file of these bytes."""
    path.write_bytes(content)
    found = survey(open_audio(path))
    return found.samples, found.warnings


@pytest.mark.parametrize(
    "declared",
    [
        *(0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 2_000_000_000),
        *(0x7FFFFF00, 0x7FFFFFFF - 36, 0xFFFFFFFF - 44, 0x7FFFF000 - 0x7FFFF000 % 6),
    ],
    ids=hex,
)
def test_placeholders_of_streams_state_no_length(tmp_path: Path, declared: int) -> None:
    assert read_back(tmp_path / "a.wav", wav(DATA, declared=declared)) == (8_000, ())


def test_placeholders_in_aiff_and_rf64(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.aiff", voice(0.5), RATE, format="AIFF")
    content = bytearray((tmp_path / "a.aiff").read_bytes())
    frames, size = content.find(b"COMM") + 10, content.find(b"SSND") + 4
    for stated in (0x7FFFFFFF, 0xFFFFFFFF, 0x7F000000):
        content[frames : frames + 4] = content[size : size + 4] = struct.pack(">I", stated)
        assert read_back(tmp_path / "a.aiff", bytes(content)) == (8_000, ())

    wave = wav(DATA, declared=0xFFFFFFFF)
    for stated, count in ((2**63 - 1, 0), (10**15, 1), (17_000, 1)):
        ds64 = b"ds64" + struct.pack("<IQQQI", 28, stated, stated, stated // 2, 0)
        content = b"RF64\xff\xff\xff\xffWAVE" + ds64 + wave[12:]
        samples, warnings = read_back(tmp_path / "a.wav", content)
        assert samples == 8_000 and len(warnings) == count
        assert any("cut short" in warning for warning in warnings) == (stated == 17_000)


def test_a_length_far_beyond_the_file_is_told_and_never_a_cut(tmp_path: Path) -> None:
    for declared in (1_234_567_890, 0x70000000, 100 * len(DATA) + 2):
        samples, (warning,) = read_back(tmp_path / "a.wav", wav(DATA, declared=declared))
        assert samples == 8_000 and "cut short" not in warning
        assert f"{declared} bytes" in warning and f"{len(DATA)} follow" in warning
    samples, (warning,) = read_back(tmp_path / "a.wav", wav(DATA, declared=100 * len(DATA)))
    assert samples == 8_000 and "cut short" in warning


def test_what_lies_behind_the_audio_is_told_with_its_bytes(tmp_path: Path) -> None:
    path, first = tmp_path / "a.wav", wav(DATA)
    second = wav(DATA[:5000])
    tag = b"LIST\x04\0\0\0abcd"
    text = f"has another WAV file behind its audio: the last {len(second)} bytes are not read"
    assert read_back(path, first + second) == (8_000, (text,))
    assert read_back(path, first + tag + second) == (8_000, (text,)), "behind a chunk of the first"
    odd = wav(DATA[:-1])
    assert read_back(path, odd + second) == (7_999, (text,)), "without the padding of an odd chunk"
    assert read_back(path, odd + b"\0" + second) == (7_999, (text,))
    rifx = soundfile_bytes(tmp_path / "b.wav", endian="BIG")
    text = f"has another WAV file behind its audio: the last {len(rifx)} bytes are not read"
    assert read_back(path, first + rifx) == (8_000, (text,))

    raw = DATA * 3  # audio that went on when the header was final
    text = f"holds more than its header declares: the last {len(raw)} bytes are not read"
    assert read_back(path, first + b"\x01\x02" + raw[2:]) == (8_000, (text,))


def test_chunks_tags_and_padding_behind_the_audio_are_no_reason_to_say_anything(tmp_path: Path) -> None:
    large = b"id3 " + struct.pack("<I", 100_000) + bytes(100_000)
    for tail in (b"LIST\x04\0\0\0abcd", large, bytes(2048), b"TAG" + bytes(125), b"\0"):
        assert read_back(tmp_path / "a.wav", wav(DATA) + tail) == (8_000, ())


def test_a_forged_chain_of_chunks_takes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 000 empty chunks a thousand are walked."""
    path = tmp_path / "a.wav"
    path.write_bytes(wav(DATA) + b"LIST\0\0\0\0" * 20_000)
    reads = []
    unpack = struct.unpack

    def counted(form: str, content: bytes) -> tuple:
        reads.append(form)
        return unpack(form, content)

    monkeypatch.setattr("avatarctl.media.audio_header.struct.unpack", counted)
    (warning,) = open_audio(path).doubts
    assert len(reads) < 1_100 and "not read" in warning


def soundfile_bytes(path: Path, **options: str) -> bytes:
    soundfile.write(path, np.zeros(100, np.float32), RATE, format="WAV", **options)
    return path.read_bytes()


@pytest.mark.skipif(not FIELD.is_dir(), reason="../shared/field-cases is absent")
def test_field_cases() -> None:
    streamed = survey(open_audio(FIELD / "streamed-7fffffff.wav"))
    assert streamed.samples == 16_000 and streamed.warnings == ()  # 8 kHz, a second
    glued = survey(open_audio(FIELD / "two-wavs-glued.wav"))
    assert glued.samples == 16_000
    assert glued.warnings == ("has another WAV file behind its audio: the last 16044 bytes are not read",)
