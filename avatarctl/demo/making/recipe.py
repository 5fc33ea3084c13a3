"""How much of everything goes into the built-in models, and where their parts lie while they are made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal

__all__ = ["FULL", "NEEDS", "PARTS", "SHORT", "Part", "Recipe"]

Part = Literal["vae", "audio", "clips", "i2v", "v2v", "judge"]
PARTS: Final[tuple[Part, ...]] = ("vae", "audio", "clips", "i2v", "v2v", "judge")
"""In the order in which they are made."""

NEEDS: Final[Mapping[Part, tuple[Part, ...]]] = {
    "vae": (), "audio": (), "clips": ("vae", "audio"), "i2v": ("clips",), "v2v": ("clips",), "judge": (),
}  # fmt: skip
_VERSION: Final = 1
"""Of how the parts are made; one more lets nothing of before go on."""


@dataclass(frozen=True)
class Recipe:
    """Steps of each part, clips that the transformers learn from and pixel frames of one; watched: (frames,
    clips) that the VAE is scored on while it learns; statistics: seeds that moments are taken over."""

    vae_steps: int
    audio_steps: int
    clips: int
    frames: int
    transformer_steps: int
    batch_size: int
    judge_steps: int
    score_every: int
    watched: tuple[tuple[int, int], ...]
    statistics: int

    def made_by(self, part: Part, seed: int) -> str:
        """Names what a part depends on: another one does not go on where this one stopped."""
        values = asdict(self)
        own = {name: value for name, value in values.items() if name.startswith(part)}
        if part in ("i2v", "v2v"):
            own = {name: values[name] for name in ("transformer_steps", "batch_size")}
        elif part == "clips":
            own["frames"] = self.frames
        needed = [self.made_by(each, seed) for each in NEEDS[part]]
        text = json.dumps([_VERSION, part, seed, own, needed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


FULL: Final = Recipe(
    vae_steps=3000, audio_steps=600, clips=2400, frames=33, transformer_steps=2000, batch_size=16,
    judge_steps=1500, score_every=250, watched=((33, 12), (81, 4)), statistics=200,
)  # fmt: skip
"""What is shipped; two hours and a half on two idle cores."""

SHORT: Final = Recipe(
    vae_steps=4, audio_steps=4, clips=4, frames=9, transformer_steps=4, batch_size=2, judge_steps=4,
    score_every=2, watched=((5, 1),), statistics=2,
)  # fmt: skip
"""The same road in seconds, for whoever wants to see that it goes on where it was stopped. It teaches
nothing."""
