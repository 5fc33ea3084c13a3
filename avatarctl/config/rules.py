"""Conditions on single values that a range cannot express."""

from __future__ import annotations

import re
from typing import Final

from avatarctl.config.keys import Rule

__all__ = [
    "DEVICE",
    "FACE",
    "FACES",
    "FACE_WORDS",
    "FRAMES_4K1",
    "INTERVAL",
    "MULTIPLE_OF_16",
    "OVERLAP",
    "PARTS",
    "PATH",
    "PREFIXES",
    "SHARD",
    "WEIGHT_PARTS",
]

WEIGHT_PARTS: Final = (
    "dit", "vae", "text", "clip", "audio", "syncnet", "lpips_vgg", "videomae", "syncnet_v2", "yunet", "mdx",
)  # fmt: skip
"""Names that `model.weights` can give a path to."""


def _is_path(text: str) -> bool:
    return bool(text.strip()) and "\0" not in text


def _is_shard(text: str) -> bool:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    return match is not None and int(match[1]) < int(match[2])


def _is_face(text: str) -> bool:
    if text in {"none", "largest"} or re.fullmatch(r"\d{1,3}", text, re.ASCII):
        return True
    box = re.fullmatch(r"(\d{1,5}),(\d{1,5}),(\d{1,5}),(\d{1,5})", text, re.ASCII)
    return box is not None and int(box[3]) > 0 and int(box[4]) > 0


PATH: Final = Rule("a path", _is_path)
FACE_WORDS: Final = ("auto", "all", "none")
FACES: Final = Rule("auto, all, none, or the path of a table", _is_path)
FRAMES_4K1: Final = Rule("of the form 4k + 1", lambda frames: frames % 4 == 1)
OVERLAP: Final = Rule("of the form 4n + 1 (or 0, fused only)", lambda frames: frames == 0 or frames % 4 == 1)
MULTIPLE_OF_16: Final = Rule("that is a multiple of 16", lambda pixels: pixels % 16 == 0)
PREFIXES: Final = Rule(
    "each 0 or of the form 4n + 1", lambda frames: all(f == 0 or f % 4 == 1 for f in frames)
)
INTERVAL: Final = Rule("first below second", lambda pair: pair[0] < pair[1])
SHARD: Final = Rule("i/n with i from 0 to n - 1, such as 0/4", _is_shard)
FACE: Final = Rule("none, largest, the index of a face, or x,y,w,h", _is_face)
DEVICE: Final = Rule(
    "auto, cpu, cuda or cuda:N", lambda text: bool(re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", text, re.ASCII))
)
PARTS: Final = Rule(
    "part names out of " + ", ".join(WEIGHT_PARTS) + ", each with a path",
    lambda weights: all(part in WEIGHT_PARTS and _is_path(path) for part, path in weights.items()),
)
