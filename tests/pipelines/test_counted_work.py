"""Work is counted: every expensive call of a run equals the least that the result needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from avatarctl.config import RunConfig
from avatarctl.events import silent
from avatarctl.family import Modules, VideoPlan
from avatarctl.loading.built_in import build_random_modules
from avatarctl.media import audio_from_array, image_from_array
from avatarctl.pipelines.infer import generate
from avatarctl.pipelines.job import Job, check_job
from avatarctl.registry import configure, find_model

STEPS = 3
CHUNKS, WINDOWS = "cartoon-i2v", "stableavatar-tiny"


def count_calls(modules: Modules) -> Counter[str]:
    calls: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    dit, vae = modules.dit, modules.vae.vae
    modules.text.encoder.register_forward_hook(counting("prompt encodings"))
    modules.audio.feature_extractor.register_forward_hook(counting("feature extractions"))
    dit.condition_embedder.text_embedder.register_forward_hook(counting("text projections"))
    dit.rope.register_forward_hook(counting("rotary tables"))
    dit.condition_embedder.time_proj.register_forward_hook(counting("time embeddings"))
    dit.patch_embedding.register_forward_hook(counting("patch embeddings"))
    dit.proj_out.register_forward_hook(counting("transformer passes"))
    for block in dit.blocks:
        block.ffn.register_forward_hook(counting("blocks"))
        block.attn2.to_k.register_forward_hook(counting("text keys"))
    vae.quant_conv.register_forward_hook(counting("VAE encodes"))
    vae.post_quant_conv.register_forward_hook(counting("VAE decodes"))
    vae.decoder.register_forward_hook(counting("VAE decoder frames"))
    if hasattr(dit, "audio_proj"):
        dit.audio_proj.register_forward_hook(counting("audio projections"))
    if hasattr(dit, "vocal_projector"):
        dit.vocal_projector.proj_model.register_forward_hook(counting("audio projections"))
        dit.vocal_projector.register_forward_hook(counting("audio adapter passes"))
        dit.condition_embedder.image_embedder.register_forward_hook(counting("image projections"))
        for block in dit.blocks:
            block.attn2.add_k_proj.register_forward_hook(counting("image keys"))
            block.attn2.vocal_k.register_forward_hook(counting("audio keys"))
    if modules.image is not None:
        modules.image.register_forward_hook(counting("image encodings"))
    return calls


def work(cfg: RunConfig, samples: int, **parts: Mapping[str, object]) -> tuple[VideoPlan, Mapping[str, int]]:
    """The plan of a run over silence, and the calls that it made. parts: networks unlike the row's."""
    row = find_model(cfg.model.name or "")
    row = replace(row, network={**row.network, **parts})
    image = image_from_array(np.zeros((16, 16, 3), np.uint8), "black")
    job = Job(image, audio_from_array(np.zeros(samples, np.float32), 16_000, "silence"), "a", "b")
    plan = check_job(cfg, row, job, silent)
    modules = build_random_modules(row)
    calls = count_calls(modules)
    blocks = generate(plan, modules=modules)
    assert sum(block.pixels.shape[1] for block in blocks) == plan.video.frames
    return plan.video, calls


def settings(model: str, *more: str) -> RunConfig:
    return configure(
        f"model.name={model}", "output.width=16", "output.height=16", f"sampling.steps={STEPS}", *more
    )


LAYERS = {model: find_model(model).network["dit"]["num_layers"] for model in (CHUNKS, WINDOWS)}
BRANCHES = {"1": ("1", "1"), "2": ("4.5", "4.5"), "3": ("4.5", "3")}


def guided(branches: str) -> tuple[str, ...]:
    text, audio = BRANCHES[branches]
    return f"sampling.guidance_scale={text}", f"sampling.audio_guidance_scale={audio}"


def of_every_family(spans: int, prompts: int, layers: int, passes: int) -> dict[str, int]:
    return {
        "prompt encodings": prompts,  # each prompt once per job
        "text projections": prompts,  # constant over spans and steps
        "text keys": prompts * layers,
        "rotary tables": 1,  # spans are equally long
        "time embeddings": spans * STEPS,  # shared by the branches of a step
        "patch embeddings": spans * STEPS,
        "transformer passes": spans * STEPS * passes,
        "blocks": spans * STEPS * passes * layers,
    }


