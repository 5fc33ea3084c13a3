"""Clips of the cartoon world as sample folders, which every other command reads."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from avatarctl.atomic import atomic_write_text
from avatarctl.data.samples import PROMPT, VIDEO
from avatarctl.demo.clips import HELD_OUT, clip
from avatarctl.media import write_audio, write_clip
from avatarctl.timeline import SAMPLE_RATE

__all__ = ["write_samples"]

_PROMPT: Final = "a person is talking"


def write_samples(folder: Path, seeds: range, frames: int, audio_name: str) -> None:
    """A sample of `frames` for each seed; what is there already stays. Raises ValueError for a held-out seed,
    which nothing is ever trained on."""
    if seeds and seeds[-1] >= HELD_OUT:
        raise ValueError(f"seeds from {HELD_OUT} on are held out: {seeds[-1]}")
    for seed in seeds:
        place = folder / f"{seed:06}"
        if (place / PROMPT).is_file():  # written last
            continue
        place.mkdir(parents=True, exist_ok=True)
        drawn = clip(seed, frames)
        write_clip(place / VIDEO, iter([drawn.frames]))
        write_audio(place / audio_name, drawn.speech.audio, SAMPLE_RATE)
        atomic_write_text(place / PROMPT, f"{_PROMPT}\n")
