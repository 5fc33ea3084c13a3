"""The memory of a validation within a training that is counted: its clip is made by the loop of `infer`, with
the network that is trained, and judged, as `training.validation` does.

The loss that it takes is left out: that is a forward pass of training without what is kept for the other one.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from avatarctl.data.training_set import ToFace
from avatarctl.family import Modules, TrainableFamily
from avatarctl.loading.judges import PART_OF
from avatarctl.placement.place import leaf_by_leaf
from avatarctl.profiling.auxiliary import built_judges, face_of
from avatarctl.profiling.fakes import Mode, fill, outside
from avatarctl.profiling.inference import dtypes_of, inputs_of, run_loop
from avatarctl.profiling.phases import Phases, weights_of
from avatarctl.profiling.recordings import STEPS
from avatarctl.profiling.repeats import Repeats
from avatarctl.profiling.watched import watch
from avatarctl.sampling.denoise import Denoiser
from avatarctl.timeline import SAMPLES_PER_FRAME
from avatarctl.training.validation import lips_box, made_with
from avatarctl.training.validation_networks import KnownTexts, Precise
from avatarctl.training.validation_scores import as_tensor, mouth_lpips, sync_curve

if TYPE_CHECKING:
    from collections.abc import Mapping

    from avatarctl.config import RunConfig
    from avatarctl.live_bytes import LiveBytes
    from avatarctl.loading.judges import LossName
    from avatarctl.registry import Row
    from avatarctl.training.network import Network

__all__ = ["CountedValidation"]

_PHASE: Final = "validation"
_JUDGES: Final[tuple[LossName, ...]] = ("sync", "lpips")


@dataclass
class CountedValidation:
    """parts: the networks of the row, on meta; those that a validation needs are taken out of it. host: where
    encoders wait between their calls."""

    row: Row
    cfg: RunConfig
    family: TrainableFamily
    parts: dict[str, Any]
    mode: Mode
    device: str
    host: torch.device
    live: LiveBytes
    phases: Phases

    def read_texts(self) -> KnownTexts:
        """Before the network is there: the text encoder reads the prompts, and leaves."""
        given = self.cfg.input
        prompts = [given.prompt or "", given.negative_prompt or ""]
        text = self._read("text")
        self.live.track(text, name=weights_of("text"))
        with self.phases.within(_PHASE), torch.no_grad():
            watch("text", text, self.phases)
            return KnownTexts(text, prompts, torch.device(self.device), self.host)

    def run(self, network: Network, texts: KnownTexts, held: Mapping[str, Any]) -> None:
        """Makes a clip, and judges it; beside what the training holds. held: judges that are there."""
        training = network.dit.training
        with self.phases.within(_PHASE), network.averaged(), torch.no_grad():
            lacking = [name for name in self._judges if PART_OF[name] not in held]
            loaded = built_judges(self.row, lacking, nullcontext(), self.device)
            for part, judge in loaded.items():
                self.live.track(judge, name=weights_of(part))
            parts = [PART_OF[name] for name in self._judges]
            judges = loaded | {part: held[part] for part in parts if part in held}
            network.dit.eval()
            self._make(network, texts)
            with self.phases("judges"):
                self._judge(judges)
        network.dit.train(training)

    def _make(self, network: Network, texts: KnownTexts) -> None:
        cfg, device = made_with(self.cfg), torch.device(self.device)
        frames = cfg.data.num_frames
        assert frames is not None and cfg.sampling.shift is not None
        repeats = None if self.mode == "real" else Repeats(self.live)
        parts: dict[str, Any] = {"dit": Precise(network)}
        for part in ("vae", "audio"):
            parts[part] = self._read(part, waits=True)
            leaf_by_leaf(parts[part], device, host=self.host)
            self.live.track(parts[part], name=weights_of(part))
        for part, each in parts.items():
            watch(part, each, self.phases, repeats)
        samples = (frames - self.family.conventions(cfg).audio_offset) * SAMPLES_PER_FRAME
        with outside(self.mode):
            plan = self.family.plan(samples, cfg)
            sigmas = self.family.sigmas(STEPS, cfg.sampling.shift).tolist()
        denoise = Denoiser(self.family, parts["dit"], self.family.guidance(cfg), sigmas)
        modules = Modules(**parts, text=texts, device=device)
        run_loop(denoise, modules, inputs_of(self.family.takes(cfg), cfg, samples), plan, cfg)

    def _judge(self, judges: dict[str, Any]) -> None:
        data, device = self.cfg.data, torch.device(self.device)
        assert data.num_frames is not None and data.height is not None and data.width is not None
        shape = (data.num_frames, data.height, data.width, 3)
        made, truth = (as_tensor(torch.zeros(shape, dtype=torch.uint8, device=device)) for _ in range(2))
        if "lpips_vgg" in judges:
            with outside(self.mode):
                box = lips_box(self.family, self.cfg)
            mouth_lpips(judges["lpips_vgg"], made, truth, box)
        sync = judges.get("syncnet")
        if sync is None or data.num_frames < sync.frames:
            return
        face = face_of(self.row, self.cfg)
        align = ToFace(torch.zeros(data.num_frames, 2, 3, device=device), face) if face else None

        def silence(start: int, stop: int) -> Tensor:
            return torch.zeros(stop - start, device=device)

        for clip in (made, truth):
            frames = clip if align is None else align(clip, 0)
            sync_curve(sync, frames, silence, self.cfg.aux.stride)

    @property
    def _judges(self) -> tuple[LossName, ...]:
        return tuple(each for each in _JUDGES if each in self.cfg.validation.metrics)

    def _read(self, part: str, waits: bool = False) -> Any:
        """A network of the row. waits: it is read to where encoders wait, beside what is counted."""
        network = self.parts.pop(part)
        place = self.host.type if waits else self.device
        with _disable_current_modes() if waits else nullcontext():
            fill(network, nullcontext(), dtypes_of(network, part, self.cfg), place)
        return network
