"""The memory of `avatarctl infer`: a family's own loop, with fake networks, over a few spans and steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from avatarctl.conditioning.masking import mask_tensor, mouth_mask
from avatarctl.config import RunConfig
from avatarctl.events import silent
from avatarctl.families import family_named
from avatarctl.family import Inputs, Modules, Source, VideoPlan
from avatarctl.host import HOST
from avatarctl.live_bytes import LiveBytes
from avatarctl.loading.built_in import build_on_meta, build_random_modules
from avatarctl.loading.modules import PARTS
from avatarctl.loading.placed import PlacedModules, is_full
from avatarctl.models.device import dtype_of
from avatarctl.models.fp8 import store_in_float8
from avatarctl.models.precision import is_float32_island
from avatarctl.placement.units import WEIGHTS
from avatarctl.profiling.account import Account
from avatarctl.profiling.fakes import Mode, fill, outside, slots, tensor_bytes, tensors
from avatarctl.profiling.phases import Phases, weights_of
from avatarctl.profiling.recordings import Recording, counted, shortest
from avatarctl.profiling.repeats import Repeats
from avatarctl.profiling.watched import watch
from avatarctl.registry import Row
from avatarctl.sampling.chunks import sample_chunks
from avatarctl.sampling.denoise import Denoiser
from avatarctl.sampling.fused import sample_fused
from avatarctl.timeline import SAMPLES_PER_FRAME

__all__ = ["counted_modules", "dtypes_of", "inputs_of", "profile_inference", "run_loop"]

_LOOPS: Final[Mapping[str, Any]] = {"chunks": sample_chunks, "fused": sample_fused}


class _Silence:
    """A recording of any length."""

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.zeros(stop - start, np.float32)


@dataclass
class _Black:
    """A video of any length, of the network's size."""

    height: int
    width: int
    frames: int

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.zeros((stop - start, self.height, self.width, 3), np.uint8)


def counted_modules(
    row: Row, cfg: RunConfig, inside: AbstractContextManager[Any], device: str = "cpu"
) -> Modules:
    """The networks of a run as it loads them: the transformer and the text encoder in its dtype, what stays
    float32 in float32; the others as `loading.modules` has them on a card."""
    parts = build_on_meta(row, cfg.model.channels)
    for part, network in parts.items():
        fill(network, inside, dtypes_of(network, part, cfg), device)
        with inside:
            _stored(network, part, cfg)
    return Modules(**parts, device=torch.device(device))  # type: ignore[arg-type]


def dtypes_of(network: nn.Module, part: str, cfg: RunConfig) -> Callable[[str, Tensor], torch.dtype]:
    """Of each weight of a part, by its name, as a run has it."""
    half = ("dit", "text") if cfg.runtime.device == "cpu" else ("dit", "text", "vae")
    wanted = dtype_of(cfg.runtime) if part in half else torch.float32

    def own(name: str, _: Tensor) -> torch.dtype:
        return torch.float32 if is_float32_island(network, name) else wanted

    return own


def _stored(network: nn.Module, part: str, cfg: RunConfig) -> None:
    """As `memory.base_precision` has the transformer."""
    if part == "dit" and cfg.memory.base_precision == "fp8":
        store_in_float8(network)


def profile_inference(
    row: Row,
    cfg: RunConfig,
    mode: Mode = "fake",
    device: str = "cpu",
    *,
    exact: bool = False,
    samples: int | None = None,
) -> Account:
    """Counts a run, networks where `memory.mode` has them: of the shortest recording that has two spans, in
    two steps, or of one of so many samples at 16 kHz (`recordings`).

    exact: calls that are like one before are run again (`repeats`), as on real tensors.
    """
    cfg = _sized(cfg)
    family = family_named(row.family)

    def count(cfg: RunConfig, recording: Recording) -> Account:
        return _counted(row, cfg, recording, mode, device, exact)

    if samples is None:
        return count(cfg, shortest(family, cfg))
    return counted(family, cfg, samples, count)


def _counted(row: Row, cfg: RunConfig, recording: Recording, mode: Mode, device: str, exact: bool) -> Account:
    family = family_named(row.family)
    inside = tensors(mode)
    if not is_full(cfg.memory):
        return _placed(row, cfg, recording, inside, mode, torch.device(device), exact)
    if mode == "real" and device == "cpu":  # elsewhere zeros, as large as the published weights
        modules = Modules(**_random(row, cfg), device=torch.device("cpu"))
    else:
        modules = counted_modules(row, cfg, inside, device)
    weights = {part: tensor_bytes(getattr(modules, part)) for part in ("dit", "text", "vae", "audio")}
    if isinstance(modules.image, nn.Module):
        weights["image"] = tensor_bytes(modules.image)
    plan = family.plan(recording.samples, cfg)
    with outside(mode):
        assert cfg.sampling.shift is not None
        sigmas = family.sigmas(recording.steps, cfg.sampling.shift).tolist()
    with inside, torch.no_grad(), LiveBytes() as live:
        for part in PARTS:
            if isinstance(network := getattr(modules, part), nn.Module):
                live.track(network, name=weights_of(part))
        phases = Phases(live)
        with phases("load"):
            pass
        repeats = None if exact or mode == "real" else Repeats(live)
        for part in PARTS:
            watch(part, getattr(modules, part), phases, repeats)
        denoise = Denoiser(family, modules.dit, family.guidance(cfg), sigmas)
        inputs = inputs_of(family.takes(cfg), cfg, recording.samples)
        run_loop(denoise, modules, inputs, plan, cfg)
        phases.end()
    return Account(phases.peaks, weights, phases.parts, 0)


