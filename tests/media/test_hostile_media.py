"""Every audio and image row of the hostile corpus, through the loaders, in this process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avatarctl.errors import AvatarctlError, UnusableAudio
from avatarctl.media import AudioSurvey, StillImage, Waveform, load_image, open_audio, open_video, survey

HOSTILE = Path(__file__).resolve().parents[3] / "shared" / "hostile"
MANIFEST = HOSTILE / "manifest.json"
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}

pytestmark = pytest.mark.skipif(not MANIFEST.is_file(), reason="../shared/hostile is absent")


def rows(kind: str) -> list:
    if not MANIFEST.is_file():
        return []
    every = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return [pytest.param(row, id=row["file"]) for row in every if row["kind"] == kind]


def outcome(row: dict, load) -> tuple[int, object]:
    """Exit code and result or error of a loader, with a check that nothing appeared beside the input."""
    path = HOSTILE / row["file"]
    before = sorted(path.parent.iterdir())
    try:
        result: object = load(path)
        code = 0
    except AvatarctlError as error:
        result, code = error, error.exit_code
    assert sorted(path.parent.iterdir()) == before
    return code, result


def check_refusal(row: dict, code: int, result: object) -> bool:
    """Whether the row was refused, with the code and message checked."""
    assert code in row["exit"], f"{code}: {result}"
    if code == 0:
        return False
    message = str(result)
    assert Path(row["file"]).name in message
    assert "\n" not in message
    causes = row.get("message_should_mention", [])
    cause = message.replace(str(HOSTILE / row["file"]), "")  # a name such as empty.wav proves nothing
    assert not causes or any(re.search(want, cause, re.IGNORECASE) for want in causes), message
    return True


LONG = "audio/flac_bomb_25min_8ch.flac"
"""Read by `test_25_minutes_of_8_channels_stay_small`, and from the command line in tests/cli."""


@pytest.mark.parametrize("row", [row for row in rows("audio") if row.values[0]["file"] != LONG])
def test_audio(row: dict) -> None:
    def load(path: Path) -> tuple[AudioSurvey, np.ndarray]:
        audio = open_audio(path)
        found = survey(audio)
        with Waveform(audio) as waveform:
            return found, waveform.read(0, min(found.samples, 48_000))

    code, result = outcome(row, load)
    if check_refusal(row, code, result):
        return
    assert isinstance(result, tuple)
    found, samples = result
    assert np.isfinite(samples).all() and np.isfinite([found.mean, found.variance, found.peak]).all()
    expect = row.get("expect", {})
    if "samples" in expect:
        assert abs(found.samples - expect["samples"]) <= expect["tolerance_samples"]


EXPECTED_LEVELS = {  # right_result of the manifest, in numbers
    "audio/pcm8.wav": lambda found: abs(found.mean) < 0.01 and 0.25 < found.peak < 0.35,
    "audio/pcm24.wav": lambda found: 0.25 < found.peak < 0.35,
    "audio/surround51.wav": lambda found: found.variance > 1e-5,
    "audio/dc_only.wav": lambda found: abs(found.mean - 0.8) < 1e-4 and found.variance < 1e-9,
    "audio/dc_offset.wav": lambda found: abs(found.mean - 0.55) < 0.01,
    "audio/float_peak_3.wav": lambda found: abs(found.peak - 3.0) < 1e-3,
    "audio/silence.wav": lambda found: found.peak == 0.0 and "silence" in found.warnings[0],
    "audio/clipped.wav": lambda found: "clipped" in found.warnings[0],
    "audio/truncated.wav": lambda found: "declares 16000 samples, 9600" in found.warnings[0],
    "audio/claims_2gb.wav": lambda found: "2147483136 bytes" in found.warnings[0],
    "audio/data_size_zero_with_samples.wav": lambda found: "0 samples" in found.warnings[0],
    "good/voice.wav": lambda found: found.warnings == (),
}


@pytest.mark.parametrize("name", EXPECTED_LEVELS)
def test_audio_levels_and_warnings(name: str) -> None:
    found = survey(open_audio(HOSTILE / name))
    assert EXPECTED_LEVELS[name](found), found


@pytest.mark.parametrize(
    "name", ["hls_named.mp4", "hls_absolute.mp4", "sdp_named.mp4", "ffconcat_named.mp4", "html_named.mp4"]
)
def test_playlists_are_no_audio(name: str) -> None:
    with pytest.raises(UnusableAudio, match=name):
        open_audio(HOSTILE / "video" / name)


def test_audio_of_a_video_cut_in_the_middle_is_used_with_a_warning() -> None:
    found = survey(open_audio(HOSTILE / "video" / "cut_mid.mp4"))
    assert 0 < found.samples < 16_000
    assert any("cut short" in warning for warning in found.warnings)


@pytest.mark.parametrize("row", rows("image"))
def test_image(row: dict) -> None:
    code, result = outcome(row, load_image)
    if check_refusal(row, code, result):
        return
    assert isinstance(result, StillImage)
    pixels = result.pixels
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.flags.c_contiguous
    expect = row.get("expect", {})
    if "width" in expect:
        assert (pixels.shape[1], pixels.shape[0]) == (expect["width"], expect["height"])
    if "forbidden_rgb" in expect:
        distance = np.abs(pixels.astype(int) - expect["forbidden_rgb"]).max(axis=2)
        assert distance.min() > 60
    if "mean_min" in expect:
        assert expect["mean_min"] <= pixels.mean() <= expect["mean_max"]
    for index, colour in enumerate(expect.get("quadrants", [])):
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        centre = pixels[height * (index // 2) + height // 2, width * (index % 2) + width // 2].astype(int)
        assert np.abs(centre - COLOURS[colour]).max() < 60, (index, colour, centre)


@pytest.mark.parametrize("row", rows("video"))
def test_video(row: dict, tmp_path: Path) -> None:
    if row.get("needs_links"):  # a name that is not stored: the control clip under it
        (tmp_path / Path(row["file"]).name).write_bytes((HOSTILE / "good" / "clip.mp4").read_bytes())

    def load(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
        with open_video(path if path.exists() else tmp_path / path.name) as video:
            return video.read(0, video.frames), video.warnings

    code, result = outcome(row, load)
    if check_refusal(row, code, result):
        return
    assert isinstance(result, tuple)
    (frames, height, width, _), expect = result[0].shape, row.get("expect", {})
    if "frames_at_25fps" in expect:
        assert abs(frames - expect["frames_at_25fps"]) <= expect.get("tolerance_frames", 0)
    if "width" in expect:
        assert (width, height) == (expect["width"], expect["height"])
    if "display_aspect" in expect:
        assert width / height == expect["display_aspect"]
    for index, colour in enumerate(expect.get("quadrants", [])):
        centre = result[0][0, height // 4 + height // 2 * (index // 2), width // 4 + width // 2 * (index % 2)]
        assert np.abs(centre.astype(int) - COLOURS[colour]).max() < 60, (index, colour, centre)
    said = {"video/cut_mid.mp4": "9 of 25 frames", "video/interlaced.mkv": "interlaced"}.get(row["file"])
    assert [said in line for line in result[1]] == [True] if said else result[1] == ()


SURVEY_AND_READ = """
import re, resource, sys
from pathlib import Path
from avatarctl.media import Waveform, open_audio, survey

def peak():  # KiB; not ru_maxrss where it can be avoided, which begins with that of the parent process
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)

before = peak()
audio = open_audio(sys.argv[1])
found = survey(audio)
with Waveform(audio) as waveform:
    for at in range(0, 300 * 16_000, 160_000):
        waveform.read(at, at + 160_000)
print(found.samples, peak() - before)
"""


def test_25_minutes_of_8_channels_stay_small(tmp_path: Path) -> None:
    """2.3 GB as float32: one survey, and five minutes read forwards, which are 460 MB."""
    path = HOSTILE / LONG
    done = subprocess.run(
        [sys.executable, "-c", SURVEY_AND_READ, path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    samples, grown_kib = map(int, done.stdout.split())
    assert samples == 24_000_000
    assert 0 < grown_kib < 100 * 1024
