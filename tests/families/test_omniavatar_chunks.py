"""The chunks of a video by OmniAvatar: what each is given, and which of its frames are shown.

Whole runs through the real classes, at tiny size and with random weights. The clock is written out here once
more, from spec/omniavatar.md f.4: frame i of chunk k is frame k (L - o) + i of the video, for chunks of L
frames that share o. What a chunk starts from, its audio and its place in the video must all keep to it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from avatarctl.events import silent
from avatarctl.family import Modules
from avatarctl.media import audio_from_array, image_from_array
from avatarctl.models.omniavatar import PreparedTensors
from avatarctl.pipelines.infer import generate, load
from avatarctl.pipelines.job import Job, JobPlan, check_job
from avatarctl.registry import configure, find_model
from avatarctl.rng import latent_noise
from avatarctl.sampling.frame_block import FrameBlock
from avatarctl.timeline import SAMPLES_PER_FRAME, latent_frames
from tests.families.watched import WatchedCodec

TINY = find_model("cartoon-i2v")
SMALLER = {"vae": {**TINY.network["vae"], "base_dim": 4}, "dit": {**TINY.network["dit"], "num_layers": 4}}
ROW = replace(TINY, files=(), network={**TINY.network, **SMALLER})
LENGTH = 17
LATENTS = (16, 2, 4)  # channels, height, width of a latent frame
CHUNKS = 3
UNFILLED = 2  # frames of the last chunk that the audio leaves empty
STEPS = 2
SEED = 5
EVERY = ((1, 0), (5, 1), (13, 0), (13, 1))  # overlap, audio offset

Call = tuple[Tensor, dict[str, PreparedTensors]]  # input of the transformer [1, 33, T, h, w], and by branch


@dataclass
class Run:
    """What happened in a run of three chunks with three guidance branches."""

    plan: JobPlan
    overlap: int
    offset: int
    codec: WatchedCodec
    calls: list[Call] = field(default_factory=list)
    blocks: list[FrameBlock] = field(default_factory=list)

    @property
    def hop(self) -> int:
        """New frames of a later chunk."""
        return LENGTH - self.overlap

    def given(self, chunk: int) -> int:
        """Latent frames that a chunk starts from."""
        return latent_frames(self.overlap) if chunk else 1

    def steps(self, chunk: int) -> list[Call]:
        return self.calls[chunk * STEPS : (chunk + 1) * STEPS]

    @functools.cached_property
    def image(self) -> Tensor:
        """Its code, [1, 16, 1, h, w]."""
        return self.codec.real.encode(self.codec.coded[0])

    @property
    def decoded(self) -> list[tuple[Tensor, Tensor]]:
        """Latents [1, 16, T, h, w] and all their frames [1, 3, L, H, W], by chunk; each chunk has its own
        decoder and is decoded at once."""
        assert [len(decoder.pushed) for decoder in self.codec.decoders] == [1] * CHUNKS
        return [decoder.pushed[0] for decoder in self.codec.decoders]

    @property
    def finished(self) -> list[Tensor]:
        return [latents for latents, _ in self.decoded]

    @property
    def made(self) -> list[Tensor]:
        return [frames for _, frames in self.decoded]

    @functools.cached_property
    def features(self) -> Tensor:
        """What every frame of the video gets, and those behind its end: [1, frames, width]."""
        recording = recorded(audio_frames(self.overlap, self.offset)).astype(np.float64)
        frames = audio_frames(self.overlap, self.offset) + UNFILLED
        wave = np.zeros(frames * SAMPLES_PER_FRAME)
        wave[: len(recording)] = (recording - recording.mean()) / np.sqrt(recording.var() + 1e-7)
        expected_audio = networks().audio.features(torch.from_numpy(wave).float()[None], frames)
        return torch.cat(
            [expected_audio.new_zeros(1, self.offset, expected_audio.shape[2]), expected_audio], dim=1
        )


def audio_frames(overlap: int, offset: int) -> int:
    """Frames of the recording."""
    return LENGTH - offset + (CHUNKS - 1) * (LENGTH - overlap) - UNFILLED


def recorded(frames: int) -> np.ndarray:
    """Noise of `frames` frames, the last of them not quite filled; louder from frame to frame."""
    rng = np.random.default_rng(0)
    loudness = np.linspace(0.02, 0.3, frames).repeat(SAMPLES_PER_FRAME)
    return (rng.standard_normal(len(loudness)) * loudness).astype(np.float32)[:-100]


def planned(overlap: int, offset: int) -> JobPlan:
    cfg = configure(
        f"model.name={ROW.name}", f"model.audio_offset={offset}", f"long_video.num_frames={LENGTH}",
        f"long_video.overlap_frames={overlap}", f"sampling.steps={STEPS}", "sampling.guidance_scale=4.5",
        "sampling.audio_guidance_scale=3", "output.width=32", "output.height=16", f"runtime.seed={SEED}",
    )  # fmt: skip
    pixels = np.random.default_rng(1).integers(0, 255, (16, 32, 3), np.uint8)
    audio = audio_from_array(recorded(audio_frames(overlap, offset)), 16_000, "noise")
    job = Job(image_from_array(pixels, "noise"), audio, "a prompt", "another")
    return check_job(cfg, ROW, job, silent)


@functools.cache
def networks() -> Modules:
    return load(planned(1, 0))


@functools.cache
def read(prompt: str) -> Any:
    """Its keys and values in every block."""
    return networks().dit(mode="prepare", text=networks().text.encode(prompt, networks().device)).text


@functools.cache
def run(overlap: int, offset: int) -> Run:
    plan = planned(overlap, offset)
    seen = Run(plan, overlap, offset, WatchedCodec(networks().vae))

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["mode"] == "denoise":
            x, _, prepared = args
            seen.calls.append((x.clone(), dict(prepared)))

    hook = networks().dit.register_forward_pre_hook(note, with_kwargs=True)
    seen.blocks.extend(generate(plan, modules=replace(networks(), vae=seen.codec)))
    hook.remove()
    return seen


@pytest.fixture(params=EVERY, ids="overlap {0[0]}, offset {0[1]}".format)
def seen(request: pytest.FixtureRequest) -> Run:
    return run(*request.param)


def all_differ(tensors: Iterator[Tensor]) -> bool:
    return not any(torch.allclose(one, other, atol=1e-4) for one, other in combinations(tensors, 2))


def test_a_chunk_starts_from_the_code_of_the_last_frames_of_the_one_before(seen: Run) -> None:
    assert len(seen.calls) == CHUNKS * STEPS
    assert all_differ(frame for frames in seen.made for frame in frames.unbind(2))
    for k in range(CHUNKS):
        tail = seen.made[k - 1][:, :, LENGTH - seen.overlap :]
        start = networks().vae.encode(tail) if k else seen.image
        assert start.shape[2] == seen.given(k)
        # In every step, and in what is decoded.
        for x in [*(x[:, :16] for x, _ in seen.steps(k)), seen.finished[k]]:
            assert torch.equal(x[:, :, : seen.given(k)], start)


def test_nothing_is_coded_but_the_image_and_the_tails(seen: Run) -> None:
    assert [video.shape[2] for video in seen.codec.coded] == [1] + [seen.overlap] * (CHUNKS - 1)


def test_every_chunk_is_shown_the_image_and_told_what_it_starts_from(seen: Run) -> None:
    """The reference is never a tail."""
    for k in range(CHUNKS):
        mask = torch.ones(latent_frames(LENGTH))
        mask[: seen.given(k)] = 0
        for x, _ in seen.steps(k):
            assert torch.equal(x[:, 16:32], seen.image.expand(-1, -1, len(mask), -1, -1))
            assert torch.equal(x[:, 32], mask.view(1, -1, 1, 1).expand_as(x[:, 32]))


def test_the_noise_of_a_chunk_is_its_own(seen: Run) -> None:
    """Its key is seed, job and chunk; its first frame is the chunk's first."""
    begun = [seen.steps(k)[0][0][:, :16] for k in range(CHUNKS)]
    for k, x in enumerate(begun):
        noise = latent_noise(SEED, (seen.plan.job.key, k), 0, latent_frames(LENGTH), LATENTS)
        assert torch.equal(x[:, :, seen.given(k) :], noise[:, :, seen.given(k) :])
    assert all_differ(x[:, :, -1] for x in begun)


