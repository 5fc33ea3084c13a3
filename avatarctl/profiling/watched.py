"""Every entrance of a run's networks as a phase, whoever runs them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

from avatarctl.profiling.extend import lists_of, signature
from avatarctl.profiling.phases import CACHES, FRAMES, Phases
from avatarctl.profiling.repeats import Repeats

__all__ = ["watch"]

_DIT_PHASES: Final = {"prepare": "condition", "denoise": "step", "raw": "step"}
_ENTRANCES: Final = {
    "text": ("encode",),
    "vae": ("encode",),
    "audio": ("features", "tokens"),
    "image": ("encode",),
}


def watch(part: str, network: Any, phases: Phases, repeats: Repeats | None = None) -> None:
    """Hangs phases on the entrances of a network; nothing for a part that the model has not. repeats: runs
    what is like a call before once."""

    def of_dit(*_: Any, mode: str = "raw", **__: Any) -> str:
        return _DIT_PHASES[mode]

    if network is None:
        return

    def once(method: str) -> Callable[..., Any]:
        function = _weakly(network, method)
        # Of the codec single latent frames are alike, see `_by_frame`.
        return function if repeats is None or part == "vae" else repeats.wrapped(function)

    if repeats is not None and part != "vae":
        _by_block(network, repeats)
    if part == "dit":
        network.forward = phases.wrapped(once("forward"), of_dit)
        return
    phase = "image" if part in ("vae", "image") else part
    for method in _ENTRANCES[part]:
        setattr(network, method, phases.wrapped(once(method), phase))
    if part == "vae":
        _by_frame(network.vae, phases, repeats)
        fresh = _weakly(network, "decoder")
        network.decoder = lambda: _WatchedDecoder(fresh(), phases)


def _by_frame(codec: Any, phases: Phases, repeats: Repeats | None) -> None:
    """The caches that one latent frame leaves for the next are told apart."""
    for network in (codec.encoder, codec.decoder):
        forward = _weakly(network, "forward")
        network.forward = _with_caches(forward if repeats is None else repeats.wrapped(forward), phases)


def _with_caches(forward: Callable[..., Any], phases: Phases) -> Callable[..., Any]:
    def run(*inputs: Any, feat_cache: Any = None, **more: Any) -> Any:
        frames = forward(*inputs, feat_cache=feat_cache, **more)
        if feat_cache is not None:
            phases.live.assign([each for each in feat_cache if isinstance(each, Tensor)], CACHES)
        return frames

    return run


def _by_block(network: nn.Module, repeats: Repeats) -> None:
    """Modules of a list that are alike do the same with the same."""
    known: dict[Any, dict[Any, Any]] = {}
    for modules in lists_of(network):
        for module in modules:
            done = known.setdefault(signature(module), {})
            module.forward = repeats.wrapped(_weakly(module, "forward"), done)


def _weakly(network: nn.Module, method: str) -> Callable[..., Any]:
    """A method that does not keep its network alive: it is hung on the network itself, and what holds itself
    lives until it is collected."""
    kind, held = type(network), weakref.ref(network)
    return lambda *inputs, **more: getattr(kind, method)(held(), *inputs, **more)


@dataclass
class _WatchedDecoder:
    """In front of a decoder, not on it: an object that holds its own method lives until it is collected."""

    decoder: Any
    phases: Phases

    def push(self, latents: Tensor) -> Tensor:
        with self.phases("decode"):
            pixels: Tensor = self.decoder.push(latents)
            self.phases.live.assign(pixels, FRAMES)
            return pixels
