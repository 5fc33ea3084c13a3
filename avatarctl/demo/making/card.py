"""The card of the built-in models: what they are, how they were made, and what each part became."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import torch

from avatarctl.demo.making.recipe import PARTS, Recipe

__all__ = ["card_text"]

_FILES: Final = (
    ("`dit_i2v.safetensors`, `dit_v2v.safetensors`", "the avatar transformers, 33 and 49 channels, under "
     "their original names", "bfloat16; float32 what the toolkit computes in float32, and what takes audio"),
    ("`vae.safetensors`, `config.json`", "a Wan VAE, under the names of diffusers; sizes, mean and "
     "deviation of its latents", "bfloat16"),
    ("`audio.safetensors`", "a wav2vec 2.0 encoder, trained to tell 13 symbols apart, then frozen",
     "float32"),
    ("`text.safetensors`", "a UMT5 encoder, random and never trained; it reads bytes", "float32"),
    ("`syncnet.safetensors`", "the judge of the sync loss, a small StableSyncNet", "bfloat16"),
)  # fmt: skip

_TOP: Final = """\
# Weights of the cartoon world (64 x 64, 25 frames a second)

Trained on faces and voices that were drawn and synthesised from seeds (`avatarctl/demo`). No photograph, no
recording and no published weight went in. They know these faces and nothing else.

{files}

They come with the licence of the toolkit.

## How they were made

`avatarctl demo build --out DIR --seed {seed}`, torch {version}. Faces and voices of seeds below 1 000 000;
those from there on are held out.

"""


def card_text(seed: int, recipe: Recipe, facts: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """facts: of each part, digests: SHA-256 of each file, by name."""
    files = _table(("file", "what it is", "stored as"), _FILES)
    top = _TOP.format(files=files, seed=seed, version=torch.__version__)
    told = [(part, ", ".join(f"{name} {value}" for name, value in facts[part].items())) for part in PARTS]
    asked = [(name.replace("_", " "), _told(value)) for name, value in asdict(recipe).items()]
    hashes = [(f"`{name}`", f"`{digest}`") for name, digest in digests.items()]
    return (
        f"{top}{_table(('part', 'what came out'), told)}\n\n{_table(('recipe', ''), asked)}\n\n## SHA-256\n\n"
        f"{_table(('file', 'digest'), hashes)}\n\nScores of the whole, and what is still wrong with them: "
        "docs/benchmarks.md of the toolkit.\n"
    )


def _told(value: Any) -> str:
    """A number, or the pairs of frames and clips that were watched."""
    return str(value) if isinstance(value, int) else ", ".join(f"{n} of {frames}" for frames, n in value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
