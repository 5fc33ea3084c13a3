"""The decoder with a gradient: the frames of the whole clip, and the gradient of plain autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from avatarctl.live_bytes import LiveBytes
from avatarctl.loading.built_in import build_random_modules
from avatarctl.models import vae_gradient
from avatarctl.models.vae import WanVae
from avatarctl.models.vae_gradient import VaeGradient, decode_with_gradient, frames_decoded
from avatarctl.registry import find_model

MODES: tuple[VaeGradient, ...] = ("full", "checkpoint", "segment", "offload")

WINDOWS = [(0, 17), (0, 16), (1, 16), (5, 8), (7, 3), (16, 1)]
"""First frame and number of frames, of a clip of 17: whole, at and between the borders of latent frames."""


@pytest.fixture(scope="module")
def vae() -> WanVae:
    return build_random_modules(find_model("cartoon-i2v")).vae


@pytest.fixture(scope="module")
def small() -> WanVae:
    """A decoder of the same cells with few channels."""
    network = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return WanVae(network.eval().requires_grad_(False))


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
    for mode in MODES:
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
    kept, *others = (gradient(vae, latents, start, frames, mode) for mode in MODES)
    assert all(torch.equal(*pair) for again in others for pair in zip(kept, again, strict=True))


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


def test_each_mode_leaves_less_on_the_device(small: WanVae) -> None:
    """Between the passes, and at most in the backward one."""
    held, most, host = {}, {}, {}
    for mode in MODES:
        leaf = torch.zeros(1, 4, 7, 1, 1, requires_grad=True)
        with LiveBytes() as live:
            live.track(leaf)
            decoded = decode_with_gradient(small, leaf, 0, 25, mode)
            held[mode] = live.current
            live.reset_peak()
            decoded.sum().backward()
            most[mode], host[mode] = live.peak, live.host_peak
    assert held["full"] > held["checkpoint"] > held["segment"] > held["offload"]
    assert most["full"] > most["checkpoint"] > most["segment"] > most["offload"]
    assert host["offload"] > held["segment"] / 2 and not host["segment"]


def test_no_more_is_decoded_again_than_must_be() -> None:
    """With s snapshots and r passes over each frame C(s + r, s) frames are done, and r n - C(s + r, s + 1) of
    n are decoded; that of the begin is one of the snapshots."""
    assert frames_decoded(21, 4)[0] == 2 * 21 - math.comb(5 + 2, 5 + 1)
    assert frames_decoded(math.comb(6, 3), 2)[0] == 3 * math.comb(6, 3) - math.comb(6, 4)
    assert frames_decoded(9, 8)[0] == 8 and frames_decoded(9, 0)[0] == 36


def test_the_backward_pass_decodes_as_planned(small: WanVae, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is behind the first frames of snapshots is there from the forward pass."""
    calls = []
    once = vae_gradient._one

    def counted(*inputs: Any) -> Any:
        calls.append(1)
        return once(*inputs)

    monkeypatch.setattr(vae_gradient, "_one", counted)
    leaf = torch.zeros(1, 4, 21, 1, 1, requires_grad=True)
    decode_with_gradient(small, leaf, 0, 81, "segment").sum().backward()
    # Behind the last of four snapshots are three frames, which the forward pass decodes beside the plan.
    assert len(calls) == frames_decoded(21, 4)[0] + 3


def test_the_vae_gets_no_gradient_and_no_window_outside_the_clip(vae: WanVae, latents: Tensor) -> None:
    gradient(vae, latents, 0, 17, "checkpoint")
    assert all(parameter.grad is None for parameter in vae.parameters())
    for start, frames in ((0, 18), (17, 1), (-1, 2), (3, 0)):
        with pytest.raises(ValueError, match="not inside a clip of 17"):
            decode_with_gradient(vae, latents, start, frames)
