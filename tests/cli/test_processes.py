"""`avatarctl` as a process of its own: imports, signals, limits, pipes, privileges, memory.

Each start costs seconds of imports. So there are few, and those that are about what comes later are forks of
one process that has the imports behind it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.cli.forks import Fork, Forks
from tests.helpers_video import count_frames, probe_video

SMALL = ("-o", "output.width=16", "-o", "output.height=16", "--num-frames", "9")
TINY = (*SMALL, "--steps", "1")
CHUNKS = (*SMALL, "--model", "cartoon-i2v", "--overlap", "1")
"""Chunks of 9 frames; each later one brings 8."""
WINDOWS = (*SMALL, "--model", "stableavatar-tiny")
"""Windows of 9 frames that share 5; the first frame is final first, then 4 at a time."""
HOSTILE = Path(__file__).resolve().parents[3] / "shared" / "hostile"
NOBODY = 65_534

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX systems")


def command(*words: str) -> list[str]:
    """The console script as it is installed, or the module where there is none."""
    script = Path(sys.executable).with_name("avatarctl")
    return [str(script), *words] if script.exists() else [sys.executable, "-m", "avatarctl", *words]


def run(words: list[str], folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(words, cwd=folder, text=True, encoding="utf-8", timeout=300, **piped)  # type: ignore[call-overload]


def error_of(stderr: str) -> str:
    """The text of the only error line, which is the last; no traceback."""
    assert "Traceback" not in stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert errors == stderr.splitlines()[-1:], stderr
    return errors[0].removeprefix("error: ")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder whose name has spaces and letters beyond ASCII."""
    folder = tmp_path / "mein Ördner 日本"
    folder.mkdir()
    return folder


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """60 s of noise: far more chunks than any test waits for."""
    path = tmp_path / "speech.wav"
    soundfile.write(path, np.random.default_rng(0).standard_normal(960_000) * 0.1, 16_000)
    return path


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as made:
        yield made


@contextlib.contextmanager
def said(process: Fork, wait_for: str) -> Iterator[None]:
    """While a process is alive that has just said `wait_for` on stderr."""
    try:
        for line in process.stderr:
            if re.search(wait_for, line):
                break
        else:
            pytest.fail(f"ended with {process.wait()} before it said {wait_for!r}")
        yield
    finally:
        process.kill()
        process.wait()


def stopped(process: Fork, wait_for: str, number: signal.Signals) -> tuple[int | None, str, str]:
    """Exit code, stdout and the rest of stderr after a signal sent at `wait_for`."""
    with said(process, wait_for):
        process.send_signal(number)
        stdout, stderr = process.communicate()
    return process.returncode, stdout, stderr


HELP = """
import contextlib, io, sys
from avatarctl.cli import app
for words in (["--help"], ["infer", "--help"], ["models", "--help"], ["infer", "--steps", "x"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            app.main(words)
        except SystemExit:
            pass
heavy = {"torch", "numpy", "diffusers", "transformers", "av", "soundfile", "PIL", "rich"}
print(sorted(heavy & sys.modules.keys()))
"""


def test_help_and_refusals_import_nothing_heavy(here: Path) -> None:
    assert run([sys.executable, "-c", HELP], here).stdout == "[]\n"


def test_module_and_hostile_configuration(here: Path) -> None:
    canary = here.parent / "canary"
    config = here / "a\x1b[31m\nb.yaml"
    tag = f"!!python/object/apply:os.system ['touch {canary}']"
    config.write_text(f"runtime:\n  seed: {tag}\n", encoding="utf-8")
    found = run([sys.executable, "-m", "avatarctl", "infer", "--config", config.name], here)
    assert found.returncode == 2 and found.stdout == ""
    assert error_of(found.stderr).startswith(r"a\x1b[31m\nb.yaml:2: YAML tag")
    assert not canary.exists() and names(here) == [config.name]


def test_without_inputs_on_a_fresh_machine(here: Path, forks: Forks) -> None:
    """`make demo` runs `avatarctl infer --chunked` as typed: an interpreter of its own, and all steps."""
    process = forks.start("infer", "--chunked", "--steps", "2", folder=here)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    (line,) = stdout.splitlines()
    path = Path(line)
    assert path.is_absolute() and path.is_relative_to(here) and path.suffix == ".mp4"
    video = probe_video(path)
    assert (video.frames, video.width, video.height, video.fps) == (100, 64, 64, 25)
    assert abs(video.audio_seconds - 4.0) <= 1024 / video.audio_rate and video.steady
    assert names(path.parent) == ["video.mp4", "video.run.yaml", "video.sheet.png"]
    assert "untrained" not in stderr
    assert "\x1b" not in stderr, "no colours and no cursor movements in a log"


