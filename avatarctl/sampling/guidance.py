"""Guidance: which branches a step runs, and how their predictions are summed.

A rule gives the weight of each branch by name; a family chooses its rules. The guided velocity is the
weighted sum; the weights sum to 1 and a branch of weight zero is not run. t and a are the guidance scales of
text and audio (a = t unless given).

    text first    v_negative + t (v_silent - v_negative) + a (v_full - v_silent)
                  full: prompt and audio; silent: prompt, no audio; negative: negative prompt, no audio
    audio first   v_silent_negative + a (v_negative - v_silent_negative) + t (v_full - v_negative)
                  full: prompt and audio; negative: negative prompt, audio; silent_negative: neither
    native        v_full + (a - 1) (v_full - v_silent) + (t - 1) (v_full - v_unpaired)
                  full: prompt and audio; silent: prompt, silence in place of the audio; unpaired: prompt,
                  nothing from audio and latents together. Our reading of arXiv 2508.08248, unverified
                  against unpublished code: what the audio adapter refines is a second predicted variable
                  that steers the sampling of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from avatarctl.family import Guidance

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["audio_first", "combine", "native", "text_first"]


def text_first(guidance: Guidance) -> dict[str, float]:
    """Weights of classifier-free guidance by the prompt, then by the audio, in running order."""
    text, audio = _scales(guidance)
    return _weighted(full=audio, silent=text - audio, negative=1 - text)


def audio_first(guidance: Guidance) -> dict[str, float]:
    """Weights of classifier-free guidance by the audio, then by the prompt, in running order."""
    text, audio = _scales(guidance)
    return _weighted(full=text, negative=audio - text, silent_negative=1 - audio)


def native(guidance: Guidance) -> dict[str, float]:
    """Weights of audio native guidance, in running order."""
    text, audio = _scales(guidance)
    return _weighted(full=text + audio - 1, silent=1 - audio, unpaired=1 - text)


def combine(velocities: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The guided velocity: the weighted sum of one velocity per weight, all of one shape."""
    first, *others = weights.items()
    guided = first[1] * velocities[first[0]]
    for name, weight in others:
        guided = guided + weight * velocities[name]
    return guided


def _scales(guidance: Guidance) -> tuple[float, float]:
    return guidance.text, guidance.text if guidance.audio is None else guidance.audio


def _weighted(**weights: float) -> dict[str, float]:
    return {name: weight for name, weight in weights.items() if weight != 0}
