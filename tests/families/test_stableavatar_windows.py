"""The windows of a video by StableAvatar: what each is given in every step, and which frames come of it.

A whole run through the real classes, at tiny size and with random weights. The rules are written out here
once more, from spec/stableavatar.md d and e; the last window is moved back, so that all are equally long.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avatarctl.events import silent
from avatarctl.family import Modules
from avatarctl.media import audio_from_array, image_from_array
from avatarctl.models.stableavatar import PreparedStable
from avatarctl.pipelines.infer import generate, load
from avatarctl.pipelines.job import Job, JobPlan, check_job
from avatarctl.registry import configure, find_model
from avatarctl.rng import latent_noise
from avatarctl.sampling.frame_block import FrameBlock
from avatarctl.timeline import SAMPLES_PER_FRAME
from tests.families.watched import WatchedCodec

TINY = find_model("stableavatar-tiny")
ROW = replace(TINY, network={**TINY.network, "vae": {**TINY.network["vae"], "base_dim": 4}})
WINDOW, STARTS, TOTAL = 5, (0, 3, 6, 7), 12  # latent frames; two are shared, by the last two windows four
FRAMES = 43  # two less than 12 latent frames hold
LATENTS = (16, 2, 4)  # channels, height, width of a latent frame
STEPS, SEED, TEXT, AUDIO = 3, 5, 3.0, 5.0
WEIGHTS = {"full": TEXT, "negative": AUDIO - TEXT, "silent_negative": 1 - AUDIO}


@dataclass(frozen=True)
class Call:
    """Of the transformer: x [1, 36, T, h, w], and by guidance branch what was prepared and what came out."""

    x: Tensor
    prepared: dict[str, PreparedStable]
    velocities: dict[str, Tensor]


@dataclass
class Run:
    """What happened; calls in the order of steps, and of windows within a step."""

    codec: WatchedCodec
    calls: list[Call] = field(default_factory=list)
    blocks: list[FrameBlock] = field(default_factory=list)

    def at(self, window: int, step: int) -> Call:
        return self.calls[step * len(STARTS) + window]


def recorded() -> np.ndarray:
    """Noise that is louder from frame to frame; the last frame is not quite filled."""
    loudness = np.linspace(0.02, 0.3, FRAMES).repeat(SAMPLES_PER_FRAME)
    return (np.random.default_rng(0).standard_normal(len(loudness)) * loudness).astype(np.float32)[:-100]


@functools.cache
def planned() -> JobPlan:
    cfg = configure(
        f"model.name={ROW.name}", "long_video.num_frames=17", "long_video.overlap_frames=5",
        "long_video.schedule=step", f"sampling.steps={STEPS}", f"sampling.guidance_scale={TEXT}",
        f"sampling.audio_guidance_scale={AUDIO}", "output.width=32", "output.height=16",
        f"runtime.seed={SEED}",
    )  # fmt: skip
    pixels = np.random.default_rng(1).integers(0, 255, (16, 32, 3), np.uint8)
    audio = audio_from_array(recorded(), 16_000, "noise")
    job = Job(image_from_array(pixels, "noise"), audio, "a prompt", "another")
    return check_job(cfg, ROW, job, silent)


@functools.cache
def networks() -> Modules:
    return load(planned())


@functools.cache
def run() -> Run:
    plan = planned()
    seen = Run(WatchedCodec(networks().vae))

    def note(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if kwargs["mode"] == "denoise":
            x, _, prepared = args
            seen.calls.append(Call(x.clone(), dict(prepared), dict(out)))

    hook = networks().dit.register_forward_hook(note, with_kwargs=True)
    seen.blocks.extend(generate(plan, modules=replace(networks(), vae=seen.codec)))
    hook.remove()
    assert len(seen.calls) == len(STARTS) * STEPS
    return seen


def fused(step: int) -> Tensor:
    """All latents of the video behind a step, [1, 16, F, h, w], from what the network gave for each window:
    the earlier window owns the first shared frame and the later one the last; after the first step, which is
    nearly noise, the later one owns them all."""
    plan = planned()
    assert plan.cfg.sampling.shift is not None
    sigmas = plan.family.sigmas(STEPS, plan.cfg.sampling.shift).tolist()
    video = torch.zeros(1, 16, TOTAL, *LATENTS[1:])
    written = 0
    for window, start in enumerate(STARTS):
        call = run().at(window, step)
        velocity = sum(weight * call.velocities[name] for name, weight in WEIGHTS.items())
        new = call.x[:, :16] + velocity * (sigmas[step + 1] - sigmas[step])
        shared = max(0, written - start)
        later = torch.ones(WINDOW)
        if step > 0:
            later[:shared] = torch.arange(shared) / (shared - 1)
        later = later.view(1, 1, -1, 1, 1)
        own = slice(start, start + WINDOW)
        video[:, :, own] = later * new + (1 - later) * video[:, :, own]
        written = start + WINDOW
    return video


def test_windows_that_share_frames_share_their_noise() -> None:
    """Its key is seed and job, and its frames are those of the video."""
    noise = latent_noise(SEED, (planned().job.key,), 0, TOTAL, LATENTS)
    for window, start in enumerate(STARTS):
        assert torch.equal(run().at(window, 0).x[:, :16], noise[:, :, start : start + WINDOW])


def test_a_window_goes_on_from_what_all_windows_made_of_its_frames() -> None:
    for step in range(1, STEPS):
        before = fused(step - 1)
        for window, start in enumerate(STARTS):
            x = run().at(window, step).x[:, :16]
            torch.testing.assert_close(x, before[:, :, start : start + WINDOW], atol=1e-5, rtol=1e-5)


def test_frames_of_the_video_are_the_finished_latents_in_order() -> None:
    (decoder,) = run().codec.decoders
    finished = torch.cat([latents for latents, _ in decoder.pushed], dim=2)
    torch.testing.assert_close(finished, fused(STEPS - 1), atol=1e-5, rtol=1e-5)
    frames = networks().vae.decoder().push(finished)[0, :, :FRAMES]
    video = torch.cat([block.pixels for block in run().blocks], dim=1)
    torch.testing.assert_close(video, frames, atol=1e-5, rtol=1e-5)
    # The frames that a window finishes are those before the next one starts.
    firsts = [0, *(4 * start - 3 for start in STARTS[1:])]
    assert [(block.span, block.first) for block in run().blocks] == list(enumerate(firsts))


def test_every_window_is_shown_the_same_image() -> None:
    """As the first of its frames, all others grey, and as tokens."""
    (video,) = run().codec.coded
    assert video.shape[2] == 17 and not video[:, :, 1:].any() and video[:, :, 0].any()
    code = networks().vae.encode(video)
    mask = torch.zeros(1, 4, *code.shape[2:])
    mask[:, :, 0] = 1
    channels = torch.cat([mask, code], dim=1)
    image = networks().image
    assert image is not None
    tokens = networks().dit(mode="prepare", image=image.encode(video[:, :, 0])).image
    for call in run().calls:
        assert torch.equal(call.x[:, 16:], channels)
        for ready in call.prepared.values():
            torch.testing.assert_close(ready.image, tokens)


def test_every_window_reads_the_same_prompts() -> None:
    job, dit = planned().job, networks().dit
    texts = {
        prompt: dit(mode="prepare", text=networks().text.encode(prompt, networks().device)).text
        for prompt in (job.prompt, job.negative_prompt)
    }
    for call in run().calls:
        assert call.prepared.keys() == WEIGHTS.keys()
        for branch, ready in call.prepared.items():
            expected = texts[job.prompt if branch == "full" else job.negative_prompt]
            torch.testing.assert_close(ready.text, expected)


def test_every_window_counts_its_places_from_its_own_start() -> None:
    rotary = networks().dit(mode="prepare", grid=(WINDOW, *LATENTS[1:])).rotary
    assert all(torch.equal(ready.rotary, rotary) for call in run().calls for ready in call.prepared.values())


def test_a_window_gets_the_audio_of_its_own_frames() -> None:
    """Normalised by itself, and padded behind the recording."""
    for window, start in enumerate(STARTS):
        first = 4 * start * SAMPLES_PER_FRAME
        own = recorded()[first : first + 17 * SAMPLES_PER_FRAME].astype(np.float64)
        wave = np.zeros(17 * SAMPLES_PER_FRAME)
        wave[: len(own)] = (own - own.mean()) / np.sqrt(own.var() + 1e-7)
        tokens = networks().audio.tokens(torch.from_numpy(wave).float()[None])
        expected_audio = networks().dit(mode="prepare", vocal=tokens, frames=17).vocal
        for step in range(STEPS):
            prepared = run().at(window, step).prepared
            assert prepared["silent_negative"].vocal is None
            for branch in ("full", "negative"):
                torch.testing.assert_close(prepared[branch].vocal, expected_audio, atol=1e-4, rtol=1e-4)
