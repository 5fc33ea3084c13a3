"""Auxiliary losses: what judges of decoded frames say, beside the flow-matching loss.

The trainer knows their names and weights alone, and no family knows them. All of it is float32 whatever the
step computes in. Nothing is swallowed: a judge that fails ends the step. Source: spec/omniavatar.md g.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avatarctl.errors import ConfigError, UnusableAudio
from avatarctl.loading.judges import Judges, LossName
from avatarctl.models.vae_gradient import VaeGradient
from avatarctl.training.frame_losses import TrepaMode, lpips_loss, trepa_loss
from avatarctl.training.sync_loss import SyncMode, sync_cosines, sync_loss

if TYPE_CHECKING:
    from avatarctl.config import RunConfig

__all__ = ["SHORTEST", "Align", "AuxLosses", "AuxSettings", "active_losses", "aux_settings"]

Align = Callable[[Tensor, int], Tensor]
"""Frames of one sample [1, 3, n, H, W] and the number of the first in its clip -> its aligned faces, of
another size, with a gradient."""

SHORTEST: Final = 16
"""Pixel frames that a judge of sync or TREPA looks at together (spec/losses-and-eval.md 1.3 and 3.2)."""


@dataclass(frozen=True)
class AuxSettings:
    """What of `aux.*` and `memory.vae_gradient` the losses need; see there."""

    weights: Mapping[LossName, float] = field(default_factory=dict)
    sync_mode: SyncMode = "prob"
    trepa_mode: TrepaMode = "windows"
    window: int = 16
    stride: int = 8
    frames: int = 0
    max_sigma: float = 1.0
    vae_gradient: VaeGradient = "segment"


def active_losses(cfg: RunConfig) -> tuple[LossName, ...]:
    """The losses that run: those that were asked for and have a weight."""
    return tuple(name for name in cfg.aux.losses if getattr(cfg.aux, f"{name}_weight") > 0)


def aux_settings(cfg: RunConfig, clip_frames: int) -> AuxSettings:
    """The settings for clips of `clip_frames` pixel frames.

    Raises ConfigError (exit 2) for clips or windows of them that are too short for a judge, and for windows
    longer than the clip.
    """
    aux, losses = cfg.aux, active_losses(cfg)
    if aux.frames > clip_frames:
        raise ConfigError(
            f"{aux.frames} is more than the {clip_frames} frames of a clip",
            where="aux.frames",
            fix="0 means all",
        )
    shown, key = (aux.frames, "aux.frames") if aux.frames else (clip_frames, "data.num_frames")
    needing = [name for name in losses if name != "lpips"]
    needed = max(SHORTEST, aux.window) if "sync" in losses else SHORTEST
    if needing and shown < needed:
        raise ConfigError(
            f"{shown} frames are too few for {' and '.join(needing)}",
            where=key,
            fix=f"at least {needed}, or without {', '.join(needing)} in aux.losses",
        )
    return AuxSettings(
        weights={name: getattr(aux, f"{name}_weight") for name in losses},
        sync_mode=aux.sync_mode,
        trepa_mode=aux.trepa_mode,
        window=aux.window,
        stride=aux.stride,
        frames=aux.frames,
        max_sigma=aux.max_sigma,
        vae_gradient=cfg.memory.vae_gradient,
    )


class AuxLosses:
    """No module on purpose: its networks are neither wrapped, trained nor saved, and no `train()` reaches
    them (spec/losses-and-eval.md 2.1).

    judges: with a network for each of `names`, frozen, in evaluation mode, float32.
    Raises ConfigError where `settings.window` is not the length that the sync judge knows.
    """

    def __init__(self, names: Sequence[LossName], judges: Judges, settings: AuxSettings) -> None:
        absent = [name for name in names if getattr(judges, name) is None]
        if absent:
            raise ValueError(f"no judge for {', '.join(absent)}")
        if judges.sync is not None and judges.sync.frames != settings.window:
            raise ConfigError(
                f"the judge of sync looks at {judges.sync.frames} frames, not at {settings.window}",
                where="aux.window",
            )
        self.names, self.settings = tuple(names), settings
        self.judges = judges
        self._again = settings.vae_gradient != "full"
        if judges.trepa is not None:
            judges.trepa.recompute = self._again

    @property
    def networks(self) -> list[nn.Module]:
        return [each for each in vars(self.judges).values() if isinstance(each, nn.Module)]

    def __call__(
        self,
        frames: Tensor,
        real: Tensor,
        waveform: Tensor | None,
        first_frame: Sequence[int],
        align: Sequence[Align] | None = None,
    ) -> tuple[dict[LossName, Tensor], dict[str, Tensor]]:
        """The losses by name, unweighted, each [B], and further numbers for people, [B] as well.

        frames:   [B, 3, n, H, W] in [-1, 1], with a gradient; real: the same of the clips themselves.
        waveform: [B, 640 n] float32 at 16 kHz, of exactly these frames; needed for sync alone.
        first_frame: number of the first of these frames in the clip of each sample.
        align:    of each sample, how its frames become aligned faces; None where they are.

        Raises UnusableAudio (exit 3) for sync without audio.
        """
        with torch.autocast(frames.device.type, enabled=False):
            frames, real = _wide(frames), _wide(real)
            if align is not None:
                frames, real = (
                    torch.cat([
                        warp(clip[None], start)
                        for warp, clip, start in zip(align, clips, first_frame, strict=True)
                    ])
                    for clips in (frames, real)
                )  # fmt: skip
            return self._judge(frames, real, waveform)

    def total(self, losses: Mapping[LossName, Tensor]) -> Tensor:
        """The weighted sum, [B]; not weighted by the timestep (spec/losses-and-eval.md 4.1)."""
        return torch.stack([self.settings.weights[name] * loss for name, loss in losses.items()]).sum(0)

    def _judge(
        self, frames: Tensor, real: Tensor, waveform: Tensor | None
    ) -> tuple[dict[LossName, Tensor], dict[str, Tensor]]:
        judges, settings, remember = self.judges, self.settings, self._remember
        losses: dict[LossName, Tensor] = {}
        numbers: dict[str, Tensor] = {}
        if "sync" in self.names:
            assert judges.sync is not None
            if waveform is None:
                raise UnusableAudio("the sample has no audio, and the sync loss needs it", where="aux.losses")
            cosines = sync_cosines(judges.sync, frames, waveform, settings.stride, remember)
            losses["sync"] = sync_loss(cosines, settings.sync_mode).mean(1)
            numbers["sync_cosine"] = cosines.detach().mean(1)
        if "lpips" in self.names:
            assert judges.lpips is not None
            losses["lpips"] = lpips_loss(judges.lpips, frames, real, remember)
        if "trepa" in self.names:
            assert judges.trepa is not None
            losses["trepa"] = trepa_loss(judges.trepa, frames, real, settings.trepa_mode)
        return losses, numbers

    def _remember(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Calls a judge; unless under `full` its activations are made again in the backward pass."""
        if self._again and torch.is_grad_enabled():
            again: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
            return again
        return function(*inputs)


def _wide(frames: Tensor) -> Tensor:
    """At least float32."""
    return frames.to(torch.promote_types(frames.dtype, torch.float32))