@pytest.mark.parametrize(
    ("model", "number", "finished"),
    [
        (CHUNKS, signal.SIGINT, 9 + 8 + 8),
        (CHUNKS, signal.SIGTERM, 9 + 8 + 8),
        (WINDOWS, signal.SIGTERM, 1 + 4 + 4),
        (WINDOWS, signal.SIGHUP, 1 + 4 + 4),
    ],
    ids=["chunks-INT", "chunks-TERM", "windows-TERM", "windows-HUP"],
)
def test_signal_in_the_middle_keeps_the_playable_part(
    model: tuple[str, ...], number: signal.Signals, finished: int, here: Path, speech: Path, forks: Forks
) -> None:
    words = ("infer", *model, "--steps", "2", "--audio", str(speech), "--out", "ein Clip ü.mp4")
    code, stdout, stderr = stopped(forks.start(*words, folder=here), "^(chunk|window) 3 of", number)
    assert code == 6 and stdout == ""
    error = error_of(stderr)
    match = re.search(r"the finished part, (\d+) frames, is kept as (ein Clip ü\.partial\.mp4)", error)
    assert match is not None, error
    assert int(match[1]) >= finished
    assert count_frames(here / match[2]) == int(match[1])
    assert probe_video(here / match[2]).audio_seconds > (finished - 1) / 25
    assert names(here) == ["ein Clip ü.partial.mp4"]


def test_a_run_that_is_killed_while_weights_move_leaves_its_playable_part(
    here: Path, speech: Path, forks: Forks
) -> None:
    """In mode sequential weights are on their way nearly all the time."""
    words = (
        "infer",
        *CHUNKS,
        "--steps",
        "2",
        "--memory",
        "sequential",
        "--audio",
        str(speech),
        "--out",
        "a.mp4",
    )
    code, stdout, _ = stopped(forks.start(*words, folder=here), "^chunk 5 of", signal.SIGKILL)
    assert code == -signal.SIGKILL and stdout == ""
    assert names(here) == ["a.partial.mp4"]
    assert count_frames(here / "a.partial.mp4") >= 9, (
        "the encoder works behind; the first of five chunks is in the file"
    )


@pytest.mark.parametrize("model", [CHUNKS, WINDOWS], ids=["chunks", "windows"])
def test_signal_before_the_first_frame_leaves_nothing(
    model: tuple[str, ...], here: Path, speech: Path, forks: Forks
) -> None:
    # With so many steps the first frame takes its time.
    words = ("infer", *model, "--steps", "1000", "--audio", str(speech), "--out", "new/deep/a.mp4")
    process = forks.start(*words, folder=here)
    code, stdout, stderr = stopped(process, "frames of 16x16 at 25 fps", signal.SIGTERM)
    assert code == 6 and stdout == ""
    assert "kept" not in error_of(stderr)
    assert names(here) == []


TERMINATED = """
import os, signal, sys
import click
from avatarctl.cli import main
echo, signals = click.echo, [signal.SIGTERM]
click.echo = lambda *words, **how: os.kill(os.getpid(), signals.pop()) if signals else echo(*words, **how)
sys.argv[1:] = ["models", "list"]
main()
"""


def test_terminated_while_no_job_runs(here: Path) -> None:
    found = run([sys.executable, "-c", TERMINATED], here)
    assert (found.returncode, found.stdout) == (6, "")
    assert error_of(found.stderr) == "interrupted"


@pytest.mark.parametrize(
    ("model", "finished"),
    # Two blocks may wait for the encoder, and it holds back eight frames.
    [(CHUNKS, 9 + 5 * 8 - 2 * 8 - 8), (WINDOWS, 1 + 5 * 4 - 2 * 4 - 8)],
    ids=["chunks", "windows"],
)
def test_killed_process_leaves_no_final_name(
    model: tuple[str, ...], finished: int, here: Path, speech: Path, forks: Forks
) -> None:
    words = ("infer", *model, "--steps", "2", "--audio", str(speech), "--out", "a.mp4")
    process = forks.start(*words, folder=here)
    with said(process, "^(chunk|window) 6 of"):
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert names(here) == ["a.partial.mp4"]
    assert count_frames(here / "a.partial.mp4") >= finished


