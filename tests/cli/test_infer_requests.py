"""`infer` before anything is computed: requests, contradictions, what is missing, dry runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import Result
from PIL import Image

from avatarctl.loading.sources import Sources

CHUNKS, WINDOWS = "omniavatar-14b", "stableavatar-1.3b"
Run = Callable[..., Result]
Refused = Callable[..., str]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--chunked --long-video off", ("long_video.strategy is asked for twice", "--chunked")),
        ("--chunked -o long_video.strategy=off", ("long_video.strategy is asked for twice", "-o long_video")),
        ("--size 64x64 --size 32x32", ("output.width is asked for twice: 64", "32")),
        ("--size 64x64 -o output.width=32", ("output.width is asked for twice", "--size")),
        ("--size 500x500", ("--size", "output.width", "multiple of 16", "500")),
        ("--size 64", ("--size", "WIDTHxHEIGHT", "'64'")),
        ("--size 64x", ("--size", "output.height")),
        ("--size 64x64x64", ("--size", "output.height", "64x64")),
        ("--width 64", ("--width", "output.width is given without output.height")),
        ("--height 64", ("--height", "without output.width")),
        ("--steps 3 --steps 4", ("sampling.steps is asked for twice: 3", "4")),
        ("--steps 3 -o sampling.steps=4", ("sampling.steps is asked for twice", "-o sampling.steps")),
        ("--overwrite -o output.overwrite=false", ("output.overwrite is asked for twice",)),
        ("-v -q", ("runtime.log_level is asked for twice", "--verbose", "--quiet")),
        ("--config a --config b", ("--config: given twice",)),
        ("--num-frames 9 --overlap 9", ("--overlap", "must be below long_video.num_frames 9")),
        ("--num-frames 9 --overlap 13", ("overlap_frames 13 must be below", "--num-frames")),
        ("--overlap 37", ("overlap_frames 37 must be below", "model row cartoon-i2v")),
        ("--overlap 0", ("fused only",)),
        ("--model omniavatar-14b --compat reference --audio-offset 0", ("contradicts model.compat",)),
        ("--steps 0", ("--steps: sampling.steps: expected an integer from 1 to 1000, got 0",)),
        ("--steps 1e2", ("--steps", "'1e2'")),
        ("--guidance nan", ("--guidance", "finite number")),
        ("--seed -1", ("--seed", "runtime.seed")),
        ("--image absent.png", ("absent.png: no such file",)),
        ("--audio absent.wav", ("absent.wav: no such file",)),
        ("--audio https://example.org/a.wav", ("is an address, not a file", "download it first")),
        ("--config absent.yaml", ("absent.yaml", "no such configuration file")),
    ],
)  # fmt: skip
def test_refused_with_2(words: str, says: tuple[str, ...], refused: Refused, here: Path) -> None:
    line = refused(2, "infer", "--dry-run", *words.split())
    for part in says:
        assert part in line, line
    assert not list(here.iterdir())


def test_the_same_thing_said_twice_is_fine(run: Run, voice: Path) -> None:
    words = "--chunked --long-video chunks --size 64x64 -o output.width=64 --steps 3 -o sampling.steps=3"
    result = run("infer", "--dry-run", "--json", "--audio", str(voice), *words.split())
    assert result.exit_code == 0 and json.loads(result.stdout)["steps"] == 3


def test_options_cover_the_file_in_silence(run: Run, voice: Path, here: Path) -> None:
    (here / "job.yaml").write_text("sampling: {steps: 7}\nruntime: {seed: 5}\n", encoding="utf-8")
    result = run(
        "infer", "--dry-run", "--json", "--audio", str(voice), "--config", "job.yaml", "--steps", "3"
    )
    found = json.loads(result.stdout)
    assert (found["steps"], found["seed"]) == (3, 5)


def test_a_file_for_another_command_is_refused(refused: Refused, here: Path) -> None:
    (here / "run.yaml").write_text("command: train i2v\nsampling: {steps: 2}\n", encoding="utf-8")
    for given in ("run.yaml", "."):  # a folder means its run.yaml
        line = refused(2, "infer", "--dry-run", "--config", given)
        assert "run.yaml: this file belongs to `avatarctl train i2v`, not to `avatarctl infer`" in line
        assert "run `avatarctl train i2v --config run.yaml`" in line


@pytest.mark.parametrize("name", ["omniavatar-14b", "omniavatar-1.3b"])
def test_missing_inputs_of_a_published_model(
    name: str, run: Run, refused: Refused, face: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without weights they are the larger obstacle; a dry run checks the rest with the built-in sample.
    assert "weights are missing" in refused(4, "infer", "--model", name)
    planned = run("infer", "--model", name, "--dry-run")
    assert planned.exit_code == 0 and "the built-in face" in planned.stderr
    monkeypatch.setattr("avatarctl.pipelines.job.find_sources", lambda *_: Sources())
    assert f"{name} needs --image" in refused(2, "infer", "--model", name)
    assert "needs --audio" in refused(2, "infer", "--model", name, "--image", str(face))


FOLDERS = {
    "omniavatar-14b": (
        ("pretrained_models/Wan2.1-T2V-14B/", "Wan-AI/Wan2.1-T2V-14B"),
        ("pretrained_models/OmniAvatar-14B/", "OmniAvatar/OmniAvatar-14B"),
        ("pretrained_models/wav2vec2-base-960h/", "facebook/wav2vec2-base-960h"),
    ),
    "omniavatar-1.3b": (
        ("pretrained_models/Wan2.1-T2V-1.3B/", "Wan-AI/Wan2.1-T2V-1.3B"),
        ("pretrained_models/OmniAvatar-1.3B/", "OmniAvatar/OmniAvatar-1.3B"),
        ("pretrained_models/wav2vec2-base-960h/", "facebook/wav2vec2-base-960h"),
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_missing_weights(name: str, run: Run, refused: Refused, face: Path, voice: Path, here: Path) -> None:
    words = ("infer", "--model", name, "--image", str(face), "--audio", str(voice))
    line = refused(4, *words)
    for folder, hub_id in FOLDERS[name]:
        assert f"{folder} from {hub_id}" in line
    assert "models_t5_umt5-xxl-enc-bf16.pth" in line and "pytorch_model.pt" in line
    dry = run(*words, "--dry-run")
    assert dry.exit_code == 0
    (warning,) = [text for text in dry.stderr.splitlines() if "weights are missing" in text]
    assert warning.removeprefix("warning: ") in line
    document = json.loads(run(*words, "--dry-run", "--json").stdout)
    assert f"{FOLDERS[name][1][0]}pytorch_model.pt" in document["missing_weights"]
    assert document["audio_offset"] == 1 and document["steps"] == 50
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("model", "words", "says"), [(CHUNKS, "--long-video fused", "chunks"), (WINDOWS, "--chunked", "fused")]
)
def test_what_a_model_has_not_is_said_before_its_weights_are_fetched(
    model: str, words: str, says: str, refused: Refused, face: Path, voice: Path, here: Path
) -> None:
    line = refused(2, "infer", "--model", model, "--image", str(face), "--audio", str(voice), *words.split())
    assert line.startswith(f"long_video.strategy: {model} has no") and f"offers off and {says}" in line
    assert not list(here.iterdir())


def test_missing_shards_are_one_range(refused: Refused, face: Path, voice: Path, here: Path) -> None:
    words = ("infer", "--model", "omniavatar-14b", "--image", str(face), "--audio", str(voice))
    whole = refused(4, *words)
    assert "diffusion_pytorch_model-00001..00006-of-00006.safetensors," in whole
    assert whole.count("of-00006") == 1
    folder = here / "pretrained_models" / "Wan2.1-T2V-14B"
    folder.mkdir(parents=True)
    (folder / "diffusion_pytorch_model-00003-of-00006.safetensors").write_bytes(b"x")
    holed = refused(4, *words)
    assert "model-00001..00002-of-00006.safetensors, diffusion_pytorch_model-00004..00006-of-00006" in holed
    (folder / "diffusion_pytorch_model-00005-of-00006.safetensors").write_bytes(b"x")
    single = refused(4, *words)
    assert "model-00004-of-00006.safetensors, diffusion_pytorch_model-00006-of-00006.safetensors" in single


def test_weights_root_by_option_file_and_environment(
    refused: Refused, face: Path, voice: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("infer", "--model", "omniavatar-1.3b", "--image", str(face), "--audio", str(voice))
    monkeypatch.setenv("AVATARCTL_WEIGHTS", "/ambient")
    assert "/ambient/OmniAvatar-1.3B/" in refused(4, *words)
    (here / "job.yaml").write_text("model: {weights_root: /file}\n", encoding="utf-8")
    assert "/file/OmniAvatar-1.3B/" in refused(4, *words, "--config", "job.yaml")
    asked = refused(4, *words, "--config", "job.yaml", "--weights-root", "/asked")
    assert "/asked/OmniAvatar-1.3B/" in asked and "/ambient" not in asked


def test_dry_run_shows_the_plan_and_touches_nothing(run: Run, voice: Path, face: Path, here: Path) -> None:
    before = snapshot(here.parent)
    words = ("--image", str(face), "--audio", str(voice), "--out", "new folder/deep/clip.mp4", "--steps", "3")
    result = run("infer", "--dry-run", *words)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    facts = dict(
        line.split(": ") for line in lines if not line.startswith("  ")
    )  # those are the table of memory
    assert facts["frames"] == "13"  # ceil(8000 / 640)
    assert (facts["width"], facts["height"], facts["fps"]) == ("64", "64", "25")
    assert facts["spans"] == "1" and facts["steps"] == "3" and facts["model"] == "cartoon-i2v"
    assert snapshot(here.parent) == before


def test_dry_run_json_is_one_document(run: Run, voice: Path) -> None:
    result = run("infer", "--dry-run", "--json", "--audio", str(voice), "--compat", "reference")
    document = json.loads(result.stdout)
    assert document["command"] == "infer" and document["dry_run"] is True
    assert document["missing_weights"] == []
    assert document["audio_delay_seconds"] == pytest.approx(0.3)  # the row keeps its offset 0
    assert document["frames"] == 20  # 7.5 frames of silence and 12.5 of audio
    assert "states audio_offset 0 and keeps it under compat reference" in result.stderr


def test_without_model_image_and_audio_it_says_what_it_takes(run: Run) -> None:
    result = run("infer", "--chunked", "--dry-run")
    assert result.exit_code == 0
    first, second = result.stderr.splitlines()[:2]
    assert "cartoon-i2v (built in" in first and "untrained" not in first
    assert "built-in face" in second and "voice" in second


def test_a_named_model_is_not_called_built_in(run: Run, voice: Path) -> None:
    result = run("infer", "--dry-run", "--model", "cartoon-i2v", "--audio", str(voice))
    assert "built in" not in result.stderr.splitlines()[0]


def test_values_outside_training_get_one_line_each(run: Run, voice: Path) -> None:
    words = ("--size", "96x64", "--num-frames", "13", "--overlap", "9")
    stderr = run("infer", "--dry-run", *words).stderr  # the built-in voice fills several chunks
    for said in ("size 96x64", "13 frames at a time", "overlap 9"):
        assert stderr.count(f"warning: cartoon-i2v was not trained for {said}\n") == 1
    assert "not trained" not in run("infer", "--dry-run", "--audio", str(voice)).stderr


@pytest.mark.parametrize(
    ("model", "image", "words", "says"),
    [
        (WINDOWS, "720x400", "", "44% of the image is cut off to fill 512x512 (--size 832x480 keeps 96%)"),
        (WINDOWS, "400x720", "", "44% of the image is cut off to fill 512x512 (--size 480x832 keeps 96%)"),
        (WINDOWS, "768x576", "", "25% of the image is cut off to fill 512x512"),
        (WINDOWS, "400x720", "--size 832x480", "68% of the image is cut off to fill 832x480 (--size 480"),
        (CHUNKS, "640x400", "", ""),
        (CHUNKS, "640x480", "", "26% of the image is cut off to fill 720x400"),
        (WINDOWS, "640x512", "", ""),
        (WINDOWS, "720x400", "--size 832x480", ""),
        (WINDOWS, "720x400", "--fit stretch", ""),
        (WINDOWS, "1200x400", "--fit stretch", "is stretched 3.0 times out of shape"),
    ],
)
def test_what_a_frame_leaves_of_a_image(
    model: str, image: str, words: str, says: str, run: Run, voice: Path, tmp_path: Path
) -> None:
    width, height = map(int, image.split("x"))
    Image.new("RGB", (width, height)).save(tmp_path / "me.png")
    words = f"--model {model} --audio {voice} --image {tmp_path / 'me.png'} {words}"
    stderr = run("infer", "--dry-run", *words.split()).stderr
    lines = [line.partition("me.png: ")[2] for line in stderr.splitlines() if "me.png" in line]
    if says.endswith("(--size 480"):
        assert len(lines) == 1 and lines[0].startswith(says)
    else:
        assert lines == ([says] if says else [])


def test_one_window_refuses_longer_audio_and_names_the_way(run: Run, refused: Refused, here: Path) -> None:
    soundfile.write(here / "long.wav", np.full(48_000, 0.1, np.float32), 16_000)
    soundfile.write(here / "short.wav", np.full(16_000, 0.1, np.float32), 16_000)
    line = refused(2, "infer", "--long-video", "off", "--audio", "long.wav", "--dry-run")
    assert "--chunked" in line
    assert run("infer", "--long-video", "off", "--audio", "short.wav", "--dry-run").exit_code == 0
    assert run("infer", "--chunked", "--audio", "long.wav", "--dry-run").exit_code == 0


def test_warnings_name_the_file(run: Run, here: Path) -> None:
    soundfile.write(here / "quiet\x1b[31m.wav", np.zeros(16_000, np.float32), 16_000)
    result = run("infer", "--dry-run", "--audio", "quiet\x1b[31m.wav")
    assert r"warning: quiet\x1b[31m.wav: is digital silence" in result.stderr
    assert "\x1b" not in result.output


@pytest.mark.parametrize(("level", "kept"), [("-q", {"warning: "}), ("--log-level error", set())])
def test_quiet(level: str, kept: set[str], run: Run, here: Path) -> None:
    soundfile.write(here / "quiet.wav", np.zeros(16_000, np.float32), 16_000)
    result = run("infer", "--dry-run", "--audio", "quiet.wav", *level.split())
    assert {line[:9] for line in result.stderr.splitlines()} == kept
    assert "frames: 25" in result.stdout


def test_output_refused_before_the_model_is_loaded(
    refused: Refused, voice: Path, face: Path, here: Path
) -> None:
    (here / "there.mp4").write_bytes(b"mine")
    (here / "folder.mp4").mkdir()
    words = ("infer", "--audio", str(voice), "--out")
    assert refused(2, *words, "there.mp4").startswith("there.mp4: exists (add --overwrite")
    assert "is a folder" in refused(2, *words, "folder.mp4")
    assert "must end in .mp4" in refused(2, *words, "clip.avi")
    assert "is a file, not a folder" in refused(2, *words, "there.mp4/clip.mp4")
    assert "in the making" in refused(2, *words, "clip.partial.mp4")
    for nothing in (".", "..", "/"):
        assert "is a folder" in refused(2, *words, nothing)
    for flag, content in (("--audio", voice.read_bytes()), ("--image", face.read_bytes())):
        own = here / "own.mp4"  # inputs are judged by content, so this name is allowed
        own.write_bytes(content)
        line = refused(2, "infer", flag, str(own), "--overwrite", "--out", str(own))
        assert "would destroy the input" in line and own.read_bytes() == content
        own.unlink()
    assert (here / "there.mp4").read_bytes() == b"mine"
    assert sorted(path.name for path in here.iterdir()) == ["folder.mp4", "there.mp4"]


def test_shipped_configurations_by_name(run: Run, refused: Refused, face: Path, voice: Path) -> None:
    for name, model in (
        ("infer/omniavatar-14b", "omniavatar-14b"),
        ("omniavatar-1.3b", "omniavatar-1.3b"),
        ("compat/reference", None),
    ):
        words = (
            "infer",
            "--dry-run",
            "--json",
            "--config",
            name,
            "--image",
            str(face),
            "--audio",
            str(voice),
        )
        result = run(*words)
        assert result.exit_code == 0, result.stderr
        assert model in (None, json.loads(result.stdout)["model"])


def test_a_dry_run_tries_an_attention_kernel_that_is_named(run: Run) -> None:
    result = run("infer", "--dry-run", "--device", "cpu", "--attention", "flash3")
    assert result.exit_code == 0
    said = "a run would end with exit 4: runtime.attention: flash3 attention does not run here"
    assert said in result.stderr


def test_the_page_of_frames_never_replaces_an_input(refused: Refused, here: Path, face: Path) -> None:
    page = here / "own.sheet.png"
    page.write_bytes(face.read_bytes())
    words = ("infer", "--out", "own.mp4")
    assert refused(2, *words).startswith("own.sheet.png: exists (add --overwrite")
    line = refused(2, *words, "--overwrite", "--image", str(page))
    assert "would destroy the input" in line and page.read_bytes() == face.read_bytes()
    assert "absent.png: no such file" in refused(2, *words, "--overwrite", "--image", "absent.png")
    # A model whose videos get no page may be given it.
    assert "destroy" not in refused(4, *words, "--overwrite", "--image", str(page), "--model", CHUNKS)
