"""Networks whose parameters are elsewhere, or have no numbers: what a run makes lies on `Modules.device`, and
no line on the way asks a tensor for its content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from avatarctl.config import RunConfig
from avatarctl.events import silent
from avatarctl.families import family_named
from avatarctl.family import Inputs, Modules
from avatarctl.loading.built_in import build_random_modules
from avatarctl.media import audio_from_array, image_from_array
from avatarctl.models.encode import AudioFeatures, window_tokens
from avatarctl.models.wav2vec import normalise_waveform
from avatarctl.pipelines.infer import generate
from avatarctl.pipelines.job import Job, check_job
from avatarctl.registry import configure, find_model
from avatarctl.sampling.chunks import sample_chunks
from avatarctl.sampling.denoise import Denoiser
from avatarctl.sampling.fused import sample_fused

MODELS = ("cartoon-i2v", "stableavatar-tiny")
CPU, META = torch.device("cpu"), torch.device("meta")
SAMPLES = 9 * 640 + 77  # 10 frames: two chunks, or two windows
SIZE = 16
LOOPS: dict[str, Any] = {"chunks": sample_chunks, "fused": sample_fused}


def settings(model: str) -> RunConfig:
    """All guidance branches, several chunks or windows, and more than one step."""
    return configure(
        f"model.name={model}", f"output.width={SIZE}", f"output.height={SIZE}", "sampling.steps=2",
        "sampling.guidance_scale=3", "sampling.audio_guidance_scale=2",
        "long_video.num_frames=9", "long_video.overlap_frames=5",
    )  # fmt: skip


class Wave:
    def read(self, start: int, stop: int) -> np.ndarray:
        """As of a recording of `SAMPLES`, with zeros behind it."""
        noise = np.random.default_rng(0).standard_normal(SAMPLES).astype(np.float32)
        return np.pad(noise, (0, max(0, stop - SAMPLES)))[start:stop]


def networks(modules: Modules) -> Iterator[nn.Module]:
    for part in (modules.dit, modules.vae, modules.text, modules.audio, modules.image):
        if isinstance(part, nn.Module):
            yield part


def slots(network: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where modules hold their parameters and buffers."""
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            yield from ((held, name) for name, tensor in held.items() if tensor is not None)


def to_meta(network: nn.Module) -> None:
    """Leaves the shapes of all parameters and buffers."""
    for held, name in slots(network):
        empty = held[name].to("meta")
        parameter = isinstance(held[name], nn.Parameter)
        held[name] = nn.Parameter(empty, requires_grad=False) if parameter else empty


def offload(network: nn.Module) -> None:
    """Parameters and buffers are on meta, but for those of a module and what it holds while it runs."""
    real = {(id(held), name): held[name] for held, name in slots(network)}
    to_meta(network)
    resting = {(id(held), name): held[name] for held, name in slots(network)}
    brought: list[list[tuple[dict[str, Any], str]]] = []

    def bring(module: nn.Module, *_: Any) -> None:
        brought.append([(held, name) for held, name in slots(module) if held[name].is_meta])
        for held, name in brought[-1]:
            held[name] = real[id(held), name]

    def take(*_: Any) -> None:
        for held, name in brought.pop():
            held[name] = resting[id(held), name]

    for module in network.modules():
        module.register_forward_pre_hook(bring, prepend=True)
        module.register_forward_hook(take, always_call=True)


def frames(model: str, modules: Modules, image: Tensor) -> Tensor:
    """Of the loop of a family: [3, n, H, W]."""
    cfg, family = settings(model), family_named(find_model(model).family)
    inputs = Inputs(image, Wave(), SAMPLES, 0.0, 1.0, "a prompt", "another", 7, silent)
    plan = family.plan(SAMPLES, cfg)
    assert plan.count == 2 and cfg.sampling.shift is not None
    with unset_fake_temporarily():  # a schedule is numbers, which a plan needs
        sigmas = family.sigmas(2, cfg.sampling.shift).tolist()
    denoise = Denoiser(family, modules.dit, family.guidance(cfg), sigmas)
    blocks = LOOPS[plan.kind](denoise, modules, inputs, plan, cfg)
    return torch.cat([block.pixels for block in blocks], dim=1)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_of_offloaded_networks_makes_the_same_video(model: str) -> None:
    """Their first parameter says meta whenever it is asked."""
    row, cfg = find_model(model), settings(model)
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)
    audio = audio_from_array(Wave().read(0, SAMPLES) / 8, 16_000, "noise")
    job = Job(image_from_array(pixels, "noise"), audio, "a prompt", "another")
    plan = check_job(cfg, row, job, silent)

    def video(modules: Modules) -> Tensor:
        return torch.cat([block.pixels for block in generate(plan, modules=modules)], dim=1)

    whole, offloaded = build_random_modules(row), build_random_modules(row)
    assert offloaded.device == CPU
    for network in networks(offloaded):
        offload(network)
    assert all(parameter.is_meta for network in networks(offloaded) for parameter in network.parameters())
    assert torch.equal(video(offloaded), video(whole))


