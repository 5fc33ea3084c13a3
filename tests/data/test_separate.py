"""`avatarctl separate` as it is typed: what it reads, writes, passes over and refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import Result

from avatarctl.data.mixes import find_mixes
from avatarctl.data.separate import Separation
from avatarctl.errors import Interrupted
from avatarctl.events import Event, PartDone, silent
from avatarctl.media import open_audio
from avatarctl.perception.separation import SpectralGate
from tests.data.conftest import SMALL, contents, run, talking
from tests.perception.mixes import mixed, si_sdr, voice
from tests.perception.onnx_file import write_onnx
from tests.repeats import repeats

HOSTILE = Path(__file__).resolve().parents[3] / "shared" / "hostile"
LONG = "audio/flac_bomb_25min_8ch.flac"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AVATARCTL_WEIGHTS", raising=False)
    return tmp_path


def separate(*words: object) -> Result:
    ended = run("separate", *words)
    assert ended.exit_code != 1, ended.output
    assert "Traceback" not in ended.output and ended.output.replace("\n", "").isprintable()
    assert not list(Path().rglob(".tmp-*"))
    return ended


def refused(code: int, *words: object) -> str:
    """The one line of the error."""
    ended = separate(*words)
    assert ended.exit_code == code and ended.stdout == "", ended.output
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    return line


def wav(path: Path, samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype)
    return path


def read(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="float32", always_2d=True)[0]


def hum(seconds: float = 0.5, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    wave = 0.3 * np.sin(np.arange(int(seconds * rate)) * 0.05)
    return np.repeat(wave[:, None], channels, axis=1)


def test_a_mix_becomes_a_voice(here: Path) -> None:
    """Stereo at 48 kHz: 16 kHz mono in 16 bits out, and stems that add up to the mix."""
    spoken = voice(1, 200)
    mix = mixed(spoken, 16_000)
    mix, spoken = mix / np.abs(mix).max() / 2, spoken / np.abs(mix).max() / 2
    stereo = np.stack([mix, mix], axis=1)
    wav(here / "mix.wav", stereo, subtype="FLOAT")
    ended = separate("mix.wav", "--out", "voice.wav", "--backend", "dsp", "--stems", "--json")
    assert ended.exit_code == 0, ended.output
    assert "demo-quality spectral gate, not a neural separator" in ended.stderr
    told = json.loads(ended.stdout)
    assert told["method"] == "dsp-gate" and told["done"] == 1
    assert told["files"][0]["files"] == ["voice.wav", "voice.speech.wav", "voice.rest.wav"]
    facts = soundfile.info("voice.wav")
    assert (facts.samplerate, facts.channels, facts.subtype) == (16_000, 1, "PCM_16")
    assert facts.frames == len(spoken)
    assert si_sdr(read(here / "voice.wav")[:, 0], spoken) >= si_sdr(mix, spoken) + 4
    speech, rest = read(here / "voice.speech.wav"), read(here / "voice.rest.wav")
    np.testing.assert_allclose(speech + rest, stereo, atol=1e-6)

    alone = separate("mix.wav", "--out", "alone.wav", "--backend", "dsp")
    assert alone.stdout == "alone.wav\n"
    assert np.array_equal(read(here / "alone.wav"), read(here / "voice.wav")), "the same without stems"


def test_none_gives_the_samples_of_our_reader(here: Path) -> None:
    numbers = np.random.default_rng(0).integers(-32768, 32768, (5000, 1), dtype=np.int16)
    wav(here / "exact.wav", numbers)
    assert separate("exact.wav", "--out", "vocal.wav", "--backend", "none").exit_code == 0
    assert np.array_equal(soundfile.read("vocal.wav", dtype="int16", always_2d=True)[0], numbers)

    head = (here / "vocal.wav").read_bytes()[:44]
    assert head[36:40] == b"data", "what made it is said behind the samples"

    talking(here / "talk.mp4", 1, 30)
    assert separate("talk.mp4", "--out", "taken", "--backend", "none", "--stems").exit_code == 0
    assert sorted(path.name for path in Path("taken").iterdir()) == ["speech.wav", "vocal.wav"], (
        "without a rest"
    )
    audio = open_audio(here / "talk.mp4")
    assert np.array_equal(read(here / "taken/speech.wav"), np.concatenate(list(audio.blocks())))
    assert soundfile.info("taken/speech.wav").samplerate == audio.rate


@pytest.mark.parametrize("rate", repeats([16_000, 44_100], [48_000]))
def test_the_network_as_it_is_fetched(rate: int, here: Path) -> None:
    """One that changes nothing; in the folder that `models pull` fills, by an option or the environment."""
    pytest.importorskip("onnxruntime", reason="the extra `separate` is not installed")
    (here / "weights/StableAvatar").mkdir(parents=True)
    network = write_onnx(here / "weights/StableAvatar/Kim_Vocal_2.onnx")
    time = np.arange(rate) / rate
    sides = 0.4 * np.sin(2 * np.pi * 440 * time[:, None]) * [1.0, 0.5] * np.sin(np.pi * time)[:, None]
    wav(here / "mix.wav", sides, rate, "FLOAT")
    words = ("mix.wav", "--out", "voice.wav", "--stems", "--json")
    ended = separate(*words, "--weights-root", "weights")
    assert ended.exit_code == 0 and json.loads(ended.stdout)["method"] == "mdx-onnx", ended.output
    expected = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    expected *= np.sin(np.pi * np.arange(16_000) / 16_000)
    np.testing.assert_allclose(read(here / "voice.wav")[:, 0], expected, atol=3e-4)
    facts = soundfile.info("voice.speech.wav")
    assert (facts.samplerate, facts.channels, facts.frames) == (44_100, 2, 44_100)
    speech, rest = read(here / "voice.speech.wav"), read(here / "voice.rest.wav")
    np.testing.assert_allclose(rest, -0.009 * speech, atol=2e-4, err_msg="the mix without 1.009 of it")
    assert json.loads(separate(*words, "--weights", f"mdx={network}").stdout)["skipped"] == 1


def test_without_the_network_or_onnxruntime(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wav(here / "mix.wav", hum())
    line = refused(4, "mix.wav", "--out", "voice.wav")
    for words in (
        "Kim_Vocal_2.onnx",
        "models pull kim-vocal-2",
        "mdx=PATH",
        "--backend dsp",
        "--backend none",
    ):
        assert words in line
    planned = separate("mix.wav", "--out", "voice.wav", "--dry-run")
    assert planned.exit_code == 0 and planned.stdout == "voice.wav: make\n"
    assert "Kim_Vocal_2.onnx" in planned.stderr
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    network = write_onnx(here / "net.onnx")
    line = refused(4, "mix.wav", "--out", "voice.wav", "--weights", f"mdx={network}")
    assert "avatarctl[separate]" in line and "--backend dsp" in line
    assert not (here / "voice.wav").exists()


@pytest.mark.parametrize("code", [2, 3])
def test_a_file_that_is_not_the_network(code: int, here: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `separate` is not installed")
    wav(here / "mix.wav", hum())
    (here / "folder").mkdir()
    (here / "text.onnx").write_text("no network")
    write_onnx(here / "other.onnx", shape=(1, 4, 2048, 256))
    for name in {2: ("absent.onnx",), 3: ("folder", "text.onnx", "other.onnx")}[code]:
        line = refused(code, "mix.wav", "--out", "voice.wav", "--weights", f"mdx={name}")
        assert line.startswith(f"error: {name}: ") and not (here / "voice.wav").exists()


def test_one_bad_file_among_others(here: Path) -> None:
    wav(here / "talks/good.wav", hum())
    wav(here / "talks/below/good.wav", hum(rate=44_100, channels=2), 44_100)
    (here / "talks/bad.mp3").write_text("no audio at all")
    (here / "talks/notes.txt").write_text("not looked at")
    ended = separate("talks", "--out", "talks/voices", "--backend", "none", "--json")
    assert ended.exit_code == 7, ended.output
    assert "warning: talks/bad.mp3: " in ended.stderr and "error: 1 of 3 files failed" in ended.stderr
    assert all(line.count("bad.mp3") == 1 for line in ended.stderr.splitlines()), "named once in a line"
    told = json.loads(ended.stdout)
    assert [each["state"] for each in told["files"]] == ["failed", "done", "done"]
    made = {path.relative_to("talks/voices").as_posix() for path in Path("talks/voices").rglob("*.wav")}
    assert {"good.wav/vocal.wav", "below/good.wav/vocal.wav"} == {
        name for name in made if not (here / "talks/voices" / name).is_dir()
    }
    again = json.loads(separate("talks", "--out", "talks/voices", "--backend", "none", "--json").stdout)
    assert (again["skipped"], again["failed"]) == (2, 1), "what is done is not done again, nor read as a mix"


def test_nothing_but_bad_files(here: Path) -> None:
    for name in ("a.wav", "b.wav"):
        (here / "talks").mkdir(exist_ok=True)
        (here / "talks" / name).write_text("no audio at all")
    assert "no audio could be used: the first: talks/a.wav: not an" in refused(
        3, "talks", "--out", "o", "--backend", "none"
    )
    assert not (here / "o").exists()
    (here / "empty").mkdir()
    assert "holds neither samples nor" in refused(3, "empty", "--out", "o", "--backend", "none")


def test_only_what_it_wrote_is_replaced(here: Path) -> None:
    wav(here / "mix.wav", hum())
    words = ("mix.wav", "--out", "voice.wav", "--backend")
    wav(here / "voice.wav", hum(0.1))
    before = (here / "voice.wav").read_bytes()
    assert "did not write it" in refused(2, *words, "none")
    assert (here / "voice.wav").read_bytes() == before
    assert separate(*words, "none", "--overwrite").exit_code == 0
    first = (here / "voice.wav").read_bytes()
    assert first != before

    def state(*more: str) -> str:
        found: str = json.loads(separate(*words, *more, "--json").stdout)["files"][0]["state"]
        return found

    assert state("none") == "skipped" and state("none", "--overwrite") == "done"
    assert state("dsp") == "done", "another method"
    assert state("dsp", "--stems") == "done" and state("dsp", "--stems") == "skipped"
    assert state("dsp") == "skipped"
    wav(here / "mix.wav", hum(0.6))
    assert state("dsp") == "done", "another source"
    assert "is what is read" in refused(
        2, "mix.wav", "--out", "./mix.wav", "--backend", "none", "--overwrite"
    )


def test_sample_folders_and_what_drives_training(here: Path) -> None:
    folders = [here / "samples/one", here / "samples/below/two"]
    for folder in folders:
        talking(folder / "sub_clip.mp4", 1, 9)
        (folder / "prompt.txt").write_text("a person is talking")
    wav(folders[0] / "audio.wav", voice(1, 9))  # of the other it is the audio of its video
    ended = separate("samples", "--backend", "none")
    assert ended.exit_code == 0 and ended.stdout == "samples\n", ended.output
    assert np.array_equal(read(folders[0] / "vocal.wav"), read(folders[0] / "audio.wav"))
    assert soundfile.info(folders[1] / "vocal.wav").frames >= 9 * 640
    again = json.loads(separate("samples", "--backend", "none", "--out", "samples", "--json").stdout)
    assert again["skipped"] == 2
    assert separate("samples", "--backend", "none", "--out", "elsewhere").exit_code == 0
    assert len(list(Path("elsewhere").rglob("vocal.wav"))) == 2

    (folders[0] / "vocal.wav").unlink()
    partly = run("precompute-audio", "--data", "samples", *SMALL, "--audio-name", "vocal.wav")
    assert partly.exit_code == 7 and "vocal.wav" in partly.stderr, "audio.wav does not stand in for it"
    assert [path.parent.name for path in Path("samples").rglob("audio_features.safetensors")] == ["two"]


def test_lists(here: Path) -> None:
    wav(here / "a/talk.wav", hum())
    wav(here / "b.wav", hum())
    talking(here / "c.mp4", 1, 9, audio=False)
    (here / "list.txt").write_text("a/talk.wav\nwhat is said@@c.mp4@@b.wav\na/../b.wav\nb.wav\nabsent.wav\n")
    ended = separate("list.txt", "--out", "o", "--backend", "none", "--json")
    assert ended.exit_code == 7
    told = json.loads(ended.stdout)["files"]
    assert [(each["name"], each["state"]) for each in told] == [
        ("a/talk.wav", "done"),
        ("c.mp4", "done"),
        ("b.wav", "done"),
        ("b.wav", "failed"),
        ("absent.wav", "failed"),
    ]
    assert sorted(path.parent.as_posix() for path in Path("o").rglob("vocal.wav")) == [
        "o/a/talk.wav", "o/b.wav", "o/c.mp4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "words", "said"),
    [
        (2, ("absent.wav", "--out", "o"), "no such file"),
        (2, ("mix.wav",), "add --out"),
        (2, ("folder",), "add --out"),
        (2, ("folder", "--out", "o.wav"), "name a folder"),
        (2, ("mix.wav", "--out", "o.mp3"), "written as WAV"),
        (2, ("", "--out", "o.wav"), "IN: is empty"),
        (2, ("mix.wav", "--out", ""), "--out: is empty"),
        (2, ("mix.wav", "--out", "o.wav", "--weights", "mdx=a.onnx"), "has no meaning with --backend none"),
        (2, ("mix.wav", "--out", "o.wav", "--audio-name", "vocal.wav"), "what is written"),
        (2, ("mix.wav", "--out", "mix.wav/o.wav"), "is a file, not a folder"),
    ],
)
def test_requests_without_sense(code: int, words: tuple[str, ...], said: str, here: Path) -> None:
    wav(here / "mix.wav", hum())
    wav(here / "folder/mix.wav", hum())
    before = contents(here)
    assert said in refused(code, *words, "--backend", "none")
    assert contents(here) == before


def test_weights_by_name(here: Path) -> None:
    wav(here / "mix.wav", hum())
    for text in ("a.onnx", "dit=a.onnx", "mdx="):
        assert "expected mdx=PATH" in refused(2, "mix.wav", "--out", "o.wav", "--weights", text)


def rows() -> list[Any]:
    if not (HOSTILE / "manifest.json").is_file():
        return [pytest.param({}, marks=pytest.mark.skip("../shared/hostile is absent"))]
    every = json.loads((HOSTILE / "manifest.json").read_text(encoding="utf-8"))
    return [pytest.param(row, id=row["file"]) for row in every if "separate" in row["consumers"]]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that changes nothing."""
    return write_onnx(tmp_path_factory.mktemp("network") / "net.onnx")


