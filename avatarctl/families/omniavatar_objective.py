"""What OmniAvatar is trained on: the maintainers' recipe, and under `compat fork` the public trainer's step.

Specification: spec/omniavatar.md e, g. The recipe shows the network in training what inference shows
it: some first latents are given and clean, more or fewer of them by chance, and no loss is taken there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from avatarctl.config import RunConfig
from avatarctl.family import Condition, Draw, Timesteps
from avatarctl.rng import generator
from avatarctl.timeline import pixel_frames

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Encoded", "Objective", "prefix_latents"]

_TEXT_ROWS: Final = 512
"""Rows of a text as the network reads it, zeros behind the prompt (spec/omniavatar.md d)."""


@dataclass(frozen=True)
class Encoded:
    """What a condition is built from, in inference and in training.

    reference [B, 16, 1, h, w]; given [B, 16, k, h, w], of which the first `counts` of a sample count;
    audio [B, L, A]; frames: latent frames; keep [B or 1, 1, h, w], None where whole frames are made; masked
    video and reference sequence [B, 16, T, h, w], where the model has them.
    """

    reference: Tensor
    given: Tensor | None
    counts: Sequence[int]
    audio: Tensor
    text: Mapping[str, Tensor]
    frames: int
    keep: Tensor | None = None
    masked: Tensor | None = None
    sequence: Tensor | None = None


class Objective:
    """The training half of `TrainableFamily`; holds nothing."""

    def build_condition(self, encoded: Encoded) -> Condition:
        """The family's own."""
        raise NotImplementedError

    def training_condition(
        self,
        samples: Sequence[Mapping[str, Tensor]],
        constants: Mapping[str, Tensor],
        draws: Sequence[Draw],
        cfg: RunConfig,
    ) -> Condition:
        import torch

        clean = torch.stack([sample["latents"].float() for sample in samples])
        frames, plane = clean.shape[2], (clean.shape[3], clean.shape[4])
        pairs = list(zip(samples, draws, strict=True))
        counts = [prefix_latents(draw, frames, cfg) for draw in draws]
        encoded = Encoded(
            reference=torch.stack([_reference(sample, draw, cfg) for sample, draw in pairs]),
            given=clean,
            counts=counts,
            audio=torch.stack([_audio(sample, constants, draw, frames, cfg) for sample, draw in pairs]),
            text={"prompt": torch.stack([_text(sample, constants, draw, cfg) for sample, draw in pairs])},
            frames=frames,
            keep=_keep(constants, plane, cfg),
            masked=_stacked(samples, "masked_latents"),
            sequence=_stacked(samples, "reference_sequence"),
        )
        condition = self.build_condition(encoded)
        assert condition.fixed_mask is not None
        # The public step tells the network that the first latent is given, and noises it all the same.
        fixed = torch.zeros_like(condition.fixed_mask) if _as_fork(cfg) else condition.fixed_mask
        keep = _mouth(constants, plane, cfg)
        extra = {} if keep is None else {"keep": keep}
        if cfg.train.prefix_noise:
            noise = torch.stack([_prefix_noise(draw, clean.shape[1:], cfg) for draw in draws])
            clean = torch.where(fixed, clean + noise.to(clean.device), clean)
        return replace(condition, clean=clean, fixed_mask=fixed, extra=extra)

    def sample_timesteps(self, draws: Sequence[Draw], frames: int, cfg: RunConfig) -> Timesteps:
        """One id in 0..999 per sample, on the grid of inference: shift crowds its sigmas."""
        from avatarctl.flow_matching import TRAIN_TIMESTEPS

        return timesteps_at([draw.integer("timestep", TRAIN_TIMESTEPS) for draw in draws], cfg)

    def training_forward(self, dit: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        import torch

        assert condition.channels is not None
        inputs = torch.cat([x, condition.channels], dim=1)
        audio, text = condition.audio["features"], condition.text["prompt"]
        velocity: Tensor = dit(inputs, t, text, audio, mode="raw")
        return velocity

    def loss(
        self,
        velocity: Tensor,
        target: Tensor,
        condition: Condition,
        timesteps: Timesteps,
        cfg: RunConfig,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error over the frames that are not given. `train.mouth_weight` weighs what the mask erases
        and is not divided out again (spec/omniavatar.md g.3); `mse` is the error before any weight."""
        assert condition.fixed_mask is not None
        squared = (velocity.float() - target.float()).square()
        free = (~condition.fixed_mask).to(squared.dtype)
        numbers = free.sum(dim=(1, 2, 3, 4)) * squared[0, :, 0].numel()
        plain = (squared * free).sum(dim=(1, 2, 3, 4)) / numbers
        weighted = plain
        if cfg.train.mouth_weight != 1:
            erased = 1 - condition.extra["keep"].unsqueeze(2)
            weights = 1 + (cfg.train.mouth_weight - 1) * erased
            weighted = (squared * weights * free).sum(dim=(1, 2, 3, 4)) / numbers
        return weighted * timesteps.weight.to(weighted.device), {"mse": plain.detach()}


def timesteps_at(ids: Sequence[int], cfg: RunConfig) -> Timesteps:
    """Ids of the training grid as the network reads them, float32; the id itself is kept, as rounding moves
    706 of 1000 timesteps to another one (spec/omniavatar.md e)."""
    import torch

    from avatarctl.flow_matching import TRAIN_TIMESTEPS, shifted_sigmas, timesteps_of, training_weights

    shift = cfg.sampling.shift
    assert shift is not None
    places = torch.tensor(ids, dtype=torch.long)
    sigma = shifted_sigmas(TRAIN_TIMESTEPS, shift)[places]
    bell = cfg.train.timestep_weight == "bell"
    weight = training_weights(shift)[places] if bell else torch.ones(len(ids))
    return Timesteps(id=places, t=timesteps_of(sigma), sigma=sigma, weight=weight)


def prefix_latents(draw: Draw, frames: int, cfg: RunConfig) -> int:
    """Latent frames of a clip of `frames` that are given to the network.

    Drawn from `train.prefix_frames`, as far as one frame is left to be learnt, and dropped with
    `train.prefix_dropout`: then all is noise. Where the mask leaves no frame whole, a first chunk of
    inference is given nothing, so nothing is one of the choices as well.
    """
    if _as_fork(cfg):
        return 0 if _masks_all(cfg) else 1
    if draw.uniform("prefix dropout") < cfg.train.prefix_dropout:
        return 0
    choices = {0, *cfg.train.prefix_frames} if _masks_all(cfg) else set(cfg.train.prefix_frames)
    fitting = sorted(each for each in choices if each < pixel_frames(frames))
    if not fitting:
        return 0
    return (fitting[draw.integer("prefix", len(fitting))] + 3) // 4


def _prefix_noise(draw: Draw, shape: Sequence[int], cfg: RunConfig) -> Tensor:
    """[16, T, h, w] of a deviation that is drawn by the square of a uniform number."""
    import torch

    noise = torch.randn(tuple(shape), generator=generator(draw.seed, "prefix noise", draw.step, draw.slot))
    return noise * (cfg.train.prefix_noise * draw.uniform("prefix noise deviation") ** 2)


def _as_fork(cfg: RunConfig) -> bool:
    return cfg.model.compat == "fork"


def _masks_all(cfg: RunConfig) -> bool:
    """Whether the first frame of a clip is masked as every other: of the rules one alone leaves it whole."""
    return cfg.model.channels != 33 and cfg.data.mask_rule != "first_keep"


def _reference(sample: Mapping[str, Tensor], draw: Draw, cfg: RunConfig) -> Tensor:
    """[16, 1, h, w]: one of the frames elsewhere in the source, where the sample has them; else, and always
    in the public step, the clip's first frame, whose latent depends on no other."""
    if "references" not in sample or _as_fork(cfg):
        return sample["latents"][:, :1].float()
    several = sample["references"]
    place = draw.integer("reference", several.shape[1])
    return several[:, place : place + 1].float()


def _audio(
    sample: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    draw: Draw,
    frames: int,
    cfg: RunConfig,
) -> Tensor:
    """[L, A]. Dropped audio is the features of silence (spec/omniavatar.md g.1), zeros in the public step.

    With an audio offset of 1 inference puts a frame of zeros in front of the features, and frame j is shown
    while its own audio is played: so nothing moves in training, and frame 0 has none. The frame of zeros is
    there whatever is said, so also in front of silence.
    """
    import torch

    length = pixel_frames(frames)
    features = sample["audio_features"][:length].float()
    if draw.uniform("audio dropout") < cfg.train.audio_dropout:
        features = torch.zeros_like(features) if _as_fork(cfg) else constants["silence"][:length].float()
    if cfg.model.audio_offset:
        features = features.clone()
        features[0] = 0
    return features


def _text(
    sample: Mapping[str, Tensor], constants: Mapping[str, Tensor], draw: Draw, cfg: RunConfig
) -> Tensor:
    """[512, width], rows behind the prompt zero; the empty prompt where it is dropped."""
    dropped = draw.uniform("text dropout") < cfg.train.text_dropout
    states = (constants["empty_prompt"] if dropped else sample["text"]).float()
    padded = states.new_zeros(_TEXT_ROWS, states.shape[1])
    padded[: states.shape[0]] = states
    return padded


def _keep(constants: Mapping[str, Tensor], plane: tuple[int, int], cfg: RunConfig) -> Tensor | None:
    """What the mask channel says is kept, [1, 1, h, w]; None where whole frames are made."""
    return None if cfg.model.channels == 33 else _mouth(constants, plane, cfg)


def _mouth(constants: Mapping[str, Tensor], plane: tuple[int, int], cfg: RunConfig) -> Tensor | None:
    """The mask at the size of latents, [1, 1, h, w] of 0 and 1; None where the run has none."""
    from avatarctl.conditioning.masking import keep_map

    return keep_map(constants["mask"], plane) if "mask" in constants else None


def _stacked(samples: Sequence[Mapping[str, Tensor]], name: str) -> Tensor | None:
    import torch

    if any(name not in sample for sample in samples):
        return None
    return torch.stack([sample[name].float() for sample in samples])