def test_frames_meet_without_repeat_or_gap(seen: Run) -> None:
    video = torch.cat([block.pixels for block in seen.blocks], dim=1)
    assert video.shape[1] == audio_frames(seen.overlap, seen.offset) + seen.offset
    for frame in range(video.shape[1]):
        k = max(0, -(-(frame - LENGTH + 1) // seen.hop))  # the first chunk that reaches it shows it
        assert torch.equal(video[:, frame], seen.made[k][0, :, frame - k * seen.hop]), frame
    firsts = [0, *(LENGTH + k * seen.hop for k in range(CHUNKS - 1))]
    assert [(block.span, block.first) for block in seen.blocks] == list(enumerate(firsts))


def test_every_frame_gets_its_own_audio_in_every_chunk_that_makes_it(seen: Run) -> None:
    """As the network gets it in every step. Frame f of the video gets frame f - offset of the audio."""
    silence = torch.zeros_like(seen.features[:, :LENGTH])
    for k in range(CHUNKS):
        own = seen.features[:, k * seen.hop : k * seen.hop + LENGTH]
        expected_audio = {"full": own, "silent": silence, "negative": silence}
        for _, prepared in seen.steps(k):
            assert prepared.keys() == expected_audio.keys()
            for branch, audio in expected_audio.items():
                expected = networks().dit(mode="prepare", audio=audio).audio
                torch.testing.assert_close(prepared[branch].audio, expected, atol=1e-4, rtol=1e-4)


def test_every_chunk_reads_the_same_prompts(seen: Run) -> None:
    job = seen.plan.job
    prompts = {"full": job.prompt, "silent": job.prompt, "negative": job.negative_prompt}
    for _, prepared in seen.calls:
        for branch, ready in prepared.items():
            torch.testing.assert_close(ready.text, read(prompts[branch]))


def test_every_chunk_counts_its_places_from_its_own_start(seen: Run) -> None:
    rotary = networks().dit(mode="prepare", grid=(latent_frames(LENGTH), *LATENTS[1:])).rotary
    assert all(torch.equal(ready.rotary, rotary) for _, prepared in seen.calls for ready in prepared.values())
