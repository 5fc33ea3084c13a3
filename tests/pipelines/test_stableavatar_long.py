"""Every frame gets the audio of its own time, at every length and overlap; what a window needs is made once,
and what a job needs once for all windows."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avatarctl.config import RunConfig
from avatarctl.errors import UsageError
from avatarctl.events import Event, Notice, silent
from avatarctl.families import StableAvatar
from avatarctl.family import Inputs, Modules
from avatarctl.flow_matching import double_shifted_sigmas
from avatarctl.media import audio_from_array, image_from_array
from avatarctl.models.encode import window_tokens
from avatarctl.models.stableavatar import PreparedStable
from avatarctl.pipelines.infer import generate, load
from avatarctl.pipelines.job import Job, check_job
from avatarctl.registry import configure, find_model
from avatarctl.sampling.denoise import Denoiser
from avatarctl.sampling.fused import sample_fused
from avatarctl.timeline import SAMPLES_PER_FRAME, pixel_frames

FAMILY = StableAvatar()
ROW = find_model("stableavatar-tiny")
OVERLAPS = (0, 2, 5, 10, 20)  # latent frames
ONE_LATENT = 4  # pixel frames


def settings(overlap: int, *more: str) -> RunConfig:
    """One branch and windows of the published length; overlap in latent frames."""
    return configure(
        "model.name=stableavatar-tiny", "sampling.guidance_scale=1", "sampling.audio_guidance_scale=1",
        "long_video.num_frames=81", f"long_video.overlap_frames={pixel_frames(overlap) if overlap else 0}",
        "output.width=16", "output.height=16", *more,
    )  # fmt: skip


@functools.cache
def places(tokens: int, frames: int) -> Tensor:
    """Which token stands in the middle of what each latent frame of a window gets, before both sides are
    widened: spec/stableavatar.md b.1, for `tokens` over `frames` pixel frames. [latent frames]"""
    rate = tokens / frames
    half = int(rate * 4 / 2)
    centres = [
        int((rate * (4 * i - 3) + rate * (4 * i + 1)) / 2) - 1 for i in range(1, (frames - 1) // 4 + 1)
    ]
    ranges = [(centre - half, centre + half) for centre in centres]
    ranges.insert(0, (ranges[0][0] - 2 * half, ranges[0][0]))
    inside = [(max(first, 0), min(last, tokens - 1)) for first, last in ranges]
    return torch.tensor([(first + last) / 2 for first, last in inside], dtype=torch.float64)


@functools.cache
def aims(tokens: int, frames: int) -> Tensor:
    """Weights of the tokens in what each latent frame of a window aims at: the place in the middle of what it
    gets, and the first that its window gets: which audio, and whose. [tokens, 2 * latent frames]"""
    middle = places(tokens, frames)
    weights = torch.zeros(tokens, 2, len(middle))
    weights[0, 1] = 1
    for frame, place in enumerate(middle.tolist()):
        for token in (math.floor(place), math.ceil(place)):
            weights[token, 0, frame] += 0.5
    return weights.flatten(1)


class Tape:
    """Audio that is nothing but its own position: one sample of what is read, the rest is padded."""

    driven_by = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop
        self.driven_by = start
        return np.zeros(1, np.float32)


@functools.cache
def grid(tokens: int) -> Tensor:
    """Middles of what the encoder's tokens get, in pixel frames: [1, tokens, 1]."""
    return ((320 * torch.arange(tokens) + 200) / SAMPLES_PER_FRAME).view(1, -1, 1)