def test_full_disk_is_one_line(here: Path, speech: Path, forks: Forks) -> None:
    words = ("infer", *TINY, "--audio", str(speech), "--out", "a.mp4")
    process, stdout, stderr = forks.run(*words, folder=here, file_bytes=20_000)
    assert process.returncode == 3 and stdout == ""
    assert "a.partial.mp4: no space left" in error_of(stderr)
    assert names(here) == ["a.partial.mp4"]
    assert count_frames(here / "a.partial.mp4") > 0


@pytest.fixture
def sealed(speech: Path) -> Iterator[Path]:
    """A folder that an unprivileged user can enter and not write."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders cannot be entered by others
    shutil.copy(speech, folder / "speech.wav")
    (folder / "speech.wav").chmod(0o644)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_read_only_folder(sealed: Path, forks: Forks) -> None:
    """An unprivileged user may not be able to read our packages: a fork has them."""
    words = ("infer", *TINY, "--audio", "speech.wav", "--out", "a.mp4")
    process, stdout, stderr = forks.run(*words, folder=sealed, user=NOBODY)
    assert process.returncode == 2 and stdout == "", stderr
    assert "no permission to write" in error_of(stderr)
    assert names(sealed) == ["speech.wav"]


def test_a_cache_that_is_not_ours_to_enter(sealed: Path, forks: Forks) -> None:
    """As root's, which HOME names in many a container of another user."""
    sealed.chmod(0o700 if os.geteuid() == 0 else 0)
    env = {"MODELSCOPE_CACHE": str(sealed), "HOME": None}
    words = ("models", "show", "wan2.1-t2v-1.3b")
    process, stdout, stderr = forks.run(*words, folder=Path("/"), user=NOBODY, env=env)
    assert (process.returncode, stderr) == (0, ""), stderr
    assert "missing    Wan2.1_VAE.pth" in stdout


def test_hostile_image_with_a_hostile_name(here: Path, forks: Forks) -> None:
    image = here / "a\x1b]0;b\x07\r\u202e.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    process, stdout, stderr = forks.run("infer", "--image", image.name, "--out", "a.mp4", folder=here)
    assert process.returncode == 3 and stdout == ""
    error = error_of(stderr)
    assert error.startswith(r"a\x1b]0;b\x07\r\u202e.png: ")
    assert stderr.replace("\n", "").isprintable()
    assert names(here) == [image.name]


def test_long_compressed_silence_in_little_memory(here: Path, forks: Forks) -> None:
    """25 minutes of 8 channels: 1.1 GB as samples, a few kilobytes as FLAC."""
    audio = HOSTILE / "audio" / "flac_bomb_25min_8ch.flac"
    if not audio.is_file():
        audio = here.parent / "bomb.flac"
        with soundfile.SoundFile(audio, "w", 48_000, 8, "PCM_16") as file:
            for _ in range(25 * 60):
                file.write(np.zeros((48_000, 8), np.int16))
    words = ("infer", "--dry-run", "--json", "--audio", str(audio))
    process, stdout, stderr = forks.run(*words, folder=here)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["frames"] == 25 * 60 * 25
    assert 0 < process.peak_bytes < 1.5 * 2**30
    assert names(here) == []


def test_a_reader_that_goes_away(here: Path, read_end_closed: Callable[[], int]) -> None:
    descriptor = read_end_closed()
    found = subprocess.run(command("models", "list"), cwd=here, stdout=descriptor, stderr=subprocess.PIPE)
    assert (found.returncode, found.stderr) == (0, b"")


def test_a_reader_of_errors_that_goes_away(here: Path, read_end_closed: Callable[[], int]) -> None:
    descriptor = read_end_closed()
    found = subprocess.run(command("infr"), cwd=here, stderr=descriptor, stdout=subprocess.PIPE)
    assert (found.returncode, found.stdout) == (2, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_behind_the_streams(here: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        for unbuffered in ("", "1"):
            told = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
            found = run(command("models", "list"), here, stdout=full, env=told)
            assert found.returncode == 3
            assert error_of(found.stderr) == "standard output: no space left on device"
        found = run(command("infr"), here, stderr=full)
        assert (found.returncode, found.stdout) == (2, "")


def test_streams_that_were_closed(here: Path) -> None:
    words = " ".join(map(shlex.quote, command("models", "list")))
    for closed in ("2>&-", "<&- 2>&-"):
        assert "omniavatar-14b" in run(["sh", "-c", f"{words} {closed}"], here).stdout
    found = run(["sh", "-c", f"{words} >&-"], here)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.fixture
def read_end_closed() -> Iterator[Callable[[], int]]:
    opened = []

    def make() -> int:
        read, write = os.pipe()
        os.close(read)
        opened.append(write)
        return write

    yield make
    for descriptor in opened:
        os.close(descriptor)