@pytest.mark.parametrize("backend", ["mdx-onnx", "dsp", "none"])
@pytest.mark.parametrize("row", rows())
def test_hostile_audio(row: dict[str, Any], backend: str, here: Path, network: Path) -> None:
    if row["file"] == LONG:
        pytest.skip("25 minutes of 8 channels take half a minute; their memory is that of any length")
    weights: tuple[str, ...] = ()
    if backend == "mdx-onnx":
        pytest.importorskip("onnxruntime", reason="the extra `separate` is not installed")
        weights = ("--weights", f"mdx={network}")
    ended = separate(HOSTILE / row["file"], "--out", "vocal.wav", "--backend", backend, *weights)
    assert ended.exit_code in row["exit"], ended.output
    for raw in row.get("output_must_not_contain", []):
        assert raw not in ended.output
    if ended.exit_code:
        assert not list(here.iterdir())
        wanted = row.get("message_should_mention", [])
        cause = ended.stderr.replace(str(HOSTILE), "").replace(row["file"], "")
        assert Path(row["file"]).name in ended.stderr
        assert not wanted or any(re.search(want, cause, re.IGNORECASE) for want in wanted), cause
        return
    facts, expect = soundfile.info("vocal.wav"), row.get("expect", {})
    assert (facts.samplerate, facts.channels, facts.subtype) == (16_000, 1, "PCM_16")
    if "samples" in expect:
        assert abs(facts.frames - expect["samples"]) <= expect["tolerance_samples"]


