"""The auxiliary losses of a training step that is counted: the trainer's own, on networks of any size."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from avatarctl.conditioning.mel import mel_filters
from avatarctl.data.training_set import ToFace
from avatarctl.families import family_named
from avatarctl.loading.built_in import build_on_meta
from avatarctl.loading.fill import on_meta
from avatarctl.loading.judges import PART_OF, Judges, LossName
from avatarctl.models.lpips_vgg import LpipsVgg
from avatarctl.models.stable_syncnet import PUBLISHED_SYNCNET, StableSyncNet
from avatarctl.models.videomae import PUBLISHED_VIDEOMAE, VideoMae, sinusoids
from avatarctl.profiling.fakes import fill, tensor_bytes
from avatarctl.timeline import SAMPLES_PER_FRAME, pixel_frames
from avatarctl.training.aux_losses import AuxLosses, active_losses, aux_settings
from avatarctl.training.aux_step import AuxBatch, AuxStep

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.family import Condition, Timesteps
    from avatarctl.models.vae import WanVae
    from avatarctl.registry import Row
    from avatarctl.training.objective import FlowStep

__all__ = ["CountedAux", "aux_step", "built_judges", "face_of", "without_caches"]

_JUDGES: Final[Mapping[str, tuple[type[nn.Module], Mapping[str, Any]]]] = {
    "syncnet": (StableSyncNet, PUBLISHED_SYNCNET),
    "lpips_vgg": (LpipsVgg, {}),
    "videomae": (VideoMae, PUBLISHED_VIDEOMAE),
}
"""Of each part: its class, and the sizes of the published one."""

_ALIGNED: Final = 512
"""Pixels of a side of an aligned face, as `precompute-latents` writes them for published models."""


class CountedAux(AuxStep):
    """The losses of a step whose numbers nobody knows: each sample is judged, in the window at the end of its
    clip, which most frames are decoded for.

    face: pixels of a side of an aligned face, 0 where frames are aligned faces. weights: bytes of each
    network; networks: all of them by part, frozen.
    """

    def __init__(
        self, losses: AuxLosses, vae: WanVae, judges: Mapping[str, nn.Module], face: int, host: torch.device
    ) -> None:
        super().__init__(losses, vae, host)
        self.networks: dict[str, nn.Module] = {"vae": vae, **judges}
        self.weights = {part: tensor_bytes(network) for part, network in self.networks.items()}
        self._face = face

    def _choose(self, batch: AuxBatch, clip: int) -> tuple[list[int], list[int]]:
        count = len(batch.velocity)
        return list(range(count)), [clip - (self.losses.settings.frames or clip)] * count

    def make_tables(self) -> None:
        """Those that judges make once and keep, so that every step finds them."""
        if "sync" in self.losses.names:
            mel_filters()
        for network in self.networks.values():
            if isinstance(network, VideoMae):
                projection: Any = network.patch_embed["proj"]
                tokens = (network.image_size // projection.kernel_size[1]) ** 2
                sinusoids(network.frames // network.tubelet * tokens, projection.out_channels)

    def loss(self, made: FlowStep, condition: Condition, timesteps: Timesteps) -> Tensor:
        """The weighted sum, [B]."""
        assert condition.clean is not None
        count, frames = len(made.velocity), pixel_frames(made.velocity.shape[2])
        place = made.velocity.device
        audio = (
            torch.zeros(count, SAMPLES_PER_FRAME * frames, device=place)
            if "sync" in self.losses.names
            else None
        )
        align = (
            [ToFace(torch.zeros(frames, 2, 3, device=place), self._face) for _ in range(count)]
            if self._face
            else None
        )
        keys = [(0, (0, slot)) for slot in range(count)]
        return self(
            AuxBatch(
                made.noisy, made.velocity, timesteps.sigma, condition.clean, audio, keys, align,
                condition.fixed_mask,
            )
        ).total  # fmt: skip


def aux_step(
    row: Row, cfg: RunConfig, inside: AbstractContextManager[Any], device: str, host: torch.device
) -> CountedAux | None:
    """The auxiliary losses of a run, all in float32; None where it has none. host: what waits is there."""
    names = active_losses(cfg)
    if not names:
        return None
    assert cfg.data.num_frames is not None
    vae: Any = build_on_meta(row, cfg.model.channels)["vae"]
    fill(vae.eval().requires_grad_(False), inside, _float32, device)
    made = built_judges(row, names, inside, device)
    judges = Judges(**{name: made[PART_OF[name]] for name in names})
    losses = AuxLosses(names, judges, aux_settings(cfg, cfg.data.num_frames))
    return CountedAux(losses, vae, made, face_of(row, cfg) if "sync" in names else 0, host)


def face_of(row: Row, cfg: RunConfig) -> int:
    """Pixels of a side of an aligned face, 0 where frames are aligned faces: as in training, models that
    start from an image show more than a face."""
    shows_more = family_named(row.family).takes(cfg) == "image" and cfg.data.faces not in (None, "none")
    return _ALIGNED if shows_more else 0


def _float32(name: str, tensor: Tensor) -> torch.dtype:
    return torch.float32


def built_judges(
    row: Row, names: Collection[LossName], inside: AbstractContextManager[Any], device: str
) -> dict[str, Any]:
    """The networks of some losses by part, frozen, in float32: those of the row, or as large as published."""
    made: dict[str, Any] = {}
    for part in (PART_OF[name] for name in names):
        kind, published = _JUDGES[part]
        with on_meta():
            made[part] = kind(**row.network.get(part, published))
        fill(made[part].eval().requires_grad_(False), inside, _float32, device)
    return made


@contextmanager
def without_caches() -> Iterator[None]:
    """Tables that are made once in a process are made inside, and forgotten: a fake one would stay."""
    tables = (sinusoids, mel_filters)
    for table in tables:
        table.cache_clear()
    try:
        yield
    finally:
        for table in tables:
            table.cache_clear()
