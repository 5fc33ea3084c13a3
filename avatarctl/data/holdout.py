"""Which samples of a data set are kept for validation: whole clips, chosen by their names alone.

Samples that were cut from one video show the same person in the same light, so they stay on one side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from avatarctl.data.samples import Sample
from avatarctl.data.windows import sample_source
from avatarctl.errors import UsageError
from avatarctl.rng import stable_hash

__all__ = ["clip_of", "held_out", "trained_on"]

_HASHES: Final = 1 << 63


def clip_of(sample: Sample) -> str:
    """The video that a sample was cut from; its own name where nothing is known of one."""
    source = sample_source(sample.folder)
    return sample.name if source is None else source[0]


def held_out(samples: Sequence[Sample], share: float) -> tuple[Sample, ...]:
    """The samples of about `share` of the clips, at least of one clip; none where `share` is 0.

    A clip is chosen by a hash of its name, so a set that grows keeps its choice and nothing that was held
    out is ever trained on, but where a small set held out a single clip.

    Raises UsageError where nothing would be left to train on.
    """
    if not share or not samples:
        return ()
    clips = {sample.name: clip_of(sample) for sample in samples}
    places = {clip: stable_hash("held out", clip) / _HASHES for clip in clips.values()}
    chosen = {clip for clip, place in places.items() if place < share}
    chosen = chosen or {min(places, key=lambda clip: places[clip])}
    if len(chosen) == len(places):
        count = "1 clip" if len(places) == 1 else f"{len(places)} clips"
        raise UsageError(
            f"would keep all of the data set, {count}, and leave nothing to train on",
            where="validation.holdout",
            fix="a smaller share, more clips, or samples of their own in validation.sets",
        )
    return tuple(sample for sample in samples if clips[sample.name] in chosen)


def trained_on(samples: Sequence[Sample], share: float) -> tuple[Sample, ...]:
    """The others. Raises what `held_out` raises."""
    held = {sample.name for sample in held_out(samples, share)}
    return tuple(sample for sample in samples if sample.name not in held)
