"""The decoder with a gradient: the frames of the whole clip, and the gradient of plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from avatarctl.loading.built_in import build_random_modules
from avatarctl.models.vae import WanVae
from avatarctl.models.vae_gradient import VaeGradient, decode_with_gradient
from avatarctl.registry import find_model

WINDOWS = [(0, 17), (0, 16), (1, 16), (5, 8), (7, 3), (16, 1)]
"""First frame and number of frames, of a clip of 17: whole, at and between the borders of latent frames."""


@pytest.fixture(scope="module")
def vae() -> WanVae:
    return build_random_modules(find_model("cartoon-i2v")).vae


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(2, 16, 5, 2, 2, generator=torch.Generator().manual_seed(0))


def gradient(
    vae: WanVae, latents: Tensor, start: int, frames: int, mode: VaeGradient
) -> tuple[Tensor, Tensor]:
    """The frames, and the gradient of a sum in which each of them has a weight of its own."""
    leaf = latents.clone().requires_grad_()
    decoded = decode_with_gradient(vae, leaf, start, frames, mode)
    weights = torch.randn(decoded.shape, generator=torch.Generator().manual_seed(1))
    (wanted,) = torch.autograd.grad((decoded * weights).sum(), leaf)
    return decoded.detach(), wanted


@pytest.mark.parametrize(("start", "frames"), WINDOWS)
def test_a_window_has_the_frames_of_the_whole_decode(
    vae: WanVae, latents: Tensor, start: int, frames: int
) -> None:
    whole = vae.decode(latents)[:, :, start : start + frames]
    for mode in ("full", "checkpoint"):
        decoded = decode_with_gradient(vae, latents.clone().requires_grad_(), start, frames, mode)
        torch.testing.assert_close(decoded.detach(), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("start", "frames"), [(0, 17), (7, 3), (5, 8)])
def test_the_gradient_is_that_of_plain_autograd(
    vae: WanVae, latents: Tensor, start: int, frames: int
) -> None:
    """The library's own decode, all of it in the graph. Latent frames before the window get nothing."""
    _, ours = gradient(vae, latents, start, frames, "full")
    leaf = latents.clone().requires_grad_()
    mean, std = vae._statistics(leaf)
    window = vae.vae.decode(leaf * std + mean).sample[:, :, start : start + frames]
    weights = torch.randn(window.shape, generator=torch.Generator().manual_seed(1))
    (plain,) = torch.autograd.grad((window * weights).sum(), leaf)
    first = 0 if start == 0 else (start + 3) // 4
    assert plain[:, :, first:].abs().max() > 0
    torch.testing.assert_close(ours[:, :, first:], plain[:, :, first:], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours[:, :, :first], torch.zeros_like(ours[:, :, :first]))


@pytest.mark.parametrize(("start", "frames"), [(0, 17), (7, 3)])
def test_checkpointing_changes_no_bit(vae: WanVae, latents: Tensor, start: int, frames: int) -> None:
    kept, again = (gradient(vae, latents, start, frames, mode) for mode in ("full", "checkpoint"))
    assert all(map(torch.equal, kept, again))


def test_checkpointing_keeps_less(vae: WanVae, latents: Tensor) -> None:
    """Bytes of what autograd holds between the passes; the caches between latent frames remain."""

    def held(mode: VaeGradient) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            decoded = decode_with_gradient(vae, latents.clone().requires_grad_(), 0, 17, mode)
        assert decoded.requires_grad
        return sum(sizes.values())

    assert held("checkpoint") < 0.5 * held("full")


def test_the_vae_gets_no_gradient_and_no_window_outside_the_clip(vae: WanVae, latents: Tensor) -> None:
    gradient(vae, latents, 0, 17, "checkpoint")
    assert all(parameter.grad is None for parameter in vae.parameters())
    for start, frames in ((0, 18), (17, 1), (-1, 2), (3, 0)):
        with pytest.raises(ValueError, match="not inside a clip of 17"):
            decode_with_gradient(vae, latents, start, frames)
