"""A step of training as the public trainer makes it, its defects apart (spec/omniavatar.md e, g.2, g.3)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from avatarctl.conditioning.masking import mask_tensor, mouth_mask
from avatarctl.config import RunConfig
from avatarctl.families import omniavatar_objective
from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.family import Condition, Draw, Timesteps
from avatarctl.flow_matching import clean_estimate, velocity_target
from avatarctl.registry import configure
from avatarctl.training.objective import flow_step, noisy_latents
from avatarctl.weights.layouts import OMNIAVATAR

from ..golden import Checks, Reader
from .building import transformer

checks = Checks()

IMAGE = "train_i2v_in33.safetensors"
VIDEOS = ("train_v2v_in49.safetensors", "train_v2v_in65.safetensors")
_DRAWS = tuple(Draw(seed=0, step=0, slot=slot, slots=2) for slot in range(2))
_NO_DROPOUT = ("train.text_dropout=0", "train.audio_dropout=0")


def _cfg(channels: int, *more: str) -> RunConfig:
    return configure(
        "model.name=omniavatar-1.3b", "model.compat=fork", f"model.channels={channels}", *_NO_DROPOUT, *more
    )


def _timesteps(ids: Tensor, cfg: RunConfig) -> Timesteps:
    return omniavatar_objective.timesteps_at([int(each) for each in ids], cfg)


def _condition(samples: list[Mapping[str, Tensor]], cfg: RunConfig, rows: int) -> Condition:
    constants = {"mask": mask_tensor(mouth_mask())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omniavatar_objective, "_TEXT_ROWS", rows)  # recorded with fewer than networks read
        return OmniAvatar().training_condition(samples, constants, _DRAWS[: len(samples)], cfg)


def _image_step(reader: Reader) -> tuple[RunConfig, Condition, Timesteps, Tensor]:
    cfg = _cfg(33)
    text = reader.take("context")[0]
    audio = reader.take("audio_emb")[0]
    sample = {"latents": reader.take("latents")[0], "audio_features": audio, "text": text}
    condition = _condition([sample], cfg, text.shape[0])
    return cfg, condition, _timesteps(reader.take("timestep_ids"), cfg), reader.take("noise")


_IMAGE_INPUTS = ("latents", "context", "audio_emb", "timestep_ids", "noise")


@checks(IMAGE, compares=("y", "noisy_latents", "sigma", "timesteps", "train_weight"), needs=_IMAGE_INPUTS)
def what_an_image_step_is_made_of(reader: Reader) -> None:
    _, condition, timesteps, noise = _image_step(reader)
    reader.compare("y", condition.channels)
    reader.compare("noisy_latents", noisy_latents(condition, noise, timesteps), atol=1e-6)
    reader.compare("sigma", timesteps.sigma, atol=1e-6)
    reader.compare("timesteps", timesteps.t, atol=1e-3)
    reader.compare("train_weight", timesteps.weight, rtol=1e-5)


@checks(IMAGE, compares=("loss", "x0_pred_first2latents"), needs=(*_IMAGE_INPUTS, "pred"))
def loss_of_a_recorded_image_prediction(reader: Reader) -> None:
    cfg, condition, timesteps, noise = _image_step(reader)
    velocity = reader.take("pred")
    target = velocity_target(condition.clean, noise)
    loss, _ = OmniAvatar().loss(velocity, target, condition, timesteps, cfg)
    reader.compare("loss", loss.mean().reshape(1), rtol=1e-5)
    noisy = noisy_latents(condition, noise, timesteps)
    x0 = clean_estimate(noisy, velocity, timesteps.sigma)[:, :, :2].clamp(-10, 10)
    reader.compare("x0_pred_first2latents", x0, atol=1e-5)


@checks(IMAGE, compares=("pred", "loss", "grad.*"), needs=(*_IMAGE_INPUTS, "state.*"))
def image_step(reader: Reader) -> None:
    cfg, condition, timesteps, noise = _image_step(reader)
    _whole_step(reader, "", cfg, condition, timesteps, noise)


def _whole_step(
    reader: Reader, run: str, cfg: RunConfig, condition: Condition, timesteps: Timesteps, noise: Tensor
) -> None:
    """Through the network, in training mode with its blocks computed again, and backward."""
    dit = transformer(reader).train()
    dit.enable_gradient_checkpointing()
    step = flow_step(OmniAvatar(), dit, condition, timesteps, noise, cfg)
    reader.compare(f"{run}pred", step.velocity, atol=1e-4)
    loss = step.loss.mean()
    reader.compare(f"{run}loss", loss.reshape(1), rtol=1e-5)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in dit.named_parameters()}
    for name, gradient in OMNIAVATAR.key_map.rename_to_original(gradients).items():
        if reader.keys(f"{run}grad.{name}"):
            reader.compare(f"{run}grad.{name}", gradient, relative_l2=1e-3)


def _runs(reader: Reader) -> list[tuple[str, RunConfig, list[Mapping[str, Tensor]], dict[str, Any]]]:
    """Every recorded run with its samples."""
    found = []
    for key in reader.keys("*.y"):
        run = key.removesuffix("y")
        stated = json.loads(reader.metadata[run.removesuffix(".")])
        channels = stated["in_dim"]
        rule = "all" if stated["mask_all_frames"] else "first_keep"
        cfg = _cfg(channels, f"data.mask_rule={rule}", f"train.mouth_weight={stated['mouth_weight']}")
        data = reader.group(f"in{channels}.data.precomputed_")
        samples = [
            {
                "latents": data["input_latents"][place],
                "masked_latents": data["masked_latents"][place],
                "audio_features": data["audio_emb"][place],
                "text": data["text_emb"][place],
                **({"reference_sequence": data["ref_sequence"][place]} if stated["ref_sequence"] else {}),
            }
            for place in range(stated["B"])
        ]
        found.append((run, cfg, samples, stated))
    return found


def _prepared(
    reader: Reader, run: str, cfg: RunConfig, samples: list[Mapping[str, Tensor]]
) -> tuple[Condition, Timesteps, Tensor]:
    condition = _condition(samples, cfg, samples[0]["text"].shape[0])
    return condition, _timesteps(reader.take(f"{run}timestep_ids"), cfg), reader.take(f"{run}noise")


_VIDEO_INPUTS = ("*.data.*", "*.timestep_ids", "*.noise")


@checks(
    *VIDEOS,
    compares=("*.y", "*.sigmas", "*.timesteps", "*.train_weights"),
    needs=_VIDEO_INPUTS,
)
def what_a_video_step_is_made_of(reader: Reader) -> None:
    for run, cfg, samples, _ in _runs(reader):
        condition, timesteps, _ = _prepared(reader, run, cfg, samples)
        reader.compare(f"{run}y", condition.channels)
        reader.compare(f"{run}sigmas", timesteps.sigma, atol=1e-6)
        reader.compare(f"{run}timesteps", timesteps.t, atol=1e-3)
        reader.compare(f"{run}train_weights", timesteps.weight, rtol=1e-5)


@checks(*VIDEOS, compares=("*.noisy_latents",), needs=_VIDEO_INPUTS)
def noise_on_a_video(reader: Reader) -> None:
    for run, cfg, samples, _ in _runs(reader):
        condition, timesteps, noise = _prepared(reader, run, cfg, samples)
        reader.compare(f"{run}noisy_latents", noisy_latents(condition, noise, timesteps), atol=1e-6)


@checks(*VIDEOS, compares=("*.loss",), needs=(*_VIDEO_INPUTS, "*.pred"))
def loss_of_a_recorded_video_prediction(reader: Reader) -> None:
    for run, cfg, samples, _ in _runs(reader):
        condition, timesteps, noise = _prepared(reader, run, cfg, samples)
        velocity = reader.take(f"{run}pred")
        target = velocity_target(condition.clean, noise)
        loss, parts = OmniAvatar().loss(velocity, target, condition, timesteps, cfg)
        reader.compare(f"{run}loss", loss.mean().reshape(1), rtol=1e-5)
        # What is called unweighted is so: before the mouth's weight and the timestep's.
        plain = (velocity - target).square().flatten(1).mean(1)
        assert torch.allclose(parts["mse"], plain, rtol=1e-5)


@checks(*VIDEOS, compares=("*.x0_pred",), needs=(*_VIDEO_INPUTS, "*.pred"))
def clean_latents_of_a_recorded_prediction(reader: Reader) -> None:
    for run, cfg, samples, _ in _runs(reader):
        condition, timesteps, noise = _prepared(reader, run, cfg, samples)
        velocity = reader.take(f"{run}pred")
        if reader.keys(f"{run}x0_pred"):
            noisy = noisy_latents(condition, noise, timesteps)
            x0 = clean_estimate(noisy, velocity, timesteps.sigma).clamp(-10, 10)
            reader.compare(f"{run}x0_pred", x0, atol=1e-5)


@checks(*VIDEOS, compares=("*.pred", "*.loss", "*.grad.*"), needs=(*_VIDEO_INPUTS, "state.*"))
def video_step(reader: Reader) -> None:
    for run, cfg, samples, _ in _runs(reader):
        condition, timesteps, noise = _prepared(reader, run, cfg, samples)
        _whole_step(reader, run, cfg, condition, timesteps, noise)
