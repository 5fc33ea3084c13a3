"""The image encoder against open-clip's tower written out (spec/stableavatar.md f)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionModel

from avatarctl.loading.fill import on_meta
from avatarctl.models.clip import ClipImageEncoder, clip_config
from avatarctl.rng import generator

WIDTH, HEADS, LAYERS, SIDE, PATCH = 24, 3, 3, 28, 14
TINY: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
}


@pytest.fixture(scope="module")
def encoder() -> ClipImageEncoder:
    made = ClipImageEncoder(clip_config(**TINY)).eval().requires_grad_(False)
    numbers = generator(2, "weights")
    for parameter in made.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=numbers))
    return made


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 40, 60, generator=generator(0, "image")) * 2 - 1


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def tower(pixels: Tensor, state: dict[str, Tensor]) -> Tensor:
    """One image [3, side, side] -> tokens: a norm before the layers, norms inside before each half, exact
    GELU, x Phi(x)."""
    kernel = state["embeddings.patch_embedding.weight"]
    tokens = [state["embeddings.class_embedding"]]
    for row in range(0, SIDE, PATCH):
        for column in range(0, SIDE, PATCH):
            patch = pixels[:, row : row + PATCH, column : column + PATCH]
            tokens.append((kernel * patch).sum(dim=(1, 2, 3)))
    x = torch.stack(tokens) + state["embeddings.position_embedding.weight"]
    x = layer_norm(x, state, "pre_layrnorm")
    for index in range(LAYERS):
        name = f"encoder.layers.{index}"
        normed = layer_norm(x, state, f"{name}.layer_norm1")
        q, k, v = (linear(normed, state, f"{name}.self_attn.{part}_proj") for part in "qkv")
        heads = [
            torch.softmax(a @ b.T / math.sqrt(WIDTH // HEADS), dim=-1) @ c
            for a, b, c in zip(*(y.chunk(HEADS, dim=-1) for y in (q, k, v)), strict=True)
        ]
        x = x + linear(torch.cat(heads, dim=-1), state, f"{name}.self_attn.out_proj")
        hidden = linear(layer_norm(x, state, f"{name}.layer_norm2"), state, f"{name}.mlp.fc1")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), state, f"{name}.mlp.fc2")
    return x


def test_tokens_are_those_of_the_tower(encoder: ClipImageEncoder, image: Tensor) -> None:
    state = dict(encoder.named_parameters())
    expected = torch.stack([tower(pixels, state) for pixels in encoder.pixels(image)])
    got = encoder.encode(image)
    assert got.shape == (2, 1 + (SIDE // PATCH) ** 2, encoder.width)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_tokens_are_the_last_but_one_of_a_whole_tower(encoder: ClipImageEncoder, image: Tensor) -> None:
    """transformers' own model with one layer more, whose `hidden_states[-2]` spec/stableavatar.md o names."""
    whole = CLIPVisionModel(clip_config(**{**TINY, "num_hidden_layers": LAYERS + 1})).eval()
    missing = whole.load_state_dict(encoder.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith((f"encoder.layers.{LAYERS}.", "post_")) for name in missing.missing_keys)
    with torch.no_grad():
        states = whole(encoder.pixels(image), output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder.encode(image), states[-2], atol=1e-6, rtol=1e-6)


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, PyTorch's."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resized(line: Tensor, size: int) -> Tensor:
    """One row to `size` values: the middle of an output pixel falls on (i + 1/2) n / size - 1/2; four
    neighbours whatever the factor, so nothing is smoothed; edges repeat."""
    n = len(line)
    out = []
    for i in range(size):
        place = (i + 0.5) * n / size - 0.5
        near = range(math.floor(place) - 1, math.floor(place) + 3)
        out.append(sum(cubic(place - j) * float(line[min(max(j, 0), n - 1)]) for j in near))
    return torch.tensor(out)


def test_pixels_are_resized_without_smoothing_and_normalised(encoder: ClipImageEncoder) -> None:
    line = torch.rand(75, generator=generator(0, "line")) * 2 - 1
    pixels = encoder.pixels(line.expand(1, 3, 33, 75))
    means, stds = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for colour, mean, std in zip(pixels[0], means, stds, strict=True):
        expected = (resized(line, SIDE) * 0.5 + 0.5 - mean) / std
        torch.testing.assert_close(colour, expected.expand(SIDE, -1), atol=1e-5, rtol=1e-5)


def test_the_published_tower() -> None:
    """630,766,080 parameters (spec/building-blocks.md 10), less the last layer and the norm behind it; 257
    tokens; nothing that a file would have to fill beside parameters."""
    with on_meta():
        tower = ClipImageEncoder(clip_config())
    width, wide = 1280, 5120
    layer = 4 * width * (width + 1) + wide * (width + 1) + width * (wide + 1) + 4 * width
    assert sum(p.numel() for p in tower.parameters()) == 630_766_080 - layer - 2 * width
    assert tower.embeddings.position_embedding.weight.shape == (257, width)
    assert not list(tower.buffers())
