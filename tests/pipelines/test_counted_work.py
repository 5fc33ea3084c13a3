"""Work is counted: every expensive call of a run equals the least that the result needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from avatarctl.families import family_named
from avatarctl.family import Inputs, Modules
from avatarctl.models.loading import build_random_modules
from avatarctl.registry import configure, find_model
from avatarctl.sampling.chunks import sample_chunks
from avatarctl.sampling.denoise import Denoiser

CHUNKS, STEPS, LATENTS = 4, 3, 3


class Silence:
    def read(self, start: int, stop: int) -> np.ndarray:
        return np.zeros(stop - start, np.float32)


def count_calls(modules: Modules) -> Counter[str]:
    calls: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    dit, vae = modules.dit, modules.vae.vae
    modules.text.encoder.register_forward_hook(counting("prompt encodings"))
    modules.audio.feature_extractor.register_forward_hook(counting("feature extractions"))
    dit.condition_embedder.text_embedder.register_forward_hook(counting("text projections"))
    dit.audio_proj.register_forward_hook(counting("audio projections"))
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
    return calls


BRANCHES = {"1": ("1", "1"), "2": ("4.5", "4.5"), "3": ("4.5", "3")}


@pytest.mark.parametrize("branches", BRANCHES)
def test_every_call_is_needed(branches: str) -> None:
    text, audio = BRANCHES[branches]
    cfg = configure(
        "long_video.num_frames=9", "long_video.overlap_frames=5", f"sampling.steps={STEPS}",
        f"sampling.guidance_scale={text}", f"sampling.audio_guidance_scale={audio}",
        "output.width=16", "output.height=16",
    )  # fmt: skip
    row = find_model("cartoon-i2v")
    modules = build_random_modules(row)
    family = family_named(row.family)
    samples = 640 * (9 + 4 * (CHUNKS - 1))
    plan = family.plan(samples, cfg)
    assert plan.count == CHUNKS
    inputs = Inputs(
        picture=torch.zeros(1, 3, 16, 16), waveform=Silence(), samples=samples, mean=0.0, variance=0.0,
        prompt="a", negative_prompt="b", job=1, emit=lambda event: None,
    )  # fmt: skip
    denoise = Denoiser(family, modules.dit, family.guidance(cfg), family.sigmas(STEPS, 5.0))
    calls = count_calls(modules)
    frames = sum(block.pixels.shape[1] for block in sample_chunks(denoise, modules, inputs, plan, cfg))
    assert frames == plan.frames

    n, prompts, layers = int(branches), (1 if branches == "1" else 2), len(modules.dit.blocks)
    assert calls == {
        "prompt encodings": prompts,  # each prompt once per job
        "feature extractions": 1,  # the sound fits one window
        "text projections": prompts,  # constant over chunks and steps
        "text keys": prompts * layers,
        "audio projections": CHUNKS + (1 if n > 1 else 0),  # each chunk's sound once, silence once per job
        "rotary tables": 1,  # chunks are equally long
        "time embeddings": CHUNKS * STEPS,  # shared by the branches of a step
        "patch embeddings": CHUNKS * STEPS,
        "transformer passes": CHUNKS * STEPS * n,
        "blocks": CHUNKS * STEPS * n * layers,
        "VAE encodes": 1 + (CHUNKS - 1),  # the picture; each later chunk's prefix
        "VAE decodes": CHUNKS,
        "VAE decoder frames": CHUNKS * LATENTS,
    }


def test_long_sound_is_encoded_once_per_window() -> None:
    cfg = configure("long_video.audio_window=6", "output.width=16", "output.height=16", "sampling.steps=1")
    row = find_model("cartoon-i2v")
    modules = build_random_modules(row)
    family = family_named(row.family)
    plan = family.plan(640 * 450, cfg)
    inputs = Inputs(
        picture=torch.zeros(1, 3, 16, 16), waveform=Silence(), samples=640 * 450, mean=0.0, variance=0.0,
        prompt="a", negative_prompt="", job=1, emit=lambda event: None,
    )  # fmt: skip
    denoise = Denoiser(family, modules.dit, family.guidance(cfg), family.sigmas(1, 5.0))
    calls = count_calls(modules)
    for _ in sample_chunks(denoise, modules, inputs, plan, cfg):
        pass
    padded = 33 + 32 * (plan.count - 1)
    # Windows of 150 frames that share 50.
    assert calls["feature extractions"] == 1 + -(-(padded - 150) // 100)