class Positions:
    """Tokens that are the middle of what they get, in pixel frames."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def tokens(self, waveform: Tensor) -> Tensor:
        return self.tape.driven_by / SAMPLES_PER_FRAME + grid((waveform.shape[1] - 400) // 320 + 1)


class Listener(nn.Module):
    """Aims at the position that each latent frame gets; notes what its branches are prepared with."""

    def __init__(self) -> None:
        super().__init__()
        self.branches: dict[str, Any] = {}

    def forward(self, *args: Any, mode: str, **kwargs: Any) -> Any:
        return self.prepare(**kwargs) if mode == "prepare" else self.denoise(*args, **kwargs)

    def prepare(
        self, text: Any = None, image: Any = None, grid: Any = None, vocal: Any = None, frames: int = 0,
        device: torch.device | None = None,
    ) -> PreparedStable:  # fmt: skip
        if vocal is not None:
            vocal = (vocal[0, :, 0] @ aims(vocal.shape[1], frames)).view(1, 2, -1, 1, 1).repeat(1, 8, 1, 1, 1)
        return PreparedStable(text, image, vocal, grid)

    def denoise(
        self, x: Tensor, t: Tensor, prepared: Mapping[str, Any], *, padded_frames: int | None,
        batched: bool,
    ) -> dict[str, Tensor]:  # fmt: skip
        self.branches.update(prepared)
        latents, sigma = x[:, :16], float(t) / 1000
        aimed = {name: ready.vocal for name, ready in prepared.items()}
        return {
            name: (latents if aim is None else latents - aim[:, :, : x.shape[2]]) / sigma
            for name, aim in aimed.items()
        }


class Codec:
    """Four pixel frames for every latent frame but the first."""

    def encode(self, video: Tensor) -> Tensor:
        return torch.zeros(1, 16, (video.shape[2] + 3) // 4, video.shape[3] // 8, video.shape[4] // 8)

    def decoder(self) -> SimpleNamespace:
        seen = Counter[str]()

        def push(latents: Tensor) -> Tensor:
            frames = latents[:, :3].repeat_interleave(4, dim=2)
            seen["latents"] += latents.shape[2]
            return frames if seen["latents"] > latents.shape[2] else frames[:, :, 3:]

        return SimpleNamespace(push=push)


class Words:
    text_len = 1

    def tokens(self, prompt: str) -> int:
        return 1

    def encode(self, prompt: str, device: torch.device) -> Tensor:
        return torch.full((1, 1, 1), float(prompt == "prompt"))


SIGMAS = double_shifted_sigmas(2, 5.0).tolist()  # nothing is blended in the first step
NOISE = torch.randn(1, 16, 110, 2, 2, generator=torch.Generator().manual_seed(0))


def stored(seed: int, key: Any, first: int, frames: int, shape: Any) -> Tensor:
    return NOISE[:, :, first : first + frames]


def driven_by(samples: int, cfg: RunConfig, dit: Listener | None = None) -> Tensor:
    """What each frame of the finished video was driven by, and where the window began that it is of, in pixel
    frames: [2, frames]."""
    tape = Tape()
    tower = SimpleNamespace(encode=lambda image: torch.zeros(1, 1, 1))
    audio: Any = Positions(tape)
    modules: Any = Modules(dit or Listener(), Codec(), Words(), audio, tower, device=torch.device("cpu"))
    image = torch.zeros(1, 3, 16, 16)
    inputs = Inputs(image, tape, samples, 0.0, 1.0, "prompt", "negative", 7, silent)
    denoise = Denoiser(FAMILY, modules.dit, FAMILY.guidance(cfg), SIGMAS, stored)
    with torch.inference_mode():
        blocks = sample_fused(denoise, modules, inputs, FAMILY.plan(samples, cfg), cfg)
        return torch.cat([block.pixels for block in blocks], dim=1)[:2, :, 0, 0]


@functools.cache
def whose(latents: int, overlap: int) -> Tensor:
    """First pixel frame of the window that each latent frame is of, in a video of `latents` frames: the first
    shared frame is the earlier window's, the last the later one's, those between are both's in proportion;
    without an overlap a shared frame is the later one's. [latents]"""
    length = min(21, latents)
    owners: list[float] = []
    while len(owners) < latents:
        start = min(len(owners) - overlap, latents - length) if owners else 0
        shared = len(owners) - start
        for frame in range(shared):
            part = frame / (shared - 1) if overlap else 1
            owners[start + frame] = part * 4 * start + (1 - part) * owners[start + frame]
        owners.extend([4 * start] * (length - shared))
    return torch.tensor(owners)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_every_frame_of_every_video_gets_its_own_time(overlap: int) -> None:
    """And from the window that it is of. Of the last frame's audio there is more or less."""
    cfg = settings(overlap)
    # Four lengths share their windows and differ in what is cut off. Where a window goes on by little there
    # are many windows: behind the first 100 lengths every third, which meets all windows and all remainders.
    for frames in (*range(1, 101), *range(101, 401, 1 if overlap < 10 else 3)):
        cut = frames * 37 % SAMPLES_PER_FRAME if frames > 1 else 0
        position, window = driven_by(frames * SAMPLES_PER_FRAME - cut, cfg)
        assert len(position) == frames
        # Latent frame 0 of the video is pixel frame 0, every later one shows four: so no pixel frame is more
        # than 1.5 from the middle of its latent frame, and none more than 3.5 from what it gets.
        latent = (torch.arange(frames) + 3) // 4
        shown = torch.where(latent == 0, 0.5, 4 * latent - 1.0)
        assert float((position - shown).abs().max()) < ONE_LATENT / 2, frames
        first = whose(max(int(latent[-1]) + 1, 2), overlap)[latent] + 200 / SAMPLES_PER_FRAME
        assert float((window - first).abs().max()) < 0.01, frames


