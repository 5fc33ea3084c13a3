"""Classifier-free guidance over text and sound (spec/omniavatar.md f.5).

Three predictions: `full` hears the sound and reads the prompt, `silent` reads the prompt, `negative`
reads the negative prompt in silence.

    v = v_negative + text (v_silent - v_negative) + audio (v_full - v_silent)

is a weighted sum. A branch of weight zero is not run: audio = text drops `silent`, text = 1 drops
`negative`, both leave one pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from avatarctl.family import Guidance

__all__ = ["branch_weights", "combine"]


def branch_weights(guidance: Guidance) -> dict[str, float]:
    """Weight of each branch that has one, in the order in which they run; the weights sum to 1."""
    text = guidance.text
    audio = text if guidance.audio is None else guidance.audio
    weights = {"full": audio, "silent": text - audio, "negative": 1 - text}
    return {name: weight for name, weight in weights.items() if weight != 0}


def combine(velocities: Mapping[str, Tensor], guidance: Guidance) -> Tensor:
    """The guided velocity; velocities of the branches that `branch_weights` names, any one shape."""
    first, *others = branch_weights(guidance).items()
    guided = first[1] * velocities[first[0]]
    for name, weight in others:
        guided = guided + weight * velocities[name]
    return guided
