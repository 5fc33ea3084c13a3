"""What a step of OmniAvatar learns from: prefixes, dropouts, references, weights (spec/omniavatar.md g.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from avatarctl.conditioning.masking import mask_tensor, mouth_mask
from avatarctl.config import RunConfig
from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.families.omniavatar_objective import prefix_latents, timesteps_at
from avatarctl.family import Condition, Draw
from avatarctl.models.omniavatar import OmniAvatarTransformer
from avatarctl.registry import configure
from avatarctl.training.objective import FlowStep, flow_step, noisy_latents, training_noise

FRAMES = 4
FAMILY = OmniAvatar()
CHANNELS = (33, 49, 65)


def cfg_of(channels: int, *words: str) -> RunConfig:
    name = "cartoon-i2v" if channels == 33 else "cartoon-v2v"
    return configure(f"model.name={name}", f"model.channels={channels}", *words)


def no_dropout(channels: int, *words: str) -> RunConfig:
    dropped = ("train.text_dropout=0", "train.audio_dropout=0", "train.prefix_dropout=0")
    return cfg_of(channels, *dropped, *words)


def random_sample(seed: int, channels: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sample = {"latents": made(16, FRAMES, 4, 4), "audio_features": made(16, 12), "text": made(5, 8)}
    if channels >= 49:
        sample["masked_latents"] = made(16, FRAMES, 4, 4)
    if channels == 65:
        sample["reference_sequence"] = made(16, FRAMES, 4, 4)
    return sample


CONSTANTS = {
    "silence": torch.full((13, 12), 0.25),
    "empty_prompt": torch.full((1, 8), 0.5),
    "mask": mask_tensor(mouth_mask()),
}


def draws(count: int, step: int = 0) -> list[Draw]:
    return [Draw(5, step, slot, count) for slot in range(count)]


def condition_of(
    samples: Sequence[Mapping[str, Tensor]], cfg: RunConfig, constants: Mapping[str, Tensor] = CONSTANTS
) -> Condition:
    return FAMILY.training_condition(samples, constants, draws(len(samples)), cfg)


def network(channels: int) -> OmniAvatarTransformer:
    torch.manual_seed(0)
    made = OmniAvatarTransformer(
        num_attention_heads=2, attention_head_dim=12, in_channels=channels, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=4, audio_input_dim=12, audio_hidden_size=4,
    )  # fmt: skip
    return made.eval()


def step_of(
    samples: Sequence[Mapping[str, Tensor]], cfg: RunConfig, dit: Any, constants: Any = CONSTANTS
) -> FlowStep:
    condition = condition_of(samples, cfg, constants)
    drawn = draws(len(samples))
    timesteps = timesteps_at([700] * len(samples), cfg)
    assert condition.clean is not None
    noise = training_noise(drawn, condition.clean.shape)
    return flow_step(FAMILY, dit, condition, timesteps, noise, cfg)


@pytest.mark.parametrize("channels", CHANNELS)
def test_given_frames_stay_clean_are_marked_and_cost_nothing(channels: int) -> None:
    cfg = no_dropout(channels, "train.prefix_frames=5", "data.mask_rule=first_keep")
    condition = condition_of([random_sample(1, channels)], cfg)
    timesteps = timesteps_at([700], cfg)
    assert condition.clean is not None and condition.channels is not None and condition.fixed_mask is not None
    assert condition.fixed_mask[0, 0, :, 0, 0].tolist() == [True, True, False, False]
    noise = training_noise(draws(1), condition.clean.shape)
    noisy = noisy_latents(condition, noise, timesteps)
    assert torch.equal(noisy[:, :, :2], condition.clean[:, :, :2])
    assert not torch.equal(noisy[:, :, 2:], condition.clean[:, :, 2:])
    assert condition.channels[0, 16, :2].abs().max() == 0  # the mask channel, behind 16 of reference
    velocity, target = torch.zeros_like(noise), torch.zeros_like(noise)
    velocity[:, :, :2] = 100.0
    loss, parts = FAMILY.loss(velocity, target, condition, timesteps, cfg)
    assert float(loss) == float(parts["mse"]) == 0


def test_error_is_averaged_over_the_frames_that_are_learnt() -> None:
    cfg = no_dropout(33, "train.prefix_frames=9", "train.timestep_weight=none")
    condition = condition_of([random_sample(1, 33)], cfg)
    velocity = torch.full((1, 16, FRAMES, 4, 4), 3.0)
    loss, _ = FAMILY.loss(velocity, torch.zeros_like(velocity), condition, timesteps_at([0], cfg), cfg)
    assert float(loss) == pytest.approx(9.0)


def test_prefixes_are_drawn_from_those_asked_for_and_leave_a_frame() -> None:
    cfg = cfg_of(33, "train.prefix_dropout=0.25", "train.prefix_frames=1,5,9,13")
    drawn = [prefix_latents(Draw(1, step, 0, 1), FRAMES, cfg) for step in range(2000)]
    assert set(drawn) == {0, 1, 2, 3}  # 13 frames would leave none of a clip of 13
    assert abs(drawn.count(0) / 2000 - 0.25) < 0.03
    assert all(abs(drawn.count(each) / 2000 - 0.25) < 0.03 for each in (1, 2, 3))


def test_a_masked_first_frame_makes_nothing_given_a_choice() -> None:
    """As the first chunk of a video is: under `all` it is given nothing."""
    rule = {
        rule: [
            prefix_latents(
                Draw(1, step, 0, 1),
                FRAMES,
                cfg_of(49, "train.prefix_dropout=0", "train.prefix_frames=5", f"data.mask_rule={rule}"),
            )
            for step in range(400)
        ]
        for rule in ("all", "legacy_two_step", "first_keep")
    }
    assert set(rule["all"]) == set(rule["legacy_two_step"]) == {0, 2} and set(rule["first_keep"]) == {2}
    assert abs(rule["all"].count(0) / 400 - 0.5) < 0.1


def test_dropped_audio_is_silence_and_dropped_text_the_empty_prompt() -> None:
    sample = random_sample(1, 33)
    spoken = condition_of([sample], no_dropout(33))
    dropped = condition_of([sample], no_dropout(33, "train.audio_dropout=1", "train.text_dropout=1"))
    length = 4 * FRAMES - 3
    assert torch.equal(spoken.audio["features"][0], sample["audio_features"][:length])
    assert torch.equal(dropped.audio["features"][0], CONSTANTS["silence"][:length])
    assert spoken.text["prompt"].shape == dropped.text["prompt"].shape == (1, 512, 8)
    assert torch.equal(spoken.text["prompt"][0, :5], sample["text"])
    assert torch.equal(dropped.text["prompt"][0, :1], CONSTANTS["empty_prompt"])
    assert spoken.text["prompt"][0, 5:].abs().max() == dropped.text["prompt"][0, 1:].abs().max() == 0


def test_fork_drops_to_zero_features() -> None:
    """What the public step does, and ours does not (spec/omniavatar.md g.1, g.2)."""
    cfg = no_dropout(33, "train.audio_dropout=1", "model.compat=fork")
    assert condition_of([random_sample(1, 33)], cfg).audio["features"].abs().max() == 0


def test_dropouts_are_per_sample() -> None:
    samples = [random_sample(seed, 33) for seed in range(40)]
    cfg = cfg_of(33, "train.audio_dropout=0.5", "train.text_dropout=0.5", "train.prefix_dropout=0.5")
    condition = condition_of(samples, cfg)
    silent = [bool((features == 0.25).all()) for features in condition.audio["features"]]
    assert condition.fixed_mask is not None
    free = [not bool(mask.any()) for mask in condition.fixed_mask]
    empty = [bool((text[1:] == 0).all()) for text in condition.text["prompt"]]
    for each in (silent, free, empty):
        assert 10 < sum(each) < 30
    assert silent != free and silent != empty and free != empty


def test_with_an_audio_offset_only_the_first_frame_loses_its_audio() -> None:
    sample = random_sample(1, 33)
    cfg = no_dropout(33, "model.audio_offset=1")
    features = condition_of([sample], cfg).audio["features"][0]
    assert features[0].abs().max() == 0
    assert torch.equal(features[1:], sample["audio_features"][1 : 4 * FRAMES - 3])


def test_reference_is_a_frame_of_the_source_where_the_sample_has_some() -> None:
    sample = random_sample(1, 33)
    several = {**sample, "references": torch.randn(16, 3, 4, 4)}
    cfg = no_dropout(33)
    assert condition_of([sample], cfg).channels is not None
    first = condition_of([sample], cfg).channels[:, :16]  # type: ignore[index]
    assert torch.equal(first[0], sample["latents"][:, :1].expand(-1, FRAMES, -1, -1))
    seen = set()
    for step in range(30):
        condition = FAMILY.training_condition([several], CONSTANTS, [Draw(5, step, 0, 1)], cfg)
        assert condition.channels is not None
        drawn = condition.channels[0, :16, 0]
        assert torch.equal(condition.channels[0, :16], drawn[:, None].expand(-1, FRAMES, -1, -1))
        seen |= {place for place in range(3) if torch.equal(drawn, several["references"][:, place])}
    assert seen == {0, 1, 2}
    fork = no_dropout(33, "model.compat=fork")  # the public step knows no other (spec/omniavatar.md g.1)
    for step in range(5):
        condition = FAMILY.training_condition([several], CONSTANTS, [Draw(5, step, 0, 1)], fork)
        assert condition.channels is not None and torch.equal(condition.channels[:, :16], first)


def test_mouth_weight_counts_what_the_mask_erases() -> None:
    cfg = no_dropout(49, "train.mouth_weight=3", "train.prefix_frames=0", "train.timestep_weight=none")
    condition = condition_of([random_sample(1, 49)], cfg)
    velocity = torch.ones(1, 16, FRAMES, 4, 4)
    loss, parts = FAMILY.loss(velocity, torch.zeros_like(velocity), condition, timesteps_at([3], cfg), cfg)
    erased = float(1 - condition.extra["keep"].mean())
    assert 0.2 < erased < 0.7
    assert float(loss) == pytest.approx(1 + 2 * erased) and float(parts["mse"]) == pytest.approx(1.0)


def test_timestep_keeps_its_exact_value_and_id() -> None:
    """In bfloat16 706 of 1000 ids would become others (spec/omniavatar.md e)."""
    cfg = cfg_of(33)
    timesteps = timesteps_at(list(range(1000)), cfg)
    assert timesteps.t.dtype == torch.float32 and timesteps.t.unique().numel() == 1000
    assert timesteps.id.tolist() == list(range(1000))
    assert timesteps.t[0] == 1000 and timesteps.weight[0] == 0
    assert float(timesteps.weight.mean()) == pytest.approx(1.0)
    assert timesteps_at([5], cfg_of(33, "train.timestep_weight=none")).weight.tolist() == [1.0]


def test_ids_are_uniform() -> None:
    drawn = FAMILY.sample_timesteps([Draw(1, step, 0, 1) for step in range(4000)], FRAMES, cfg_of(33)).id
    assert drawn.min() >= 0 and drawn.max() <= 999
    assert abs(float(drawn.float().mean()) - 499.5) < 20


@pytest.mark.parametrize("channels", CHANNELS)
def test_each_input_changes_the_loss(channels: int) -> None:
    """A condition that the network never sees would leave it as it is."""
    cfg, dit = no_dropout(channels, "train.prefix_frames=1"), network(channels)
    sample = random_sample(1, channels)
    before = float(step_of([sample], cfg, dit).loss)
    for name, tensor in sample.items():
        changed = {**sample, name: tensor + 0.5 * torch.randn(tensor.shape, generator=torch.manual_seed(3))}
        assert float(step_of([changed], cfg, dit).loss) != pytest.approx(before, abs=1e-7), name
    if channels > 33:
        mask = {**CONSTANTS, "mask": 1 - CONSTANTS["mask"]}
        assert float(step_of([sample], cfg, dit, mask).loss) != pytest.approx(before, abs=1e-7)


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_batch_is_its_samples(channels: int) -> None:
    cfg, dit = no_dropout(channels), network(channels)
    samples = [random_sample(seed, channels) for seed in range(3)]
    together = step_of(samples, cfg, dit).loss
    for place, sample in enumerate(samples):
        condition = FAMILY.training_condition([sample], CONSTANTS, [draws(3)[place]], cfg)
        assert condition.clean is not None
        noise = training_noise([draws(3)[place]], condition.clean.shape)
        alone = flow_step(FAMILY, dit, condition, timesteps_at([700], cfg), noise, cfg).loss
        assert torch.allclose(alone[0], together[place], atol=1e-5)