def test_the_published_plan_gives_the_last_window_audio_of_the_wrong_time() -> None:
    """So the test above can fail: 13 latent frames get what is spread over 21 windows."""
    position, _ = driven_by(182 * SAMPLES_PER_FRAME, settings(10, "model.compat=reference"))
    wrong = (position - torch.arange(len(position)) - 0.5).abs()
    assert float(wrong[:80].max()) <= ONE_LATENT < float(wrong[-20:].max())


def job(seconds: float, pixels: tuple[int, int] = (16, 16)) -> Job:
    rng = np.random.default_rng(0)
    audio = audio_from_array(rng.standard_normal(round(seconds * 16_000)).astype(np.float32), 16_000, "noise")
    return Job(
        image_from_array(rng.integers(0, 255, (*pixels, 3), np.uint8), "noise"), audio, "prompt", "negative"
    )


def networks() -> Modules:
    return load(check_job(settings(2), ROW, job(0.1), silent))


@pytest.fixture(scope="module")
def tiny() -> Modules:
    """Shared, so not to be changed."""
    return networks()


@pytest.mark.parametrize("seconds", [0.04, 0.5, 3.24, 3.3])
@pytest.mark.parametrize("compat", ["none", "reference"])
def test_lengths_at_which_the_published_loop_gives_nothing_or_never_ends(
    tiny: Modules, seconds: float, compat: str
) -> None:
    work = job(seconds)
    cfg = settings(10, f"model.compat={compat}", "sampling.steps=2")
    plan = check_job(cfg, ROW, work, silent)
    frames = torch.cat([block.pixels for block in generate(plan, modules=tiny)], dim=1)
    samples = round(seconds * 16_000)
    whole = samples // SAMPLES_PER_FRAME
    expected = pixel_frames((whole - 1) // 4 + 1) if compat == "reference" else -(-samples // 640)
    assert frames.shape == (3, expected, 16, 16)
    assert bool(torch.isfinite(frames).all())
    assert float(frames.flatten(1).std()) > 0, "a flat video"


def lines_of(run: Callable[[Callable[[Event], None]], Any]) -> list[str]:
    lines: list[str] = []
    run(lambda event: lines.append(event.text) if isinstance(event, Notice) else None)
    return lines


def test_one_window_names_the_way_to_more() -> None:
    assert FAMILY.plan(81 * 640, settings(10, "long_video.strategy=off")).count == 1
    with pytest.raises(UsageError, match="82 frames and one window holds 81") as error:
        FAMILY.plan(82 * 640, settings(10, "long_video.strategy=off"))
    assert "--long-video fused" in str(error.value.fix)


@pytest.mark.parametrize("overlap", [0, 5])
def test_frames_of_a_last_window_that_was_moved_back(overlap: int) -> None:
    """With an overlap they are cross-faded over all that is shared, without one they are overwritten."""
    new, written = torch.full((1, 16, 21, 1, 1), 1.0), torch.zeros(1, 16, 9, 1, 1)
    state: Any = SimpleNamespace(overlap=overlap, blend="uniform")
    fused = FAMILY.fuse(new, written, None, 1, state)  # type: ignore[arg-type]
    head = torch.ones(9) if overlap == 0 else torch.linspace(0, 1, 9)
    torch.testing.assert_close(fused[0, 0, :9, 0, 0], head)
    assert fused[:, :, 9:].equal(new[:, :, 9:])
    # Nobody blends noise with noise.
    assert FAMILY.fuse(new, written, None, 0, state).equal(new)  # type: ignore[arg-type]


CFG = ("sampling.guidance_scale=3", "sampling.audio_guidance_scale=5")
AUDIOS = {
    ("cfg", "zero_context"): {
        "full": (1, "audio"), "negative": (0, "audio"), "silent_negative": (0, "nothing")
    },
    ("cfg", "projected_silence"): {
        "full": (1, "audio"), "negative": (0, "audio"), "silent_negative": (0, "silence")
    },
    ("native", "zero_context"): {
        "full": (1, "audio"), "silent": (1, "silence"), "unpaired": (1, "nothing")
    },
}  # fmt: skip


@pytest.mark.parametrize(("rule", "null"), list(AUDIOS))
def test_what_each_branch_reads(rule: str, null: str) -> None:
    dit = Listener()
    cfg = settings(10, *CFG, f"sampling.guidance_rule={rule}", f"sampling.null_audio={null}")
    driven_by(100 * SAMPLES_PER_FRAME, cfg, dit)

    def audio(vocal: Tensor | None) -> str:
        return "nothing" if vocal is None else "audio" if bool(vocal.any()) else "silence"

    found = {name: (int(ready.text), audio(ready.vocal)) for name, ready in dit.branches.items()}
    assert found == AUDIOS[rule, null]
    loud = [ready.vocal for ready in dit.branches.values() if ready.vocal is not None and ready.vocal.any()]
    assert len({id(vocal) for vocal in loud}) == 1, "branches with the same audio do not share it"


def video(modules: Modules, seconds: float, *more: str) -> Tensor:
    cfg = configure(
        "model.name=stableavatar-tiny", "sampling.steps=2", "output.width=16", "output.height=16", *more
    )
    work = job(seconds)
    blocks = generate(check_job(cfg, ROW, work, silent), modules=modules)
    return torch.cat([block.pixels for block in blocks], dim=1)


@pytest.mark.parametrize("overlap", [0, 5, 13])
def test_orders_give_the_same_video_to_the_bit(tiny: Modules, overlap: int) -> None:
    """1.9 s are 13 latent frames; windows of 5 with 0, 2 or 4 shared, the last moved back or not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    words = (f"long_video.overlap_frames={overlap}", "long_video.schedule=")
    try:
        videos = [video(tiny, 1.9, words[0], words[1] + order) for order in ("step", "wavefront")]
    finally:
        torch.set_num_threads(threads)
    assert videos[0].shape[1] == 48 and float(videos[0].std()) > 0
    assert videos[0].equal(videos[1])


@pytest.mark.parametrize("rule", ["cfg", "native"])
def test_branches_as_one_batch_give_the_same_video(tiny: Modules, rule: str) -> None:
    words = (*CFG, f"sampling.guidance_rule={rule}", "sampling.batch_branches=")
    apart, together = (video(tiny, 1.0, *words[:-1], words[-1] + value) for value in ("false", "true"))
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=1e-4)


def count(thing: Any, name: str, called: str, calls: Counter[str]) -> None:
    """Counts calls of a method of `thing`."""
    method = getattr(thing, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[called] += 1
        return method(*args, **kwargs)

    setattr(thing, name, call)


def test_what_is_made_once() -> None:
    tiny = networks()
    calls: Counter[str] = Counter()
    for part, name in (("audio", "tokens"), ("vae", "encode"), ("image", "encode"), ("text", "encode")):
        count(getattr(tiny, part), name, part, calls)
    prepared: Counter[str] = Counter()
    forward = tiny.dit.forward

    def spy(*args: Any, mode: str = "raw", **kwargs: Any) -> Any:
        prepared[mode] += 1
        prepared.update(key for key in ("text", "image", "grid", "vocal") if kwargs.get(key) is not None)
        return forward(*args, mode=mode, **kwargs)

    tiny.dit.forward = spy
    frames = video(tiny, 1.9, "long_video.overlap_frames=5", *CFG)
    assert frames.shape[1] == 48
    windows, steps = 4, 2  # 13 latent frames in windows of 5 that share 2, the last moved back
    assert calls == {"audio": windows, "vae": 1, "image": 1, "text": 2}
    assert prepared == {
        "prepare": windows + 2 + 1 + 1, "denoise": windows * steps,
        "vocal": windows, "text": 2, "image": 1, "grid": 1,
    }  # fmt: skip


@pytest.mark.parametrize("row", ["cartoon-i2v", "stableavatar-tiny"])
@pytest.mark.parametrize(
    ("pixels", "fit", "lines"), [((40, 96), "stretch", 1), ((40, 72), "stretch", 0), ((40, 200), "crop", 0)]
)
def test_an_image_that_is_stretched_out_of_shape(
    row: str, pixels: tuple[int, int], fit: str, lines: int
) -> None:
    cfg = configure(f"model.name={row}", f"input.fit={fit}", "output.width=64", "output.height=64")
    said = lines_of(lambda emit: check_job(cfg, find_model(row), job(0.1, pixels), emit))
    assert sum("stretched 2.4 times" in line for line in said) == lines


def test_native_guidance_says_what_it_is() -> None:
    cfg = settings(2, "sampling.guidance_rule=native")
    said = lines_of(lambda emit: check_job(cfg, ROW, job(0.1), emit))
    assert any("our reading of the paper, unverified against unpublished code" in line for line in said)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((700, 700), (512, 512)),
        ((1080, 1920), (480, 832)),
        ((1920, 1080), (832, 480)),
        ((100, 120), (512, 512)),
        ((100, 140), (480, 832)),
        ((1, 9000), (480, 832)),
    ],
)
def test_without_a_size_the_image_chooses_a_published_one(
    image: tuple[int, int], size: tuple[int, int]
) -> None:
    assert FAMILY.frame_size(image, settings(10)) == size


def test_a_window_is_normalised_by_its_own_audio_and_padded_with_silence() -> None:
    """Padding is silence after normalisation, and no part of the moments."""
    wave = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * 0.2 + 0.5
    given: list[Tensor] = []

    def tokens(waveform: Tensor) -> Tensor:
        given.append(waveform)
        return waveform

    reader: Any = SimpleNamespace(read=lambda start, stop: wave[start:stop])
    encoder: Any = SimpleNamespace(tokens=tokens)
    window_tokens(encoder, reader, (1000, 6000), samples=5000, device=torch.device("cpu"))
    (got,) = given
    assert got.shape == (1, 5000) and got.dtype == torch.float32
    real = got[0, :4000]
    assert abs(float(real.mean())) < 1e-5 and float(real.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert not bool(got[0, 4000:].any())
