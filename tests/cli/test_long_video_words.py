"""The words of long video mean the same for every family; what a family has not is refused by name.

The built-in models stand for the two families: one makes long videos in chunks, one in windows that are
blended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from click.testing import Result

from avatarctl.loading.sources import Sources

CHUNKS, FUSED = "cartoon-i2v", "stableavatar-tiny"
Run = Callable[..., Result]
Refused = Callable[..., str]


def dry(model: str, voice: Path, words: str) -> tuple[str, ...]:
    return ("infer", "--dry-run", "--model", model, "--audio", str(voice), *words.split())


@pytest.mark.parametrize(
    ("model", "words", "kind"),
    [
        (CHUNKS, "", "chunks"),
        (CHUNKS, "--chunked", "chunks"),
        (CHUNKS, "--long-video chunks --carry pixels", "chunks"),
        (CHUNKS, "--long-video off", "chunks"),
        (CHUNKS, "--no-batch-branches", "chunks"),
        (FUSED, "", "fused"),
        (FUSED, "--long-video fused", "fused"),
        (FUSED, "--long-video off", "fused"),
        (FUSED, "--long-video off --num-frames 33 --overlap 37", "fused"),
        (FUSED, "--overlap 0", "fused"),
        (FUSED, "--overlap 13", "fused"),
        (FUSED, "-o long_video.schedule=wavefront -o long_video.blend=log", "fused"),
        (FUSED, "-o sampling.null_audio=projected_silence", "fused"),
        (FUSED, "--guidance-rule native --batch-branches --latents-dtype bfloat16", "fused"),
        (FUSED, "--compat reference --size 80x48", "fused"),
    ],
)
def test_accepted(model: str, words: str, kind: str, run: Run, voice: Path, here: Path) -> None:
    result = run(*dry(model, voice, words), "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert (plan["model"], plan["strategy"], plan["spans"]) == (model, kind, 1)
    # Under compat reference only whole groups of four frames behind the first are made.
    assert plan["frames"] == (9 if "reference" in words else 13)
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("model", "words", "order"),
    [
        (FUSED, "--steps 2", "wavefront"),  # three windows, of which it keeps two
        (FUSED, "--steps 9", "step"),
        (FUSED, "--steps 2 --schedule step", "step"),
        (FUSED, "--steps 9 --schedule wavefront", "wavefront"),
        (CHUNKS, "--steps 2", None),
    ],
)
def test_a_dry_run_says_the_order_of_the_windows(
    model: str, words: str, order: str | None, run: Run, here: Path, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "long.wav", np.full(640 * 41, 0.1, np.float32), 16_000)
    result = run(*dry(model, tmp_path / "long.wav", f"{words} -o long_video.num_frames=17"))
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("schedule: ")]
    assert lines == ([f"schedule: {order}"] if order else [])


OFFERS = {CHUNKS: "omniavatar offers off and chunks", FUSED: "stableavatar offers off and fused"}


@pytest.mark.parametrize(
    ("model", "words", "says"),
    [
        (CHUNKS, "--long-video fused", ("long_video.strategy", "no fused", OFFERS[CHUNKS])),
        (CHUNKS, "--long-video fused --overlap 0", ("long_video.strategy", OFFERS[CHUNKS])),
        (CHUNKS, "-o long_video.schedule=wavefront", ("long_video.schedule", "leave it out")),
        (CHUNKS, "-o long_video.blend=log", ("long_video.blend", "leave it out", "is off or chunks")),
        (CHUNKS, "-o sampling.null_audio=projected_silence", ("sampling.null_audio", "leave it out")),
        (CHUNKS, "--guidance-rule native", ("sampling.guidance_rule", "leave it out")),
        (CHUNKS, "--batch-branches", ("sampling.batch_branches", "true was asked", "leave it out")),
        (CHUNKS, "--overlap 0", ("--overlap", "fused only", "at least 1")),
        (CHUNKS, "--long-video stream", ("long_video.strategy", "no stream", OFFERS[CHUNKS])),
        (CHUNKS, "--channels 36", ("model.channels", "offers 33")),
        (CHUNKS, "--carry latents", ("long_video.carry", "no latents", "pixels")),
        (FUSED, "--long-video stream", ("long_video.strategy", "no stream", OFFERS[FUSED])),
        (FUSED, "--carry latents", ("long_video.carry", "leave it out", "is off or fused")),
        (FUSED, "--chunked", ("long_video.strategy", "no chunks", OFFERS[FUSED])),
        (FUSED, "--long-video chunks", ("long_video.strategy", "no chunks", OFFERS[FUSED])),
        (FUSED, "-o long_video.strategy=chunks --overlap 0", ("chunks",)),
        (FUSED, "--carry pixels", ("long_video.carry", "leave it out")),
        (FUSED, "--carry pixels --long-video fused", ("long_video.carry", "leave it out", "is off or fused")),
        (FUSED, "--overlap 1", ("long_video.overlap_frames", "one latent frame", "0 for no cross-fade")),
        (FUSED, "--overlap 3", ("--overlap", "4n + 1", "got 3")),
        (FUSED, "--overlap 17", ("--overlap", "must be below long_video.num_frames 17")),
        (FUSED, "--overlap 21", ("--overlap", "must be below long_video.num_frames 17")),
        (FUSED, "--num-frames 5", ("overlap_frames 5 must be below long_video.num_frames 5", "--num-frames")),
        (FUSED, "--num-frames 18", ("--num-frames", "4k + 1", "got 18")),
        (FUSED, "-o long_video.schedule=depth", ("auto, step, wavefront", "'depth'")),
        (FUSED, "-o long_video.blend=linear", ("uniform, log", "'linear'")),
        (FUSED, "-o sampling.null_audio=none", ("zero_context, projected_silence", "'none'")),
        (FUSED, "--size 72x64", ("--size", "output.width", "multiple of 16", "72")),
        (FUSED, "--size 64x8", ("--size", "output.height", "from 16")),
        (FUSED, "--fit letterbox", ("--fit", "crop, stretch", "'letterbox'")),
        (FUSED, "--prompt a --prompt b", ("input.prompt is asked for twice", "--prompt")),
        (FUSED, "--max-tokens 30000", ("long_video.max_tokens", "leave it out")),
        (FUSED, "--channels 33", ("model.channels", "offers 36")),
        (FUSED, "--audio-offset 1", ("model.audio_offset", "offers 0")),
        (FUSED, "--compat fork", ("model.compat", "offers none and reference")),
        (
            FUSED,
            "--compat reference -o sampling.null_audio=projected_silence",
            ("sampling.null_audio", "compat reference", "offers zero_context"),
        ),
    ],
)  # fmt: skip
def test_refused_with_2(
    model: str, words: str, says: tuple[str, ...], run: Run, refused: Refused, voice: Path, here: Path
) -> None:
    for flags in ((), ("--dry-run",)):
        line = refused(2, *(word for word in dry(model, voice, words) if word != "--dry-run"), *flags)
        for part in says:
            assert part in line, line
        assert not list(here.iterdir())


def test_one_window_refuses_longer_audio_and_names_the_way(run: Run, refused: Refused, here: Path) -> None:
    soundfile.write(here / "long.wav", np.full(16_000, 0.1, np.float32), 16_000)  # 25 frames
    line = refused(2, *dry(FUSED, here / "long.wav", "--long-video off"))
    assert "25 frames and one window holds 17 (0.68 s)" in line and "--long-video fused" in line
    assert run(*dry(FUSED, here / "long.wav", "")).exit_code == 0


@pytest.mark.parametrize(("samples", "code"), [(1, 3), (639, 3), (640, 0), (641, 0)])
@pytest.mark.parametrize("model", [CHUNKS, FUSED, f"{FUSED} --compat reference"])
def test_audio_shorter_than_a_frame(
    samples: int, code: int, model: str, run: Run, here: Path, tmp_path: Path
) -> None:
    audio = tmp_path / "blip.wav"
    soundfile.write(audio, np.full(samples, 0.1, np.float32), 16_000)
    name, _, words = model.partition(" ")
    result = run(*dry(name, audio, words))
    assert result.exit_code == code, result.stderr
    if code:
        (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert f"blip.wav: too short: {samples} of 640 samples at 16 kHz" in error
        assert "of the 40 ms" in error and error.endswith("(give longer audio)")
    else:
        assert "frames: " + ("1" if samples == 640 or "reference" in words else "2") in result.stdout
    assert not list(here.iterdir())


@pytest.mark.parametrize("model", [CHUNKS, FUSED])
def test_silence_in_front_counts_as_audio(model: str, run: Run, tmp_path: Path) -> None:
    """So that the 0.3 s of `compat reference` keep what the published script makes of a single sample."""
    audio = tmp_path / "blip.wav"
    soundfile.write(audio, np.full(1, 0.1, np.float32), 16_000)
    result = run(*dry(model, audio, "-o output.lead_silence=0.04"))
    assert result.exit_code == 0 and "frames: 2\n" in result.stdout


def test_one_frame_of_audio_is_a_video_of_one_frame(run: Run, here: Path, tmp_path: Path) -> None:
    audio = tmp_path / "blip.wav"
    soundfile.write(audio, np.full(640, 0.1, np.float32), 16_000)
    words = ("infer", "--model", FUSED, "--audio", str(audio), "--steps", "1", "--size", "16x16")
    result = run(*words, "--out", "one.mp4")
    assert result.exit_code == 0, result.stderr
    assert "1 frame of 16x16" in result.stderr and "1 of 1 frame\n" in result.stderr
    assert not re.search(r"(?<![\d.])1 frames", result.stderr)  # "5.1 frames per second" is right
    with av.open(str(here / "one.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 1


@pytest.mark.parametrize("word", ["overlap_frames", "num_frames"])
def test_the_published_model_speaks_the_same_words(
    word: str, run: Run, refused: Refused, voice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avatarctl.pipelines.job.find_sources", lambda *_: Sources())
    assert run(*dry("stableavatar-1.3b", voice, "--overlap 37 --num-frames 81")).exit_code == 0
    line = refused(2, *dry("stableavatar-1.3b", voice, f"-o long_video.{word}=80"))
    assert word in line and "80" in line
