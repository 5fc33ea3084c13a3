"""The StableAvatar network against its formulas written out slowly (spec/stableavatar.md a, b)."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from avatarctl.loading.fill import on_meta
from avatarctl.models.precision import cast
from avatarctl.models.stableavatar import (
    ExactSinusoid,
    PreparedStable,
    StableAvatarTransformer,
)
from avatarctl.models.vocal_projector import VocalProjector, vocal_windows
from avatarctl.rng import generator
from avatarctl.weights.layouts import STABLEAVATAR

WIDTH, TEXT, IMAGE, AUDIO = 24, 10, 6, 7
GRID = (3, 4, 8)  # latent frames, height, width
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": WIDTH // 2,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "image_dim": IMAGE,
    "vocal_dim": AUDIO,
}


def build(**changes: Any) -> StableAvatarTransformer:
    """Every parameter random, also those that a constructor sets to one or zero."""
    numbers = generator(1, "weights")
    network = StableAvatarTransformer(**{**TINY, **changes}).eval()
    for parameter in network.parameters():
        values = torch.randn(parameter.shape, generator=numbers)
        parameter.data = 0.3 * values + (1 if parameter.ndim == 1 else 0)
    return network


@pytest.fixture(scope="module")
def network() -> StableAvatarTransformer:
    return build().requires_grad_(False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, "test", *shape))


def arguments(batch: int = 1, text: int = 5, audio: int = 17) -> dict[str, Tensor]:
    return {
        "hidden_states": draw(batch, 36, *GRID),
        "timestep": torch.tensor([857.692, 13.25, 500.0])[:batch],
        "encoder_hidden_states": draw(batch, text, TEXT),
        "image": draw(batch, 257, IMAGE),
        "vocal": draw(batch, audio, AUDIO),
    }


def windows_by_loop(tokens: int, frames: int) -> list[list[int | None]]:
    """spec/stableavatar.md b.1 as written: inclusive ranges, widened by four, zero rows (None) at the end."""
    r = tokens / frames
    half = int(r * 4 / 2)
    ranges = []
    for i in range((frames - 1) // 4 + 1):
        centre = 0 if i == 0 else int((r * ((i - 1) * 4 + 1) + r * (i * 4 + 1)) / 2) - 1
        ranges.append((centre - half, centre + half))
    ranges[0] = (-(2 * half - ranges[1][0]), ranges[1][0])
    rows: list[list[int | None]] = []
    for first, last in ranges:
        row: list[int | None] = [t for t in range(first - 4, last + 5) if 0 <= t < tokens]
        rows.append(row + [None] * (2 * half + 9 - len(row)))
    return rows


@pytest.mark.parametrize("frames", [5, 9, 17, 21, 81, 401])
@pytest.mark.parametrize("tokens", [1, 2, 5, 33, 40, 100, 161, 167, 799])
def test_windows_are_those_of_the_published_loop(tokens: int, frames: int) -> None:
    indices, valid = vocal_windows(tokens, frames)
    got = [
        [int(i) if ok else None for i, ok in zip(*row, strict=True)]
        for row in zip(indices, valid, strict=True)
    ]
    assert got == windows_by_loop(tokens, frames)


def test_windows_of_the_worked_example() -> None:
    _, valid = vocal_windows(161, 81)
    assert valid.sum(1).tolist() == [6, 12, *[15] * 18, 12]


@pytest.mark.parametrize(
    ("tokens", "frames", "why"), [(9, 4, "5 pixel frames or more, not 4"), (0, 9, "no audio tokens")]
)
def test_what_cannot_be_split_is_refused(tokens: int, frames: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        vocal_windows(tokens, frames)


def test_rows_without_audio_are_zero_and_stand_last(network: StableAvatarTransformer) -> None:
    audio = draw(2, 17, AUDIO)
    rows = network.vocal_projector.windows(audio, 9)
    tokens = network.vocal_projector.proj_model(audio)
    for frame, row in enumerate(windows_by_loop(17, 9)):
        for place, token in enumerate(row):
            expected = torch.zeros(2, WIDTH) if token is None else tokens[:, token]
            assert torch.equal(rows[:, frame, place], expected)
    assert windows_by_loop(17, 9)[0][-1] is None  # the first latent frame does miss tokens, on its left


def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def rms(x: Tensor, layer: nn.RMSNorm) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """[S, D] over [S', D], head by head."""
    parts = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value)), strict=True):
        parts.append(torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=-1) @ v)
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("text", [1, 7, 515])
@pytest.mark.parametrize("groups", [3, 1])
def test_cross_attention_is_the_sum_of_three(
    network: StableAvatarTransformer, text: int, groups: int
) -> None:
    """For any length of text; groups = 1 is attention to the audio of the whole clip. The last sample is in
    a batch with two that take audio, and gets no audio: it must find a context of zeros."""
    attn = network.blocks[0].attn2
    x, words, seen = draw(3, 12, WIDTH), draw(3, text, WIDTH), draw(3, 257, WIDTH)
    audio = draw(2, groups, 4, WIDTH)
    got = attn(x, words, image=seen, vocal=audio)
    with_silence = torch.cat([audio, torch.zeros(1, groups, 4, WIDTH)])
    for sample in range(3):
        query = rms(attn.to_q(x[sample]), attn.norm_q)
        total = attention(query, rms(attn.to_k(words[sample]), attn.norm_k), attn.to_v(words[sample]), 2)
        key = rms(attn.add_k_proj(seen[sample]), attn.norm_added_k)
        total += attention(query, key, attn.add_v_proj(seen[sample]), 2)
        attended = [
            attention(run, attn.vocal_k(context), attn.vocal_v(context), 2)
            for run, context in zip(query.chunk(groups), with_silence[sample], strict=True)
        ]
        expected = attn.to_out[0](total + torch.cat(attended))
        torch.testing.assert_close(got[sample], expected, atol=1e-5, rtol=1e-5)