def long_work(here: Path, should_stop: Callable[[], bool], told: list[PartDone] | None = None) -> None:
    """Two mixes of 15 s with stems."""
    for name in ("a.wav", "b.wav"):
        wav(here / "talks" / name, hum(15.0))
    mixes = find_mixes(here / "talks", here / "out", "audio.wav", silent)

    def emit(event: Event) -> None:
        if told is not None and isinstance(event, PartDone):
            told.append(event)

    Separation(SpectralGate(), emit, should_stop, stems=True).run(mixes)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often the work asks whether to stop."""
    asked = []
    long_work(tmp_path_factory.mktemp("undisturbed"), lambda: bool(asked.append(None)))
    return len(asked)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("share", repeats([0.01, 0.6], [0.45]))
def test_killed_at_any_moment(share: float, steps: int, here: Path) -> None:
    """Files are whole or absent under their names, and the same command finishes."""
    child = os.fork()
    if child == 0:
        left = iter(range(int(share * steps)))
        try:
            long_work(here, lambda: next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL) is None)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    whole = {path: path.read_bytes() for path in (here / "out").glob("*.wav/*.wav")}
    assert len(whole) == (3 if share > 0.5 else 0)
    assert all(soundfile.info(path).frames == 15 * 16_000 for path in whole)
    ended = separate("talks", "--out", "out", "--backend", "dsp", "--stems")
    assert ended.exit_code == 0, ended.output
    assert len(list((here / "out").glob("*.wav/*.wav"))) == 6
    assert all(path.read_bytes() == before for path, before in whole.items())


def test_stopped_by_a_signal(here: Path, steps: int) -> None:
    left = iter(range(int(0.6 * steps)))
    with pytest.raises(Interrupted):
        long_work(here, lambda: next(left, None) is None)
    made = sorted(path.name for path in (here / "out/a.wav").iterdir())
    assert made == ["rest.wav", "speech.wav", "vocal.wav"]
    assert not list((here / "out").rglob(".tmp-*")) and not list((here / "out").glob("b.wav/*"))


def test_progress_over_all_files(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the work is done with the first of two equal files."""
    monkeypatch.setattr("avatarctl.data.separate._OFTEN", 0.0)
    told: list[PartDone] = []
    long_work(here, lambda: False, told)
    shares = [each.done for each in told]
    assert shares == sorted(shares) and 0 < shares[0] < 0.2 and shares[-1] == pytest.approx(1.0)
    assert max(each.done for each in told if each.what == "1 of 2: a.wav") == pytest.approx(0.5)
    assert all(each.seconds_left >= 0 for each in told) and told[-1].seconds_left == pytest.approx(
        0, abs=1e-6
    )


