"""Auxiliary losses: what each looks at, what gets a gradient, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from avatarctl.config import RunConfig
from avatarctl.errors import ConfigError, UnusableAudio
from avatarctl.events import silent
from avatarctl.loading.built_in import build_random_modules
from avatarctl.loading.judges import Judges, LossName, find_judges, load_judges
from avatarctl.models import lpips_vgg
from avatarctl.models.lpips_vgg import LpipsVgg
from avatarctl.models.vae import WanVae
from avatarctl.models.vae_gradient import VaeGradient
from avatarctl.registry import find_model
from avatarctl.timeline import SAMPLES_PER_FRAME
from avatarctl.training.aux_losses import AuxLosses, AuxSettings, active_losses, aux_settings
from avatarctl.training.aux_step import AuxBatch, AuxStep, implied_latents, window_start
from avatarctl.training.frame_losses import lpips_loss, trepa_loss
from avatarctl.training.sync_loss import sync_cosines, sync_starts

ROW = find_model("cartoon-v2v")
NAMES: tuple[LossName, ...] = ("sync", "lpips", "trepa")
WEIGHTS: dict[LossName, float] = {"sync": 0.1, "lpips": 0.1, "trepa": 10.0}
MODES: tuple[VaeGradient, ...] = ("full", "checkpoint", "segment", "offload")
DETAIL = {mode: AuxSettings(WEIGHTS, vae_gradient=mode) for mode in MODES}


@functools.cache
def judges() -> Judges:
    cfg = RunConfig()
    return load_judges(ROW, find_judges(ROW, cfg.model, NAMES), NAMES, torch.device("cpu"), silent)


@functools.cache
def vae() -> WanVae:
    """Of the real class, narrow."""
    sizes = {**ROW.network["vae"], "base_dim": 4, "dim_mult": (1, 1, 2, 2)}
    return build_random_modules(dataclasses.replace(ROW, network={**ROW.network, "vae": sizes})).vae


def clip(seed: int, frames: int = 17, batch: int = 1) -> Tensor:
    """Blurred noise in [-1, 1], [B, 3, n, 32, 32]."""
    rough = torch.randn(batch * 3, frames, 8, 8, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(rough, size=(32, 32), mode="bilinear")
    return smooth.clamp(-1, 1).unflatten(0, (batch, 3))


def voice(frames: int, batch: int = 1) -> Tensor:
    """A rising tone that comes and goes, [B, 640 n]."""
    time = torch.arange(frames * SAMPLES_PER_FRAME) / 16_000
    wave = torch.sin(2 * math.pi * (200 + 300 * time) * time) * torch.sin(2 * math.pi * 3 * time).clamp(min=0)
    return 0.5 * wave.repeat(batch, 1)


def only(name: LossName, **settings: object) -> AuxLosses:
    return AuxLosses((name,), judges(), dataclasses.replace(DETAIL["full"], **settings))  # type: ignore[arg-type]


# --- what each loss looks at ---------------------------------------------------------------------


def test_the_sync_loss_differs_for_right_shifted_and_silent_audio() -> None:
    frames, right = clip(0), voice(17)
    shifted = torch.roll(right, 4 * SAMPLES_PER_FRAME, dims=1)
    found = [
        float(only("sync")(frames, frames, audio, [0])[0]["sync"])
        for audio in (right, shifted, torch.zeros_like(right))
    ]
    assert min(abs(a - b) for a in found for b in found if a is not b) > 1e-4


@pytest.mark.parametrize(
    ("frames", "starts"),
    [(15, []), (16, [0]), (23, [0]), (24, [0, 8]), (81, list(range(0, 65, 8))), (161, list(range(0, 65, 8)))],
)
def test_sync_windows_are_whole_and_among_the_first_80_frames(frames: int, starts: list[int]) -> None:
    assert list(sync_starts(frames, 16, 8)) == starts


def test_a_sync_window_sees_the_samples_of_its_own_frames_alone() -> None:
    """Windows 0-15, 8-23, 16-31: samples on both sides of a border move the windows that hold them."""
    judge, frames, audio = judges().sync, clip(1, 32), voice(32)
    assert judge is not None
    before = sync_cosines(judge, frames, audio, 8)
    for sample, moved in (
        (8 * SAMPLES_PER_FRAME - 1, [True, False, False]),
        (8 * SAMPLES_PER_FRAME, [True, True, False]),
        (16 * SAMPLES_PER_FRAME - 1, [True, True, False]),
        (16 * SAMPLES_PER_FRAME, [False, True, True]),
    ):
        other = audio.clone()
        other[0, sample] += 0.9
        assert (sync_cosines(judge, frames, other, 8) != before)[0].tolist() == moved, sample


def test_a_sync_window_sees_its_frames_in_order_and_their_lower_half() -> None:
    judge, frames, audio = judges().sync, clip(1), voice(17)
    assert judge is not None
    before = sync_cosines(judge, frames, audio, 8)
    upper = frames.clone()
    upper[..., :12, :] = 0.3  # bicubic reaches two rows below a border
    assert torch.equal(sync_cosines(judge, upper, audio, 8), before)
    lower = frames.clone()
    lower[..., 20:, :] = 0.3
    swapped = frames[:, :, [1, 0, *range(2, 17)]]
    for other in (lower, swapped):
        assert not torch.equal(sync_cosines(judge, other, audio, 8), before)


def test_audio_of_other_frames_is_no_audio_of_these() -> None:
    judge = judges().sync
    assert judge is not None
    with pytest.raises(ValueError, match="does not belong to 17 frames"):
        sync_cosines(judge, clip(0), voice(18), 8)
    with pytest.raises(ValueError, match="no window"):
        sync_cosines(judge, clip(0, 15), voice(15), 8)


def test_lpips_looks_at_the_lower_half_and_is_0_for_equal_clips() -> None:
    judge, real = judges().lpips, clip(2)
    assert judge is not None
    assert torch.equal(lpips_loss(judge, real, real), torch.zeros(1))
    upper, lower = real.clone(), real.clone()
    upper[..., :16, :] = 1
    lower[..., 16:, :] = 1
    assert torch.equal(lpips_loss(judge, upper, real), torch.zeros(1))
    assert float(lpips_loss(judge, lower, real)) > 1e-4


def test_lpips_is_the_mean_over_frames_of_each_sample() -> None:
    judge, frames, real = judges().lpips, clip(2, 3, 2), clip(3, 3, 2)
    assert judge is not None
    each = [
        torch.stack([judge(frames[:, :, f, 16:], real[:, :, f, 16:]) for f in range(3)]).mean(0),
        lpips_loss(judge, frames, real),
    ]
    torch.testing.assert_close(*each)


def test_features_that_are_all_0_have_a_finite_gradient() -> None:
    """Of a VGG the ReLU in front would hide a NaN here."""
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(lpips_vgg._unit(features).square().sum(), features)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_lpips_of_black_frames_has_a_finite_gradient(value: float) -> None:
    """With every unit off all features are 0."""
    judge = LpipsVgg((8, 16, 16, 16, 16)).eval()
    with torch.no_grad():
        for name, parameter in judge.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(-100)
    frames = torch.full((1, 3, 2, 32, 32), value, requires_grad=True)
    (gradient,) = torch.autograd.grad(lpips_loss(judge, frames, clip(4, 2)).sum(), frames)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_trepa_is_0_for_equal_clips_and_takes_windows_one_behind_the_other() -> None:
    encoder, frames, real = judges().trepa, clip(5, 37), clip(6, 37)
    assert encoder is not None
    assert torch.equal(trepa_loss(encoder, real, real, "windows"), torch.zeros(1))
    parts = [trepa_loss(encoder, frames[:, :, s : s + 16], real[:, :, s : s + 16], "full") for s in (0, 16)]
    torch.testing.assert_close(trepa_loss(encoder, frames, real, "windows"), sum(parts) / 2)
    assert not torch.equal(trepa_loss(encoder, frames, real, "full"), sum(parts) / 2)
    with pytest.raises(ValueError, match="15 frames are fewer"):
        trepa_loss(encoder, clip(5, 15), clip(6, 15), "windows")


# --- frames and audio of a step ------------------------------------------------------------------


def batch(samples: int = 1, latent_frames: int = 5, sigma: float = 0.6) -> AuxBatch:
    """A step in float32 whose prediction is a little wrong, with a gradient."""
    generator = torch.Generator().manual_seed(samples)
    shape = (samples, 16, latent_frames, 4, 4)
    clean, noise, error = (torch.randn(shape, generator=generator) for _ in range(3))
    return AuxBatch(
        noisy=(1 - sigma) * clean + sigma * noise,
        velocity=(noise - clean + 0.3 * error).requires_grad_(),
        sigma=torch.full((samples,), sigma),
        clean=clean,
        waveform=voice(4 * latent_frames - 3, samples),
        keys=[(7, (3, slot)) for slot in range(samples)],
    )


def step(names: tuple[LossName, ...] = NAMES, **settings: object) -> AuxStep:
    used = dataclasses.replace(DETAIL["full"], **settings)  # type: ignore[arg-type]
    return AuxStep(AuxLosses(names, judges(), used), vae())


def test_keeping_activations_or_making_them_again_changes_no_bit() -> None:
    found = []
    for mode in MODES:
        given = batch(latent_frames=3)
        result = AuxStep(AuxLosses(("lpips",), judges(), DETAIL[mode]), vae())(given)
        (gradient,) = torch.autograd.grad(result.total.sum(), given.velocity)
        found.append((*result.losses.values(), gradient))
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


def test_a_batch_is_its_samples() -> None:
    """In float64, with windows of their own: the sum over micro-batches is the whole to 1e-6."""
    wide = Judges(*(each.double() for each in load_again()))
    losses = AuxLosses(NAMES, wide, dataclasses.replace(DETAIL["full"], frames=16))

    class Enlarged(AuxStep):
        """Latents made frames by enlarging: the VAE takes ten seconds in float64."""

        def _decode(self, latents: Tensor, starts: Sequence[int], frames: int) -> Tensor:
            size = (4 * latents.shape[2] - 3, 32, 32)
            whole = torch.nn.functional.interpolate(latents[:, :3] / 4, size=size, mode="trilinear")
            return torch.stack(
                [clip[:, start : start + frames] for clip, start in zip(whole, starts, strict=True)]
            )

    given = batch(3, 6)
    starts = {window_start(21, 16, seed, *key) for seed, key in given.keys}
    assert len(starts) > 1
    whole = doubled(given, slice(0, 3))
    together = Enlarged(losses, vae())(whole)
    (gradient,) = torch.autograd.grad(together.total.sum(), whole.velocity)
    for index in range(3):
        part = doubled(given, slice(index, index + 1))
        alone = Enlarged(losses, vae())(part)
        (own,) = torch.autograd.grad(alone.total.sum(), part.velocity)
        torch.testing.assert_close(alone.total[0], together.total[index], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(own[0], gradient[index], atol=1e-6, rtol=1e-6)


def load_again() -> tuple[torch.nn.Module, ...]:
    cfg = RunConfig()
    made = load_judges(ROW, find_judges(ROW, cfg.model, NAMES), NAMES, torch.device("cpu"), silent)
    return made.sync, made.lpips, made.trepa  # type: ignore[return-value]


def doubled(given: AuxBatch, part: slice) -> AuxBatch:
    """Some samples of a batch in float64, as a leaf of their own."""
    assert given.waveform is not None
    return AuxBatch(
        noisy=given.noisy[part].double(),
        velocity=given.velocity[part].detach().double().requires_grad_(),
        sigma=given.sigma[part],
        clean=given.clean[part].double(),
        waveform=given.waveform[part],
        keys=given.keys[part],
    )


def test_a_window_has_the_frames_and_the_audio_of_its_place() -> None:
    """What the judges are given for a window is cut out of the whole, frames and samples alike."""
    given = batch(2, 6)
    seen: list[tuple[Tensor, Tensor, Tensor | None, list[int]]] = []

    class Spy(AuxLosses):
        def __call__(self, frames, real, waveform, first_frame, align=None):  # type: ignore[no-untyped-def]
            seen.append((frames.detach(), real, waveform, list(first_frame)))
            return super().__call__(frames, real, waveform, first_frame, align)

    losses = Spy(("lpips",), judges(), dataclasses.replace(DETAIL["full"], frames=16))
    with torch.no_grad():
        AuxStep(losses, vae())(given)
        ((frames, real, waveform, starts),) = seen
        implied, _ = implied_latents(given.noisy, given.velocity, given.sigma)
        whole, whole_real = vae().decode(torch.cat([implied, given.clean])).split(2)
    assert starts == [window_start(21, 16, seed, *key) for seed, key in given.keys] and any(starts)
    assert waveform is not None and given.waveform is not None
    for index, start in enumerate(starts):
        torch.testing.assert_close(frames[index], whole[index, :, start : start + 16], atol=1e-5, rtol=0)
        torch.testing.assert_close(real[index], whole_real[index, :, start : start + 16], atol=1e-5, rtol=0)
        samples = slice(start * SAMPLES_PER_FRAME, (start + 16) * SAMPLES_PER_FRAME)
        assert torch.equal(waveform[index], given.waveform[index, samples])


def test_windows_are_drawn_by_key_begin_with_a_latent_frame_and_reach_everywhere() -> None:
    drawn = [window_start(81, 16, 1, step, 0) for step in range(300)]
    assert set(drawn) == {0, *range(1, 66, 4)}
    assert drawn == [window_start(81, 16, 1, step, 0) for step in range(300)]
    assert drawn != [window_start(81, 16, 1, step, 1) for step in range(300)]
    assert window_start(81, 0, 1, 5, 0) == window_start(81, 81, 1, 5, 0) == 0


def test_a_sample_above_the_highest_sigma_is_not_decoded() -> None:
    given = batch(2, 3)
    given = dataclasses.replace(given, sigma=torch.tensor([0.9, 0.5]))
    result = step(("lpips",), max_sigma=0.8)(given)
    assert all(loss[0] == 0 and loss[1] > 0 for loss in result.losses.values())
    assert result.numbers["judged"].tolist() == [0, 1]
    (gradient,) = torch.autograd.grad(result.total.sum(), given.velocity)
    assert float(gradient[0].abs().max()) == 0 and float(gradient[1].abs().max()) > 0
    nobody = AuxStep(AuxLosses(NAMES, judges(), dataclasses.replace(DETAIL["full"], max_sigma=0.1)), None)  # type: ignore[arg-type]
    result = nobody(given)
    assert result.total.tolist() == [0, 0] and result.total.requires_grad and not result.seen


def test_clean_latents_are_implied_in_float32_and_held_to_10() -> None:
    given = batch()
    velocity = given.velocity.detach().bfloat16()
    implied, clipped = implied_latents(given.noisy, velocity, given.sigma)
    by_hand = given.noisy.double() - given.sigma.double().view(-1, 1, 1, 1, 1) * velocity.double()
    torch.testing.assert_close(implied.double(), by_hand, atol=1e-6, rtol=0)
    rounded = given.noisy - given.sigma.bfloat16().view(-1, 1, 1, 1, 1) * velocity
    assert float((rounded.double() - by_hand).abs().max()) > 1e-3, "bfloat16 would have been noticed"
    assert clipped.tolist() == [0.0]

    far = torch.zeros(1, 16, 1, 4, 4)
    far[0, :4] = 30
    far.requires_grad_()
    implied, clipped = implied_latents(torch.zeros_like(far), far, torch.tensor([0.5]))
    assert float(implied.detach().min()) == -10 and clipped.tolist() == [0.25]
    (gradient,) = torch.autograd.grad(implied.sum(), far)
    assert gradient[0, :4].eq(0).all() and gradient[0, 4:].eq(-0.5).all()


def test_autocast_around_the_step_changes_nothing() -> None:
    with torch.no_grad():
        plain = step()(batch()).losses
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = step()(batch()).losses
    assert all(torch.equal(plain[name], under[name]) for name in NAMES)


def test_frames_are_aligned_before_anybody_judges_them_and_the_gradient_passes() -> None:
    """The warp of each sample gets its own frames and the number of their first."""
    calls: list[tuple[int, tuple[int, ...]]] = []

    def enlarge(frames: Tensor, first: int) -> Tensor:
        calls.append((first, tuple(frames.shape)))
        return torch.nn.functional.interpolate(frames, scale_factor=(1, 2, 2))

    frames, real = clip(0, batch=2).requires_grad_(), clip(1, batch=2)
    losses = AuxLosses(NAMES, judges(), DETAIL["full"])
    warped, _ = losses(frames, real, voice(17, 2), [5, 9], [enlarge, enlarge])
    assert calls == [(5, (1, 3, 17, 32, 32)), (9, (1, 3, 17, 32, 32))] * 2
    by_hand, _ = losses(enlarge(frames, 0), enlarge(real, 0), voice(17, 2), [5, 9])
    assert all(torch.equal(warped[name], by_hand[name]) for name in NAMES)
    (gradient,) = torch.autograd.grad(losses.total(warped).sum(), frames)
    assert float(gradient.abs().max()) > 0


def test_the_mean_cosine_stands_beside_the_sync_loss() -> None:
    frames, audio = clip(0), voice(17)
    judge = judges().sync
    assert judge is not None
    cosine = float(sync_cosines(judge, frames, audio, 8).mean())
    for mode, loss in (("prob", -math.log(cosine)), ("logits", math.log1p(math.exp(-cosine)))):
        losses, numbers = only("sync", sync_mode=mode)(frames, frames, audio, [0])
        assert float(numbers["sync_cosine"]) == pytest.approx(cosine, abs=1e-6)
        assert float(losses["sync"]) == pytest.approx(loss, abs=1e-5)


# --- what is refused -----------------------------------------------------------------------------


def config(**aux: object) -> RunConfig:
    cfg = RunConfig()
    return dataclasses.replace(cfg, aux=dataclasses.replace(cfg.aux, losses=NAMES, **aux))  # type: ignore[arg-type]


def test_a_loss_without_weight_does_not_run() -> None:
    assert active_losses(config(lpips_weight=0.0)) == ("sync", "trepa")
    assert active_losses(RunConfig()) == ()
    assert set(aux_settings(config(trepa_weight=0.0), 33).weights) == {"sync", "lpips"}


@pytest.mark.parametrize(
    ("aux", "clip_frames", "what"),
    [
        ({"frames": 15}, 33, "15 frames are too few for sync and trepa"),
        ({"frames": 15, "trepa_weight": 0.0}, 33, "15 frames are too few for sync"),
        ({"frames": 15, "sync_weight": 0.0}, 33, "15 frames are too few for trepa"),
        ({}, 13, "13 frames are too few"),
        ({"frames": 34}, 33, "34 is more than the 33 frames"),
        ({"frames": 17, "window": 20}, 33, "17 frames are too few"),
    ],
)
def test_too_few_frames_for_a_judge_are_refused(aux: dict[str, object], clip_frames: int, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        aux_settings(config(**aux), clip_frames)
    assert caught.value.exit_code == 2


def test_lpips_takes_few_frames() -> None:
    settings = aux_settings(config(frames=5, sync_weight=0.0, trepa_weight=0.0), 33)
    assert (settings.frames, settings.vae_gradient, settings.sync_mode) == (5, "segment", "prob")


def test_the_sync_loss_without_audio_ends_with_exit_3() -> None:
    with pytest.raises(UnusableAudio, match="no audio") as caught:
        only("sync")(clip(0), clip(0), None, [0])
    assert caught.value.exit_code == 3


def test_a_window_that_the_judge_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="looks at 16 frames, not at 20"):
        only("sync", window=20)
    with pytest.raises(ValueError, match="no judge for lpips"):
        AuxLosses(("lpips",), Judges(), DETAIL["full"])