def projected_slowly(
    projector: VocalProjector, audio: Tensor, latents: Tensor, e0: Tensor, e: Tensor
) -> Tensor:
    """spec/stableavatar.md b.2 for one sample: audio [F, n, V], latents [F P, V], e0 [6, V], e [V]."""
    for block in projector.blocks:
        m = block.modulation[0] + e0
        audio = audio + m[2] * (norm(audio) * (1 + m[1]) + m[0])
        attn = block.cross_attn
        asking = norm(audio) * block.norm3.weight + block.norm3.bias
        answers = [
            attention(rms(attn.q(a), attn.norm_q), rms(attn.k(x), attn.norm_k), attn.v(x), 8)
            for a, x in zip(asking, latents.chunk(len(audio)), strict=True)
        ]
        audio = audio + attn.o(torch.stack(answers))
        up, down = block.ffn[0], block.ffn[2]
        hidden = up(norm(audio) * (1 + m[4]) + m[3])
        cubic = hidden + 0.044715 * hidden**3
        audio = audio + m[5] * down(0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * cubic)))
    m = projector.final_head.modulation[0] + e
    return projector.final_head.final_proj(norm(audio) * (1 + m[1]) + m[0])


def test_the_projector_is_its_formula_for_every_sample(network: StableAvatarTransformer) -> None:
    projector = network.vocal_projector
    audio, latents = draw(3, 4, 5, WIDTH), draw(3, 4 * 6, WIDTH)
    e0, e = draw(3, 6, WIDTH), draw(3, WIDTH)
    got = projector(audio, latents, e0, e)
    for sample in range(3):
        expected = projected_slowly(projector, audio[sample], latents[sample], e0[sample], e[sample])
        torch.testing.assert_close(got[sample], expected, atol=1e-5, rtol=1e-5)


def test_sines_of_the_time_step_are_exact() -> None:
    steps = torch.tensor([0.0, 13.25, 857.692, 999.999])
    angles = [[float(t) * 10_000 ** (-k / 8) for k in range(8)] for t in steps]
    expected = [[*map(math.cos, row), *map(math.sin, row)] for row in angles]
    # Half a unit in the last place of 1; angles in float32 are wrong by 3e-5.
    torch.testing.assert_close(ExactSinusoid(16)(steps), torch.tensor(expected), atol=6e-8, rtol=0)


def test_samples_of_a_batch_do_not_meet(network: StableAvatarTransformer) -> None:
    batch = arguments(batch=3)
    together = network(**batch)
    for i in range(3):
        alone = network(**{name: value[i : i + 1] for name, value in batch.items()})
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def prepared(network: StableAvatarTransformer, batch: dict[str, Tensor]) -> PreparedStable:
    ready: PreparedStable = network(
        mode="prepare",
        text=batch["encoder_hidden_states"],
        image=batch["image"],
        vocal=batch["vocal"],
        grid=GRID,
    )
    return ready


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("batched", [False, True])
def test_prepared_branches_give_what_raw_gives(
    network: StableAvatarTransformer, size: int, batched: bool
) -> None:
    """Branches with audio, with another text, with other audio and without audio, silence first."""
    batch = arguments(size)
    x, t = batch["hidden_states"], batch["timestep"]
    other = batch | {"encoder_hidden_states": draw(size, 5, TEXT, seed=1)}
    silence = batch | {"vocal": torch.zeros_like(batch["vocal"])}
    full, negative = prepared(network, batch), prepared(network, other)
    branches = {
        "silent": replace(full, vocal=None),
        "full": full,
        "negative": replace(negative, vocal=full.vocal),
        "zeroed": replace(full, vocal=prepared(network, silence).vocal),
    }
    got = network(x, t, branches, mode="denoise", batched=batched)
    assert list(got) == list(branches)
    for name, inputs in (("full", batch), ("negative", other), ("zeroed", silence)):
        torch.testing.assert_close(got[name], network(**inputs), atol=2e-5, rtol=1e-5)
    # No audio is a context of zeros behind the projector, not the projection of zeros.
    mute = network.vocal_projector.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    try:
        torch.testing.assert_close(got["silent"], network(**batch), atol=2e-5, rtol=1e-5)
    finally:
        mute.remove()
    assert (got["silent"] - got["zeroed"]).abs().max() > 0.01


