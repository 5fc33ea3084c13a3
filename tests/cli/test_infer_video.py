"""`avatarctl infer` on a video: the built-in clip, a file, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from click.testing import Result
from PIL import Image
from safetensors.numpy import save_file

from avatarctl.conditioning.masking import mask_name
from avatarctl.demo.clips import clip
from avatarctl.weights.layout import Sizes
from avatarctl.weights.layouts import omniavatar_shapes
from tests.helpers_video import read_frames

Run = Callable[..., Result]
Refused = Callable[..., str]

SMALL = ("--model", "cartoon-v2v", "--steps", "1", "--size", "32x32", "--num-frames", "9")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """20 frames of the cartoon world, 64x64, with a sentence of their own left out."""
    path = tmp_path / "source.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25), options={"crf": "4"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for frame in clip(3, 20).frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_the_built_in_clip_is_dubbed_and_the_screen_says_what_it_is(run: Run, here: Path) -> None:
    again = run("infer", "--model", "cartoon-v2v", "--steps", "1", "--size", "16x16", "--out", "b.mp4")
    assert again.exit_code == 0, again.stderr
    first, second = again.stderr.splitlines()[:2]
    assert first == "model: cartoon-v2v"
    assert second == "input: the built-in clip (--video for yours) and voice (--audio for yours)"
    assert len(read_frames(here / "b.mp4")) == 100


def test_a_file_is_dubbed_with_a_file(run: Run, source: Path, voice: Path, here: Path) -> None:
    words = ("infer", *SMALL, "--video", str(source), "--audio", str(voice))
    result = run(*words, "--out", "a.mp4")
    assert result.exit_code == 0, result.stderr
    assert read_frames(here / "a.mp4").shape == (13, 32, 32, 3)  # 0.5 s of audio end the video
    record = yaml.safe_load((here / "a.run.yaml").read_text(encoding="utf-8"))
    assert record["input"]["video"] == str(source)
    again = run("infer", "--config", "a.run.yaml", "--out", "b.mp4")
    assert again.exit_code == 0, again.stderr
    np.testing.assert_array_equal(read_frames(here / "a.mp4"), read_frames(here / "b.mp4"))


@pytest.mark.parametrize(("length", "frames"), [("pingpong", 50), ("hold", 50), ("video", 20)])
def test_longer_audio(length: str, frames: int, run: Run, source: Path, here: Path) -> None:
    long = here / "long.wav"
    import soundfile

    soundfile.write(long, np.random.default_rng(0).standard_normal(32_000) * 0.1, 16_000)
    words = ("infer", *SMALL, "--video", str(source), "--audio", str(long), "--length", length)
    plan = run(*words, "--dry-run")
    assert plan.exit_code == 0 and f"frames: {frames}\n" in plan.stdout, plan.stderr
    assert "frames_of_source: 20\n" in plan.stdout and f"length: {length}\n" in plan.stdout
    result = run(*words, "--out", "a.mp4")
    assert result.exit_code == 0, result.stderr
    assert len(read_frames(here / "a.mp4")) == frames


def test_another_mask_makes_another_video(run: Run, source: Path, voice: Path, here: Path) -> None:
    black = np.full((100, 80), 255, np.uint8)
    black[50:] = 0
    Image.fromarray(black).save(here / "half.png")
    words = ("infer", *SMALL, "--video", str(source), "--audio", str(voice))
    videos = []
    for name, more in (
        ("mouth", ()),
        ("half", ("--mask", "half.png")),
        ("first", ("--mask-rule", "first_keep")),
    ):
        result = run(*words, *more, "--out", f"{name}.mp4")
        assert result.exit_code == 0, result.stderr
        videos.append(read_frames(here / f"{name}.mp4"))
    assert not np.array_equal(videos[0], videos[1]) and not np.array_equal(videos[0], videos[2])


def weights_that_say(path: Path, data: dict[str, str]) -> Path:
    """A model of 49 channels, of zeros, whose header states what it was trained with."""
    sizes = Sizes(
        width=48, ffn=64, layers=2, in_channels=49, out_channels=16, text_dim=32, freq_dim=16,
        audio_hidden_size=8, audio_input_dim=72,
    )  # fmt: skip
    tensors = {name: np.zeros(shape, np.float32) for name, shape in omniavatar_shapes(sizes).items()}
    metadata = {
        "avatarctl.network": json.dumps({"num_attention_heads": 4, "attention_head_dim": 12}),
        "avatarctl.data": json.dumps(data),
    }
    save_file(tensors, path, metadata)
    return path


def test_weights_say_with_which_rule_and_mask_they_were_trained(
    run: Run, refused: Refused, source: Path, voice: Path, here: Path
) -> None:
    weights_that_say(here / "mine.safetensors", {"mask_rule": "first_keep", "mask": "mouth"})
    words = (
        "infer",
        "--model",
        "mine.safetensors",
        "--video",
        str(source),
        "--audio",
        str(voice),
        "--dry-run",
    )
    plan = run(*words)
    assert plan.exit_code == 0 and "mask_rule: first_keep\n" in plan.stdout, plan.stderr
    assert "was trained with" not in plan.stderr
    other = run(*words, "--mask-rule", "all")
    assert "mask_rule: all\n" in other.stdout
    assert "was trained with mask rule first_keep; this run has all" in other.stderr
    half = np.full((100, 80), 255, np.uint8)
    half[50:] = 0
    Image.fromarray(half).save(here / "half.png")
    assert "was trained with another mask: leave out --mask" in run(*words, "--mask", "half.png").stderr

    converted = run("convert-ckpt", "mine.safetensors", "--out", "again.safetensors", "--channels", "65")
    assert converted.exit_code == 0, converted.stderr
    told = run("convert-ckpt", "again.safetensors", "--inspect", "--json")
    assert json.loads(told.stdout)["data"] == {"mask_rule": "first_keep", "mask": "mouth"}

    weights_that_say(here / "mine.safetensors", {"mask": mask_name(half)})
    assert "was trained with another mask: name the one" in run(*words).stderr
    assert "was trained with" not in run(*words, "--mask", "half.png").stderr
    weights_that_say(here / "mine.safetensors", {"mask_rule": "some"})
    assert "avatarctl.data has no mask_rule that is one" in refused(3, *words)


def test_a_transformer_named_for_a_model_says_its_rule_too(
    run: Run, refused: Refused, source: Path, voice: Path, here: Path
) -> None:
    weights_that_say(here / "mine.safetensors", {"mask_rule": "first_keep"})
    inputs = ("--video", str(source), "--audio", str(voice), "--dry-run")
    words = ("infer", "--model", "omniavatar-1.3b", "--channels", "49", "--audio-offset", "0", *inputs)
    plan = run(*words, "--weights", "dit=mine.safetensors")
    assert plan.exit_code == 0 and "mask_rule: first_keep\n" in plan.stdout, plan.stderr
    other = run(*words, "--weights", "dit=mine.safetensors", "--mask-rule", "all")
    assert "mask_rule: all\n" in other.stdout
    (here / "run.yaml").write_text("model: {weights: {dit: mine.safetensors}}\n", encoding="utf-8")
    assert "mask_rule: first_keep\n" in run(*words, "--config", "run.yaml").stdout
    assert "no such file or folder: nothing.safetensors" in refused(
        2, *words, "--weights", "dit=nothing.safetensors"
    )


def test_what_is_refused(refused: Refused, source: Path, voice: Path, face: Path, here: Path) -> None:
    video, audio, image = ("--video", str(source)), ("--audio", str(voice)), ("--image", str(face))
    v2v = ("infer", "--model", "cartoon-v2v")
    for more in ((), ("--dry-run",)):
        assert refused(2, *v2v, *video, *more) == "cartoon-v2v needs --audio"
        assert "cartoon-v2v takes a video, not an image" in refused(2, *v2v, *image, *audio, *more)
        assert "cartoon-i2v takes an image, not a video" in refused(2, "infer", *video, *audio, *more)
    assert "both given" in refused(2, *v2v, *video, *image, *audio)
    assert "49 input channels, and 65 were asked for" in refused(2, *v2v, "--channels", "65", "--dry-run")
    Image.new("L", (64, 64), 255).save(here / "white.png")
    line = refused(3, *v2v, *video, *audio, "--mask", "white.png", "--dry-run")
    assert line.startswith("white.png: keeps the whole frame")
    assert "no such file" in refused(2, *v2v, *video, *audio, "--mask", "none.png", "--dry-run")
    (here / "text.png").write_text("no image", encoding="utf-8")
    assert refused(3, *v2v, *video, *audio, "--mask", "text.png", "--dry-run").startswith("text.png: ")
    target = here / "in.mp4"
    target.write_bytes(source.read_bytes())
    words = (*v2v, *audio, "--video", "in.mp4", "--out", "in.mp4", "--overwrite")
    assert "would destroy the input in.mp4" in refused(2, *words)
    assert target.read_bytes() == source.read_bytes()