def _random(row: Row, cfg: RunConfig) -> dict[str, Any]:
    """The networks by their part, with numbers, in the dtypes of the run; on the CPU."""
    if cfg.model.channels:
        dit = {**row.network["dit"], "in_channels": cfg.model.channels}
        row = replace(row, network=MappingProxyType({**row.network, "dit": dit}))
    modules = build_random_modules(row)
    made: dict[str, Any] = {
        part: network for part in PARTS if (network := getattr(modules, part)) is not None
    }
    for part, network in made.items():
        own = dtypes_of(network, part, cfg)
        cast: dict[int, Tensor] = {}  # one that is held in two places stays one
        for name, held, key in slots(network):
            old = held[key]
            if old.is_floating_point() and id(old) not in cast:
                new = old.detach().to(own(name, old))
                cast[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            held[key] = cast.get(id(old), old)
        _stored(network, part, cfg)
    return made


def _placed(
    row: Row, cfg: RunConfig, recording: Recording, inside: Any, mode: Mode, device: torch.device, exact: bool
) -> Account:
    """The same with weights that wait on the host: on meta where they are only counted."""
    family: Any = family_named(row.family)
    host = HOST if mode == "real" else torch.device("meta")
    random = mode == "real" and device.type == "cpu"
    bare: Any = _random(row, cfg) if random else build_on_meta(row, cfg.model.channels)
    weights: dict[str, int] = {}
    plan = family.plan(recording.samples, cfg)
    with outside(mode):
        assert cfg.sampling.shift is not None
        sigmas = family.sigmas(recording.steps, cfg.sampling.shift).tolist()
    with inside, torch.no_grad(), LiveBytes() as live:
        phases = Phases(live)
        with phases("load"):
            pass
        repeats = None if exact or mode == "real" else Repeats(live)

        def build(part: Any, place: torch.device) -> Any:
            network = bare.pop(part, None)  # nobody else holds it
            if network is None:
                return None
            if random:
                weights[part] = tensor_bytes(network)
            elif mode == "real":
                fill(network, inside, dtypes_of(network, part, cfg), str(place))
                _stored(network, part, cfg)
                weights[part] = tensor_bytes(network)
            else:
                with outside(mode):
                    fill(network, nullcontext(), dtypes_of(network, part, cfg), "meta")
                    _stored(network, part, cfg)
                weights[part] = tensor_bytes(network)
                if place == device:
                    fill(network, nullcontext(), lambda _, old: old.dtype)
            watch(part, network, phases, repeats)
            return network

        modules = PlacedModules(PARTS, build, cfg.memory, device, silent, host)
        # When what waits has gone to the host, which is the same memory where tensors are real.
        modules.tell(lambda part, network: live.track(network, name=weights_of(part)))
        denoise = Denoiser(family, modules.later("dit"), family.guidance(cfg), sigmas)
        inputs = inputs_of(family.takes(cfg), cfg, recording.samples)
        run_loop(denoise, modules, inputs, plan, cfg)
        phases.end()
    moves = modules.moves
    waits = {WEIGHTS: moves.host_peak} if moves.host_peak else {}
    return Account(phases.peaks, weights, phases.parts, 0, moves.host_peak, moves.largest, waits)


def _sized(cfg: RunConfig) -> RunConfig:
    """A size where the image would decide: that of the clips that the model learnt from."""
    if cfg.output.width and cfg.output.height:
        return cfg
    width, height = cfg.data.width, cfg.data.height
    return replace(cfg, output=replace(cfg.output, width=width, height=height))


def run_loop(
    denoise: Denoiser, modules: Modules | PlacedModules, inputs: Inputs, plan: VideoPlan, cfg: RunConfig
) -> None:
    """The loop of a family's plan; nobody keeps its frames."""
    for block in _LOOPS[plan.kind](denoise, modules, inputs, plan, cfg):
        del block


def inputs_of(takes: str, cfg: RunConfig, samples: int) -> Inputs:
    """A black image or video of the size of the output, and silence."""
    height, width = cfg.output.height, cfg.output.width
    assert height is not None and width is not None
    image = source = None
    if takes == "image":
        image = torch.zeros(1, 3, height, width)
    else:
        frames = samples // SAMPLES_PER_FRAME + 1
        source = Source(_Black(height, width, frames), mask_tensor(mouth_mask()))
    prompt, negative = cfg.input.prompt or "", cfg.input.negative_prompt or ""
    return Inputs(image, _Silence(), samples, 0.0, 1.0, prompt, negative, 0, silent, source)