def count(module: nn.Module, calls: list[nn.Module]) -> Any:
    return module.register_forward_hook(lambda *_: calls.append(module))


@pytest.mark.parametrize("batched", [False, True])
def test_branches_share_what_they_have_in_common(network: StableAvatarTransformer, batched: bool) -> None:
    """One embedding, one projection for each audio and not for silence, no key of text or image again;
    stacked branches go through the blocks once."""
    batch = arguments()
    full = prepared(network, batch)
    again = replace(full, vocal=full.vocal.clone() if full.vocal is not None else None)
    branches = {"a": full, "b": replace(full), "c": again, "d": replace(full, vocal=None)}
    embedder, block = network.condition_embedder, network.blocks[0]
    watched = (
        network.patch_embedding, embedder.time_embedder, network.vocal_projector,
        network.vocal_projector.proj_model, block.attn2.to_k, block.attn2.add_k_proj, block.ffn,
    )  # fmt: skip
    calls: list[nn.Module] = []
    hooks = [count(module, calls) for module in watched]
    network(batch["hidden_states"], batch["timestep"], branches, mode="denoise", batched=batched)
    for hook in hooks:
        hook.remove()
    assert [calls.count(module) for module in watched] == [1, 1, 2, 0, 0, 0, 1 if batched else 4]


def test_padding_fills_tokens_with_zeros_that_nothing_rotates(network: StableAvatarTransformer) -> None:
    """Three latent frames filled up to five: audio is split for five, and the padding is not returned."""
    seen: list[Any] = []
    hook = network.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given))
    try:
        out = network(**arguments(), padded_frames=5)
    finally:
        hook.remove()
    tokens, _, _, rotary, _, vocal = seen[0][:6]
    per_frame = GRID[1] * GRID[2] // 4
    assert tokens.shape[1] == rotary.shape[1] == 5 * per_frame and vocal.shape[1] == 5
    assert not tokens[:, 3 * per_frame :].any() and tokens[:, : 3 * per_frame].any()
    assert torch.equal(rotary[:, 3 * per_frame :], torch.ones_like(rotary[:, 3 * per_frame :]))
    assert out.shape == (1, 16, *GRID)
    assert (out - network(**arguments())).abs().max() > 0.01  # padding has an effect
    assert torch.equal(network(**arguments(), padded_frames=3), network(**arguments()))
    with pytest.raises(ValueError, match="3 latent frames do not fit into 2"):
        network(**arguments(), padded_frames=2)


@pytest.mark.parametrize("frames", [5, 13, 21])
def test_audio_of_another_length_than_the_video_is_refused(
    network: StableAvatarTransformer, frames: int
) -> None:
    """24 tokens divide by 2, 4 and 6 frames as well: without a check, audio would meet the wrong ones."""
    with pytest.raises(ValueError, match="latent frames for a video of 3"):
        network(**arguments(), frames=frames)


def test_what_denoise_lacks_is_said(network: StableAvatarTransformer) -> None:
    with pytest.raises(ValueError, match="prepared text, image and rotary"):
        network(draw(1, 36, *GRID), torch.tensor([1.0]), {"full": PreparedStable()}, mode="denoise")
    with pytest.raises(ValueError, match="number of frames"):
        network(mode="prepare", vocal=draw(1, 17, AUDIO))


@pytest.mark.parametrize("clip_level", [False, True])
def test_checkpointing_changes_no_gradient(clip_level: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**arguments(), clip_level=clip_level).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        assert gradient is not None and gradient.any(), name
        assert torch.equal(gradient, checkpointed[name]), name


def test_time_and_norms_stay_float32_under_bfloat16_weights() -> None:
    model = build().requires_grad_(False)
    exact = model(**arguments())
    cast(model, torch.bfloat16)
    seen: list[Any] = []
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given))
    model.vocal_projector.register_forward_pre_hook(lambda _, given: seen.append(given))
    rounded = model(**arguments())
    (_, _, to_projector, time), (tokens, _, to_block, *_) = seen
    assert tokens.dtype == rounded.dtype == torch.bfloat16
    assert to_projector.dtype == time.dtype == to_block.dtype == torch.float32
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {
        name
        for name, _ in model.named_parameters()
        if "time_" in name or name.endswith(("scale_shift_table", "modulation"))
        or any(part in ("norm", "norm1", "norm2", "norm3") for part in name.split("."))
    }  # fmt: skip
    assert (rounded.float() - exact).norm() / exact.norm() < 0.03