@pytest.mark.parametrize("branches", BRANCHES)
def test_every_call_of_chunks_is_needed(branches: str) -> None:
    chunks, latents, n = 4, 3, int(branches)
    cfg = settings(CHUNKS, "long_video.num_frames=9", "long_video.overlap_frames=5", *guided(branches))
    plan, calls = work(cfg, 640 * (9 + 4 * (chunks - 1)))
    assert plan.count == chunks
    assert calls == of_every_family(chunks, 1 if n == 1 else 2, LAYERS[CHUNKS], n) | {
        "feature extractions": 1,  # the audio fits one window
        "audio projections": chunks + (1 if n > 1 else 0),  # each chunk's audio once, silence once per job
        "VAE encodes": 1 + (chunks - 1),  # the image; each later chunk's prefix
        "VAE decodes": chunks,
        "VAE decoder frames": chunks * latents,
    }


@pytest.mark.parametrize("order", ["step", "wavefront"])
@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
@pytest.mark.parametrize("branches", BRANCHES)
def test_every_call_of_windows_is_needed(branches: str, batched: bool, order: str) -> None:
    windows, latents, n = 4, 3 + 3 * 1, int(branches)
    cfg = settings(
        WINDOWS, "long_video.num_frames=9", "long_video.overlap_frames=5", *guided(branches),
        f"sampling.batch_branches={str(batched).lower()}", f"long_video.schedule={order}",
    )  # fmt: skip
    plan, calls = work(cfg, 640 * (4 * latents - 3))
    assert plan.count == windows
    layers, with_audio = LAYERS[WINDOWS], max(1, n - 1)  # the first branch of several gets no audio
    assert calls == of_every_family(windows, 1 if n == 1 else 2, layers, 1 if batched else n) | {
        "feature extractions": windows,  # not once per step
        "audio projections": windows,
        "audio adapter passes": windows * STEPS,  # branches with the same audio share it
        "audio keys": windows * STEPS * layers * (1 if batched else with_audio),
        "image encodings": 1,
        "image projections": 1,
        "image keys": layers,  # once per job, whatever the branch
        "VAE encodes": 1,
        "VAE decodes": windows,  # each window's final frames, by one decoder
        "VAE decoder frames": latents,  # each latent frame once, however many windows hold it
    }


def test_encoded_silence_is_projected_once_per_job() -> None:
    small = (
        "long_video.num_frames=9",
        "long_video.overlap_frames=5",
        "sampling.batch_branches=false",
        *guided("3"),
    )
    _, nothing = work(settings(WINDOWS, *small), 640 * 21)
    _, silence = work(settings(WINDOWS, *small, "sampling.null_audio=projected_silence"), 640 * 21)
    more = Counter(silence) - Counter(nothing)
    windows = nothing["feature extractions"]
    # Silence stands in the place of nothing, so every window's adapter and every block reads one more.
    assert more == {
        "audio projections": 1,
        "audio adapter passes": windows * STEPS,
        "audio keys": windows * STEPS * LAYERS[WINDOWS],
    }
    assert not Counter(nothing) - Counter(silence)


def test_long_audio_is_encoded_once_per_piece() -> None:
    plan, calls = work(
        configure("long_video.audio_window=5", "output.width=16", "output.height=16", "sampling.steps=1"),
        640 * 250,
    )
    padded = 33 + 28 * (plan.count - 1)
    # Pieces of 125 frames that share 50.
    assert calls["feature extractions"] == 1 + -(-(padded - 125) // 75) == 3


@pytest.mark.parametrize(("width", "passes"), [(256, 1), (272, 3)])
def test_small_passes_are_one_batch(width: int, passes: int) -> None:
    """Five frames of audio are one window of 2 latent frames, each of 256 or 272 video tokens."""
    small = {**find_model(WINDOWS).network["vae"], "base_dim": 4}  # it is not what is looked at
    cfg = settings(WINDOWS, "output.height=256", f"output.width={width}", "sampling.steps=1", *guided("3"))
    plan, calls = work(cfg, 640 * 5, vae=small)
    assert next(plan.spans()).frames == 2
    assert calls["transformer passes"] == passes