def test_progress_goes_by_seconds_of_audio(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by bytes, of which stereo has twice as many, nor by files: what is done already or cannot be
    used is no work, and a length that a header leaves open is told by the bytes."""
    monkeypatch.setattr("avatarctl.data.separate._OFTEN", 0.0)
    wav(here / "talks/a.wav", hum(6.0))
    wav(here / "talks/b.wav", hum(6.0, channels=2))
    wav(here / "talks/done.wav", hum(6.0))
    (here / "talks/bad.wav").write_bytes(b"no audio at all" * 10_000)
    told: list[PartDone] = []

    def emit(event: Event) -> None:
        if isinstance(event, PartDone):
            told.append(event)

    def run_all(names: tuple[str, ...]) -> dict[str, float]:
        """How much of the work was done with the last word about each."""
        told.clear()
        mixes = find_mixes(here / "talks", here / "out", "audio.wav", silent)
        chosen = [mix for mix in mixes if mix.name in names]
        Separation(SpectralGate(), emit, lambda: False).run(chosen)
        assert [each.done for each in told] == sorted(each.done for each in told)
        return {each.what.split(": ")[1]: each.done for each in told if ": " in each.what}

    assert run_all(("done.wav",)) == {}  # of one alone the file's name is all that is said
    shares = run_all(("a.wav", "b.wav", "bad.wav", "done.wav"))
    assert shares == {"a.wav": pytest.approx(0.5, abs=0.01), "b.wav": pytest.approx(1.0, abs=1e-3)}
    header = bytearray((here / "talks/a.wav").read_bytes())
    header[4:8] = header[40:44] = bytes(4)  # as a recorder leaves it that was interrupted
    (here / "talks/c.wav").write_bytes(header)
    wav(here / "talks/d.wav", hum(6.1))
    shares = run_all(("c.wav", "d.wav", "done.wav"))
    assert shares == {"c.wav": pytest.approx(0.5, abs=0.01), "d.wav": pytest.approx(1.0, abs=1e-3)}


def test_demo_quality_is_said_once_where_something_is_made(here: Path) -> None:
    for name in ("a.wav", "b.wav"):
        wav(here / "talks" / name, hum())
    words = ("talks", "--out", "o", "--backend", "dsp")
    said = "demo-quality"
    assert said not in separate(*words, "--dry-run").stderr
    assert separate(*words).stderr.count(said) == 1
    assert said not in separate(*words).stderr, "all of it is done already"
    wav(here / "talks/c.wav", hum())
    assert separate(*words).stderr.count(said) == 1
    (here / "bad.wav").write_text("no audio at all")
    assert said not in separate("bad.wav", "--out", "bad.vocal.wav", "--backend", "dsp").stderr