def test_the_published_layout() -> None:
    """Numbers of spec/stableavatar.md 0 and a.2."""
    with on_meta():
        model = StableAvatarTransformer()
    state = model.state_dict()
    assert len(state) == 1143
    assert sum(value.numel() for value in state.values()) == 1_747_426_112
    entrance = model.vocal_projector.proj_model.named_parameters()
    assert {name: tuple(value.shape) for name, value in entrance} == {
        "proj.weight": (1536, 768), "norm.weight": (1536,), "norm.bias": (1536,)
    }  # fmt: skip


def test_the_layout_of_14b_has_two_projections() -> None:
    with on_meta():
        model = StableAvatarTransformer(
            num_attention_heads=40, num_layers=1, ffn_dim=13824, vocal_hidden_dim=2048
        )
    projector = model.vocal_projector
    assert {name: tuple(value.shape) for name, value in projector.proj_model.state_dict().items()} == {
        "proj_1.weight": (2048, 768), "norm_1.weight": (2048,), "norm_1.bias": (2048,),
        "proj_2.weight": (5120, 2048), "norm_2.weight": (5120,), "norm_2.bias": (5120,),
    }  # fmt: skip
    assert round(sum(value.numel() for value in projector.parameters()) / 1e6, 1) == 457.9
    small = build(vocal_hidden_dim=9)
    first, second = small.vocal_projector.proj_model, draw(1, 4, AUDIO)
    for proj, layer in ((first.proj_1, first.norm_1), (first.proj_2, first.norm_2)):
        second = norm(second @ proj.weight.T, eps=1e-5) * layer.weight + layer.bias
    torch.testing.assert_close(first(draw(1, 4, AUDIO)), second)
    assert small(**arguments()).shape == (1, 16, *GRID)


def test_the_numbers_of_the_reference(shared_dir: Path) -> None:
    """Golden set 2: one sample, whole clip, zeroed features, the guidance triple, a padded short window."""
    folder = shared_dir / "golden/stableavatar"
    sizes = json.loads((folder / "config.json").read_text())
    model = StableAvatarTransformer(
        num_attention_heads=sizes["num_heads"],
        attention_head_dim=sizes["dim"] // sizes["num_heads"],
        text_dim=sizes["text_dim"],
        freq_dim=sizes["freq_dim"],
        ffn_dim=sizes["ffn_dim"],
        num_layers=sizes["num_layers"],
        image_dim=sizes["clip_image_dim"],
        vocal_dim=sizes["audio_in_dim"],
        vocal_ffn_dim=sizes["vocal_ffn_dim"],
    ).eval()
    state = load_file(folder / "transformer_state.safetensors")
    model.load_state_dict(STABLEAVATAR.key_map.rename_to_internal(state), strict=True)
    model.requires_grad_(False)
    golden = load_file(folder / "set2_transformer.safetensors")

    def text(name: str) -> Tensor:
        return nn.functional.pad(golden[name], (0, 0, 0, sizes["text_len"] - len(golden[name])))[None]

    x = torch.cat([golden["x"], golden["y"]], dim=1)
    t, image, vocal = golden["t"], golden["clip_fea"], golden["vocal_embeddings"]
    positive, negative = text("context_pos"), text("context_neg")
    full = model(mode="prepare", text=positive, image=image, vocal=vocal, grid=tuple(x.shape[2:]))
    against = replace(full, text=model(mode="prepare", text=negative).text)
    triple = {"silent": replace(against, vocal=None), "negative": against, "full": full}
    short = x[:, :, : golden["short.out"].shape[2]]
    results = {
        "b1.out": model(x, t, positive, image, vocal),
        "clip_level.out": model(x, t, positive, image, vocal, clip_level=True),
        "zero_audio.out": model(x, t, positive, image, torch.zeros_like(vocal)),
        "short.out": model(
            short, t, positive, image, golden["short.vocal_embeddings"], padded_frames=x.shape[2]
        ),
        "cfg3.out": torch.cat(list(model(x, t, triple, mode="denoise").values())),
    }
    batched = model(x, t, triple, mode="denoise", batched=True)
    torch.testing.assert_close(torch.cat(list(batched.values())), golden["cfg3.out"], atol=1e-5, rtol=0)
    for name, got in results.items():
        torch.testing.assert_close(got, golden[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
