"""Whole runs at tiny size through the real classes, judged by the file that comes out."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from avatarctl.errors import (
    AvatarctlError,
    Interrupted,
    NotYetSupported,
    OutputRefused,
    UnusableWeights,
    UsageError,
)
from avatarctl.events import Event, Notice, Planned, SpanFinished, StepFinished
from avatarctl.family import Modules
from avatarctl.media import audio_from_array, image_from_array
from avatarctl.pipelines.infer import generate, load, write_video
from avatarctl.pipelines.job import Job, JobPlan, check_job
from avatarctl.registry import configure, find_model
from tests.helpers_mp4 import read_tables

TINY = ("output.width=16", "output.height=16", "sampling.steps=1", "long_video.num_frames=9")
ROW = find_model("cartoon-i2v")


def noise_burst(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """Near silence with one burst a third in: easy to find again after AAC."""
    samples = int(seconds * rate)
    audio = np.random.default_rng(0).standard_normal((samples, channels)).astype(np.float32)
    envelope = np.full(samples, 1e-3, np.float32)
    envelope[samples // 3 : samples // 3 + rate // 10] = 0.3
    return audio * envelope[:, None]


def job(seconds: float = 1.0, rate: int = 16_000, channels: int = 1, prompt: str = "talking") -> Job:
    pixels = np.random.default_rng(1).integers(0, 255, (40, 40, 3), np.uint8)
    audio = audio_from_array(noise_burst(seconds, rate, channels), rate, "burst")
    return Job(image_from_array(pixels, "noise"), audio, prompt, "")


def planned(work: Job, *settings: str, emit: Callable[[Event], None] = lambda event: None) -> JobPlan:
    return check_job(configure(*TINY, *settings), ROW, work, emit)


def read_back(path: Path) -> tuple[int, Fraction, tuple[int, int], np.ndarray, int]:
    """Frames, fps, size, audio as decoded (mono, placed at its time stamps), audio rate."""
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        frames = [frame.pts * frame.time_base for frame in container.decode(video)]
        size, fps = (video.width, video.height), video.average_rate
        assert frames == [Fraction(n) / fps for n in range(len(frames))]
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        decoded = np.zeros(0, np.float32)
        for block in container.decode(stream):
            at = round(block.pts * block.time_base * stream.rate)
            mono = block.to_ndarray().mean(0)
            if at < 0:
                mono, at = mono[-at:], 0
            decoded = np.concatenate([decoded, np.zeros(max(0, at - len(decoded)), np.float32), mono])
    return len(frames), fps, size, decoded, stream.rate


def delay_of(decoded: np.ndarray, source: np.ndarray) -> int:
    """Samples by which `source` is late in `decoded`, by cross-correlation of their envelopes."""
    length = 1 << (len(decoded) + len(source)).bit_length()
    a, b = np.fft.rfft(decoded, length), np.fft.rfft(source.mean(1), length)
    return int(np.fft.irfft(a * b.conj(), length)[: len(decoded)].argmax())


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2)])
@pytest.mark.parametrize(
    ("settings", "frames", "delay"),
    [
        (("model.audio_offset=0",), 25, Fraction(0)),
        (("model.audio_offset=1",), 26, Fraction(1, 25)),
        (("model.audio_offset=1", "output.lead_silence=0.3"), 34, Fraction(34, 100)),
    ],
)
def test_frames_audio_length_and_audio_delay(
    tmp_path: Path, settings: tuple[str, ...], frames: int, delay: Fraction, rate: int, channels: int
) -> None:
    work = job(1.0, rate, channels)
    plan = planned(work, *settings)
    finished = write_video(plan, tmp_path / "talk.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talk.mp4"]
    got, fps, size, decoded, decoded_rate = read_back(tmp_path / "talk.mp4")
    assert (got, fps, size, decoded_rate) == (frames, 25, (16, 16), rate)
    assert finished.frames == frames
    assert abs(len(decoded) - rate * (1 + delay)) <= 1024, "more than one AAC packet off"
    late = delay_of(decoded, noise_burst(1.0, rate, channels))
    assert abs(late - delay * rate) <= rate // 1000, "audio is off by more than a millisecond"
    duration, (video, audio) = read_tables(tmp_path / "talk.mp4")
    assert duration == Fraction(frames, 25) and len(video.sizes) == frames
    ((shown, skipped),) = audio.edits
    assert (shown, skipped * rate, sum(audio.deltas) - 1024) == (1 + delay, 1024, rate * (1 + delay))


def test_a_disk_too_full_for_the_finished_form_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(growing: Path, ordinary: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("avatarctl.media.video.copy_packets", full)
    events: list[Event] = []
    finished = write_video(planned(job(0.2, channels=7)), tmp_path / "talk.mp4", emit=events.append)
    told = [event.text for event in events if isinstance(event, Notice)]
    assert sum("mixed to stereo" in line for line in told) == 1, "said at the start, and not again"
    assert sum("talk.mp4 plays but stays fragmented" in line for line in told) == 1
    assert told[-1].startswith("talk.mp4 plays") and events[-1] == finished
    assert [path.name for path in tmp_path.iterdir()] == ["talk.mp4"]
    assert read_back(tmp_path / "talk.mp4")[0] == 5


@pytest.mark.parametrize("seconds", [0.04, 0.0401, 0.36, 0.3601, 1.48])
def test_every_length_gives_its_own_number_of_frames(seconds: float) -> None:
    work = job(seconds)
    plan = planned(work)
    frames = sum(block.pixels.shape[1] for block in generate(plan))
    assert frames == -(-round(seconds * 16_000) // 640)


def frames_of(work: Job, *settings: str) -> torch.Tensor:
    plan = planned(work, *settings)
    return torch.cat([block.pixels for block in generate(plan)], dim=1)


def test_a_result_depends_on_the_job_alone() -> None:
    first = frames_of(job(0.5))
    other = frames_of(job(0.5, prompt="singing"))
    again = replace(job(0.5), image=replace(job(0.5).image, name="another name"))
    assert torch.equal(first, frames_of(again)), "a file name or an earlier job changed the result"
    assert not torch.equal(first, other), "the prompt has no effect"
    assert not torch.equal(first, frames_of(job(0.5), "runtime.seed=7"))
    plan = planned(job(0.5))
    modules = load(plan)
    for _ in range(2):
        blocks = [block.pixels for block in generate(plan, modules=modules)]
        assert torch.equal(first, torch.cat(blocks, dim=1)), "a used network gives other frames"


def test_settings_of_the_reference() -> None:
    # 7 * 640 samples are 8 frames in the published script's float arithmetic; 0.3 s adds 7.5 frames.
    notices: list[str] = []

    def emit(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

    silent = planned(job(0.28), "model.compat=reference", "output.lead_silence=0", emit=emit)
    assert silent.video.frames == 8
    assert any("not tiled" in text for text in notices)
    assert planned(job(0.28), "model.compat=reference").samples == 4480 + 4800
    assert planned(job(0.28)).video.frames == 7


def test_off_is_one_window_and_names_the_way_out() -> None:
    assert planned(job(0.3), "long_video.strategy=off").video.count == 1
    with pytest.raises(UsageError, match="--chunked"):
        planned(job(2.0), "long_video.strategy=off")


def test_values_the_model_was_not_trained_for_get_one_line_each() -> None:
    lines: list[str] = []
    words = ("long_video.num_frames=13", "long_video.overlap_frames=9")
    planned(job(), *words, emit=lambda e: lines.append(getattr(e, "text", "")))
    assert sum("not trained for" in line for line in lines) == 3  # size, chunk length, overlap


class StopAfter:
    """Asks to stop once `chunks` are written and one more step has run."""

    def __init__(self, chunks: int) -> None:
        self.chunks, self.written, self.asked = chunks, 0, False

    def emit(self, event: Event) -> None:
        self.written += isinstance(event, SpanFinished)
        self.asked |= isinstance(event, StepFinished) and self.written >= self.chunks

    def __call__(self) -> bool:
        return self.asked


def test_a_stopped_run_names_its_playable_part_and_leaves_nothing_else(tmp_path: Path) -> None:
    stop = StopAfter(chunks=2)
    work = job(2.0)
    plan = planned(work, "sampling.steps=2")
    with pytest.raises(Interrupted, match=r"13 frames, is kept as .*talk\.partial\.mp4"):
        write_video(plan, tmp_path / "talk.mp4", emit=stop.emit, should_stop=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.partial.mp4"]
    assert read_back(tmp_path / "talk.partial.mp4")[0] == 13


def test_a_run_stopped_before_its_first_chunk_leaves_nothing(tmp_path: Path) -> None:
    work = job()
    with pytest.raises(Interrupted):
        write_video(planned(work), tmp_path / "talk.mp4", should_stop=lambda: True)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_a_later_chunk_keeps_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from avatarctl.models.vae import WanVae

    real, calls = WanVae.encode, []

    def fail_on_third(self: WanVae, video: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise AvatarctlError("the third encode fails")
        return real(self, video)

    monkeypatch.setattr(WanVae, "encode", fail_on_third)
    work = job(2.0)
    with pytest.raises(AvatarctlError, match=r"the third encode fails .*is kept as"):
        write_video(planned(work), tmp_path / "talk.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.partial.mp4"]


def test_names_with_spaces_and_other_alphabets(tmp_path: Path) -> None:
    folder = tmp_path / "mes vidéos 视频"
    folder.mkdir()
    write_video(planned(job(0.2)), folder / "ein Gesicht – 話す.mp4")
    assert read_back(folder / "ein Gesicht – 話す.mp4")[0] == 5


def test_an_output_that_would_destroy_an_input_is_refused(tmp_path: Path) -> None:
    from avatarctl.media import open_audio, write_audio

    kept = tmp_path / "hello.partial.mp4"  # what an interrupted run leaves, used as the next run's audio
    write_audio(tmp_path / "voice.wav", noise_burst(0.2, 16_000), 16_000)
    (tmp_path / "voice.wav").rename(kept)
    before = kept.read_bytes()
    work = replace(job(0.2), audio=open_audio(kept))
    for out in ("hello.mp4", "hello.partial.mp4"):
        with pytest.raises(OutputRefused, match="would destroy the input"):
            write_video(planned(work), tmp_path / out)
    assert kept.read_bytes() == before


@pytest.mark.parametrize(("model", "unit"), [("cartoon-i2v", "chunk"), ("stableavatar-tiny", "window")])
def test_values_that_are_not_finite_end_the_run(
    model: str, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said with the word of the screen."""
    from avatarctl.pipelines import infer

    def damaged(*args: object, **kwargs: object) -> Modules:
        modules = load(*args, **kwargs)  # type: ignore[arg-type]
        modules.dit.proj_out.bias.data.fill_(float("nan"))
        return modules

    monkeypatch.setattr(infer, "load", damaged)
    row = find_model(model)
    events: list[Event] = []
    words = (*TINY, f"model.name={model}", "long_video.overlap_frames=5")
    plan = check_job(configure(*words), row, job(), lambda event: None)
    with pytest.raises(UnusableWeights, match=f"not finite in {unit} 1"):
        write_video(plan, tmp_path / "a.mp4", emit=events.append)
    assert [event.unit for event in events if isinstance(event, Planned)] == [unit]
    assert list(tmp_path.iterdir()) == []


def test_a_listener_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def emit(event: Event) -> None:
        raise RuntimeError("the listener fails")

    work = job(0.2, rate=16_000, channels=7)  # seven channels: the writer has a notice at once
    with pytest.raises(RuntimeError):
        write_video(planned(work), tmp_path / "a.mp4", emit=emit)
    assert list(tmp_path.iterdir()) == []


def test_settings_without_code_are_refused_in_the_library_too() -> None:
    for setting in ("sampling.cache=teacache", "sampling.solver=unipc"):
        with pytest.raises(NotYetSupported):
            planned(job(), setting)
