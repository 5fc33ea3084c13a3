"""Video and the audio beside it, on one zero; which of several audio tracks is read; clips written."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avatarctl.errors import OutputRefused, UnusableAudio, WriteFailed
from avatarctl.media import Audio, open_audio, open_video, survey, write_clip
from tests.media.test_video_reader import FILM, NTSC, variable
from tests.media.videos import number_of, numbered, on_screen, steady, write_video

RATE = 48_000


def clicks(seconds: float, first: Fraction = Fraction(0)) -> np.ndarray:
    """float32 [n] with a click of 5 ms at every whole second of the video, the first at 1 s; the audio
    itself starts `first` s after the video."""
    samples = np.zeros(round(seconds * RATE), np.float32)
    for second in range(1, 100):
        at = round((second - first) * RATE)
        if 0 <= at < len(samples):
            samples[at : at + 240] = 0.8
    return samples


def click_times(audio: Audio) -> list[float]:
    """Seconds at which a click begins, after the first sample."""
    samples = np.concatenate(list(audio.blocks()))[:, 0]
    loud = np.flatnonzero(np.abs(samples) > 0.25)
    starts = loud[np.diff(loud, prepend=-RATE) > RATE // 4]
    return [float(start) / audio.rate for start in starts]


@pytest.mark.parametrize(
    ("name", "times", "tick"),
    [
        ("a.mp4", steady(1464, FILM), Fraction(1, 24_000)),
        ("a.mkv", steady(1829, NTSC), Fraction(1, 1000)),
        ("a.mov", steady(3050, 50), Fraction(1, 12_800)),
        ("b.mkv", variable(1300), Fraction(1, 1000)),
    ],
)
def test_flash_and_click_stay_together_for_a_minute(
    tmp_path: Path, name: str, times: list[Fraction], tick: Fraction
) -> None:
    times = [round(time / tick) * tick for time in times if time < 61]
    flashes = {on_screen(times, Fraction(second)) for second in range(1, 61)}

    def draw(number: int) -> np.ndarray:
        return np.full((16, 16, 3), 255 if number in flashes else 0, np.uint8)

    rate = 25 if name == "b.mkv" else round(1 / times[1])
    audio = [(clicks(61), Fraction(0))]
    write_video(tmp_path / name, times, codec="mpeg4", rate=rate, tick=tick, draw=draw, audio=audio)
    with open_video(tmp_path / name) as video:
        light = video.read(0, video.frames).mean(axis=(1, 2, 3)) > 128
    seen = np.flatnonzero(light & ~np.roll(light, 1))
    clicked = np.array(click_times(open_audio(tmp_path / name)))
    assert len(seen) == len(clicked) == 60
    # A flash of 40 ms and less is there when its second is on the screen, and may have begun before.
    lasting = [np.argmin(light[start:]) for start in seen]
    for start, length, second in zip(seen, lasting, clicked, strict=True):
        assert start - 0.5 <= second * 25 <= start + max(length - 1, 0) + 0.5


@pytest.mark.parametrize("late", [Fraction(3, 10), Fraction(-3, 10), Fraction(0)])
@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "pcm_s16le"), ("a.mkv", "libopus"), ("a.ts", "aac")]
)
def test_audio_that_starts_beside_the_video_is_padded_or_cut(
    tmp_path: Path, name: str, codec: str, late: Fraction
) -> None:
    begin = max(Fraction(0), -late)
    times = [time + begin for time in steady(100, 25)]
    start = begin + late
    write_video(tmp_path / name, times, audio=[(clicks(4, late), start)], audio_codec=codec, audio_rate=RATE)
    found = open_audio(tmp_path / name)
    clicked = click_times(found)
    want = [second for second in (1, 2, 3, 4) if second - late < 4]
    assert len(clicked) == len(want)
    assert np.abs(np.array(clicked) - want).max() < 0.003
    samples = survey(found).native_samples
    assert abs(samples - (4 + late) * RATE) < 0.05 * RATE
    if late:  # MPEG-TS states no priming of AAC: 0.02 s of silence more
        (line,) = found.doubts
        assert re.search(r"starts 0\.(2[89]|3[0-2]) s " + ("after" if late > 0 else "before"), line)
    else:
        assert found.doubts == ()
    with open_video(tmp_path / name) as video:
        assert video.frames == 100


def test_audio_long_after_its_video_is_refused(tmp_path: Path) -> None:
    audio = [(clicks(1), Fraction(5000))]
    write_video(tmp_path / "a.mkv", steady(25, 25), audio=audio, audio_codec="pcm_s16le")
    with pytest.raises(UnusableAudio, match="starts 5000 s after its video"):
        open_audio(tmp_path / "a.mkv")


def tone(level: float) -> np.ndarray:
    return np.full(RATE, level, np.float32)


def level(path: Path) -> float:
    return float(np.median(np.concatenate(list(open_audio(path).blocks()))))


@pytest.mark.parametrize("default", [0, 1, 2])
def test_of_several_audio_tracks_the_default_one_is_read(tmp_path: Path, default: int) -> None:
    tracks = [(tone(value), Fraction(0)) for value in (0.1, 0.2, 0.3)]
    write_video(tmp_path / "a.mkv", steady(25, 25), audio=tracks, audio_codec="pcm_s16le", audio_rate=RATE,
                default_audio=default)  # fmt: skip
    assert level(tmp_path / "a.mkv") == pytest.approx(0.1 * (default + 1), abs=1e-3)
    (line,) = open_audio(tmp_path / "a.mkv").doubts
    assert line == f"has 3 audio tracks; number {default + 1} (pcm_s16le) is used"


def test_tracks_that_cannot_be_decoded_are_passed_over(tmp_path: Path) -> None:
    """As in recent iPhone clips, whose spatial audio (APAC) has no decoder."""
    tracks = [(tone(value), Fraction(0)) for value in (0.1, 0.2)]
    path = tmp_path / "a.mov"
    write_video(path, steady(25, 25), audio=tracks, audio_codec="pcm_s16le", audio_rate=RATE, default_audio=0)
    content = path.read_bytes()
    assert content.count(b"sowt") == 2
    path.write_bytes(content.replace(b"sowt", b"apac", 1))
    assert level(path) == pytest.approx(0.2, abs=1e-3)
    (line,) = open_audio(path).doubts
    assert line == "has 2 audio tracks; number 2 (pcm_s16le) is used, as number 1 cannot be decoded"
    path.write_bytes(content.replace(b"sowt", b"apac"))
    with pytest.raises(UnusableAudio, match="codec that cannot be read"):
        open_audio(path)
    with open_video(path) as video:
        assert video.frames == 25


def test_an_edit_list_is_obeyed(tmp_path: Path) -> None:
    """A clip whose first 10 frames are cut by its edit list alone, as telephones trim: frame 0 is number 10,
    with the audio from the same place on."""
    path = tmp_path / "a.mp4"
    write_video(path, steady(100, 25), tick=Fraction(1, 12_800), audio=[(clicks(4), Fraction(0))],
                audio_rate=RATE, options={"bf": "0"})  # fmt: skip
    content = bytearray(path.read_bytes())
    at = content.index(b"elst")  # of the first track, the video
    assert content[at + 4] == 0 and int.from_bytes(content[at + 8 : at + 12], "big") == 1
    content[at + 16 : at + 20] = (10 * 512).to_bytes(4, "big")  # where in the track the edit begins
    path.write_bytes(content)
    with open_video(path) as video:
        whole = video.read(0, video.frames)
        assert [number_of(frame) for frame in whole] == list(range(10, 10 + video.frames))
        assert video.frames == 90
        assert np.array_equal(video.read(70, 80), whole[70:80])
        zero = video.first_timestamp
    # The video moved on by 10 frames, the audio did not: its clicks are where they were on the clock.
    assert np.abs(np.array(click_times(open_audio(path))) + float(zero) - [1, 2, 3]).max() < 0.003


# --- clips ------------------------------------------------------------------------------------------


def blocks(count: int, width: int = 64, height: int = 64):
    for start in range(0, count, 7):
        yield np.stack([numbered(number, width, height) for number in range(start, min(start + 7, count))])


def test_a_clip_is_read_back_frame_for_frame_with_its_audio(tmp_path: Path) -> None:
    audio = clicks(4)[::3]
    assert write_clip(tmp_path / "a.mp4", blocks(90), audio=audio) == 90
    write_clip(tmp_path / "b.mp4", blocks(90), audio=audio)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
    with open_video(tmp_path / "a.mp4") as video:
        assert (video.frames, video.width, video.height, video.warnings) == (90, 64, 64, ())
        want = np.stack([numbered(number) for number in range(90)])
        found = video.read(0, 90)
        assert [number_of(frame) for frame in found] == list(range(90))
        assert np.abs(found.astype(int) - want).mean() < 1
    clicked = click_times(open_audio(tmp_path / "a.mp4"))
    assert np.abs(np.array(clicked) - [1, 2, 3]).max() < 0.003


def test_the_same_frames_are_the_same_bytes_whatever_memory_held_before(tmp_path: Path) -> None:
    """Seen with AVX-512: what the encoder decides came out of memory that nobody wrote. A
    clip's full lookahead shows it at once, a video's of five frames in one of thirty files."""
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((176, 176))
    drifting = np.stack([np.asarray(wide)[i : i + 96, 2 * i : 2 * i + 96] for i in range(22)]).astype(int)
    frames = np.clip(drifting + rng.integers(-3, 4, drifting.shape), 0, 255).astype(np.uint8)
    made, held = set(), []
    for _ in range(8):
        held.append(rng.bytes(rng.integers(1, 3_000_000)))
        del held[:-5]
        write_clip(tmp_path / "a.mp4", [frames])
        made.add((tmp_path / "a.mp4").read_bytes())
    assert len(made) == 1


def test_a_clip_is_visually_lossless_and_keeps_odd_sizes(tmp_path: Path) -> None:
    y, x = np.mgrid[0:57, 0:33]
    smooth = np.stack([x * 7, y * 4, 255 - x * 3 - y * 2], axis=2).clip(0, 255).astype(np.uint8)
    write_clip(tmp_path / "a.mp4", [np.stack([smooth] * 5)])
    with open_video(tmp_path / "a.mp4") as video:
        found = video.read(0, 5)
    assert found.shape == (5, 57, 33, 3)
    error = ((found.astype(float) - smooth) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 42


def test_clips_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "a.mp4", blocks(5))
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(ValueError, match="without frames"):
        write_clip(tmp_path / "a.mp4", [])
    with pytest.raises(ValueError, match="a frame is"):
        write_clip(tmp_path / "a.mp4", [numbered(1)[None], numbered(1, 32, 32)[None]])
    with pytest.raises(OutputRefused):
        write_clip(tmp_path / "no" / "a.mp4", blocks(5))
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_full_disk_leaves_no_clip(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    draw = np.random.default_rng(2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(WriteFailed):
            write_clip(
                tmp_path / "a.mp4", (draw.integers(0, 256, (1, 128, 128, 3), np.uint8) for _ in range(60))
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
