"""`avatarctl demo` as it is typed."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from click.testing import CliRunner
from PIL import Image

from avatarctl.cli import app
from avatarctl.demo.voices import speech
from avatarctl.training.run_folder import RunFolder


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    samples = (speech(1_000_005, 13).audio * 32_767).astype("<i2")
    path = tmp_path / "voice.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    return path


def test_a_face_says_a_recording(voice: Path, tmp_path: Path) -> None:
    out = tmp_path / "said.mp4"
    words = ["demo", "--audio", str(voice), "--character", "1000007", "--out", str(out), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["frames"] == 13 and -1 <= told["r_loudness"] <= 1
    with av.open(str(out)) as file:
        assert sum(1 for _ in file.decode(video=0)) == 13
    assert Image.open(told["sheet"]).height > 250, "frames, and both curves below them"
    assert "how loud the audio is" in result.stderr
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "exists" in again.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("demo", "--character", "-1"), "-1 is not in the range"),
        (("demo", "--audio", "nowhere.wav"), "nowhere.wav"),
        (("demo", "build"), "missing option '--out'"),
        (("demo", "benchmark", "--build", "nowhere", "--part", "i2v"), "has no cartoon/"),
        (("demo", "benchmark", "--seed", "5", "--clips", "2", "--part", "vae"), "may have been trained on"),
    ],
)
def test_refused(words: tuple[str, ...], says: str, refused: Callable[..., str]) -> None:
    assert says in refused(2, *words)


def test_a_folder_of_another_seed_is_not_gone_on_with(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "made" / "judge").mkdir(parents=True)
    held = {"made_by": "another", "seed": 1, "part": {}}
    (tmp_path / "made" / "judge" / "build.json").write_text(json.dumps(held))
    assert "judge of another seed, recipe or version" in refused(
        2, "demo", "build", "--out", str(tmp_path), "--short"
    )


def test_a_part_is_not_made_before_its_own_parts(tmp_path: Path, refused: Callable[..., str]) -> None:
    words = ("demo", "build", "--out", str(tmp_path), "--short", "--part", "clips")
    assert "clips: is made out of vae, audio" in refused(2, *words)


def test_a_damaged_record_of_a_build_is_one_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "made" / "vae").mkdir(parents=True)
    (tmp_path / "made" / "vae" / "build.json").write_text("{", encoding="utf-8")
    assert "build.json" in refused(3, "demo", "build", "--out", str(tmp_path), "--short")


def test_a_part_is_made_by_one_process_at_a_time(tmp_path: Path, refused: Callable[..., str]) -> None:
    """Another part may be made beside it."""
    words = ("demo", "build", "--out", str(tmp_path), "--short", "--part")
    with RunFolder(tmp_path / "made" / "vae").held():
        assert "another run" in refused(2, *words, "vae")
        assert "clips: is made out of" in refused(2, *words, "clips")