class Elsewhere:
    """An encoder that fetches what it is given: where its input lies says nothing about the others."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def encode(self, pixels: Tensor) -> Tensor:
        """An image on meta has no numbers to fetch; it counts as grey."""
        return self.encoder.encode(torch.zeros(pixels.shape) if pixels.is_meta else pixels)

    def decoder(self) -> Any:
        return self.encoder.decoder()


@pytest.mark.parametrize("model", MODELS)
def test_an_image_may_lie_on_another_device(model: str) -> None:
    """And all else goes where the networks are said to be: tensors on two devices do not mix."""
    modules = build_random_modules(find_model(model))
    image = modules.image and Elsewhere(modules.image)
    apart = replace(modules, vae=Elsewhere(modules.vae), image=image)
    grey = torch.zeros(1, 3, SIZE, SIZE)
    assert torch.equal(frames(model, apart, grey.to(META)), frames(model, modules, grey))


@pytest.mark.parametrize("model", MODELS)
def test_tables_lie_where_the_latents_do(model: str) -> None:
    """Not where the first parameter is: a sharded network has only a part of it, or none."""
    network = build_random_modules(find_model(model)).dit
    network.patch_embedding.to(META)
    table = network(mode="prepare", grid=(2, 4, 4), device=CPU).rotary
    assert table.device == CPU and torch.isfinite(torch.view_as_real(table)).all()


def test_moments_of_a_recording_are_measured_where_its_samples_are() -> None:
    """By a layer that is called alone, so that no forward of the encoder brings its parameters."""

    def features(offloaded: bool) -> Tensor:
        encoder: Any = build_random_modules(find_model("cartoon-i2v")).audio
        if offloaded:
            offload(encoder)
        return AudioFeatures(
            encoder, Wave(), samples=SAMPLES, mean=0.0, variance=1.0, frames=80, window_seconds=3, device=CPU
        ).rows(0, 80)  # fmt: skip

    assert torch.equal(features(offloaded=True), features(offloaded=False))


@pytest.mark.parametrize("model", MODELS)
def test_the_whole_loop_runs_on_fake_tensors(model: str) -> None:
    """Encoders, conditions, guided steps and decoder: a memory estimate walks the code of a run."""
    modules = build_random_modules(find_model(model))
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # samples come from numpy
    for network in networks(modules):
        for held, name in slots(network):
            held[name] = mode.from_tensor(held[name])
    with mode:
        video = frames(model, modules, torch.zeros(1, 3, SIZE, SIZE))
    assert isinstance(video, FakeTensor) and video.shape == (3, 10, SIZE, SIZE)


@pytest.mark.parametrize("loudness", [1e-6, 1e-3, 0.3, 1.0])
def test_a_window_is_normalised_by_moments_in_float64(loudness: float) -> None:
    """To the bit what torch's own moments give."""
    given: list[Tensor] = []
    encoder: Any = type("Encoder", (), {"tokens": lambda self, waveform: given.append(waveform)})()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        length = int(rng.integers(400, 80_000))
        wave = (rng.standard_normal(length) * loudness + rng.uniform(-0.5, 0.5)).astype(np.float32)
        reader: Any = type("Reader", (), {"read": lambda self, start, stop, wave=wave: wave[start:stop]})()
        window_tokens(encoder, reader, (0, length), samples=length, device=CPU)
        variance, mean = torch.var_mean(torch.from_numpy(wave).double(), correction=0)
        expected = normalise_waveform(torch.from_numpy(wave), float(mean), float(variance))
        assert torch.equal(given.pop(), expected[None]), seed
