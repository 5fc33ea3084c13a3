"""Which published file has these names and shapes: a fingerprint of the header, no data is read.

The recipe is the one by which the published scripts tell files apart (spec/omniavatar.md i): every tensor
gives two words, its name and "name:sizes joined by _"; the words are sorted, joined by "," and hashed with
MD5. A fine-tune that keeps all shapes has the hash of its base: the hash names a layout, not its values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Final

from avatarctl.weights.weight_file import WeightFile

__all__ = ["PUBLISHED", "hash_of", "published_hash"]

PUBLISHED: Final[Mapping[str, str]] = {
    # Stated by spec/omniavatar.md i.
    "9269f8db9040a9d860eaca435be61814": "Wan2.1-T2V-1.3B",
    "aafcfd9672c3a2456dc46e1cb6e52c70": "Wan2.1-T2V-14B",
    "6bfcfb3b342cb286ce886889d519a77e": "Wan2.1-I2V-14B",
    "cb104773c6c2cb6df4f9529ad5c60d0b": "Wan2.1-T2V-14B in diffusers names",
    "9c8818c2cbea55eca56c7b447df170da": "models_t5_umt5-xxl-enc-bf16.pth (UMT5-XXL encoder)",
    "ccc42284ea13e1ad04693284c7a09be6": "Wan2.1_VAE.pth",
    "1378ea763357eea97acdef78e65d6d96": "Wan2.1_VAE.pth",
    # Computed from the published sizes with the same tables of names.
    "6d6ccde6845b95ad9114ab993d917893": "Wan2.1-Fun-1.3B-InP",
    "6c8b87e4702a5adaaf05392c3eb6e0cb": "StableAvatar-1.3B, transformer3d-square.pt and its twin -rec-vec.pt",
    "5b013604280dd715f8457c6ed6d6a626": "Wan2.2-I2V-A14B, one of its two experts",
    "1f5ab7703c6fc803fdded85ff040c316": "Wan2.2-TI2V-5B",
}
"""Hash -> the published file whose names and shapes it stands for."""


def published_hash(shapes: Mapping[str, Iterable[int]]) -> str:
    """MD5 of names and shapes, as 32 hexadecimal digits."""
    words = []
    for name, shape in shapes.items():
        words += [name, f"{name}:{'_'.join(map(str, shape))}"]
    # Names are strangers' text: a lone surrogate is hashed as it is, not refused.
    text = ",".join(sorted(words)).encode("utf-8", "surrogatepass")
    return hashlib.md5(text, usedforsecurity=False).hexdigest()


def hash_of(weight_file: WeightFile) -> str | None:
    """The hash of a file's names and shapes, without a wrapper's prefix; None for adapters, which no program
    tells apart by it, and where tensors have no place."""
    if weight_file.kind == "adapter" or weight_file.unknown:
        return None
    names = {name: name for name in weight_file.tensors}
    if weight_file.naming == "diffusers":
        names = {name: weight_file.layout.key_map.to_internal(name) or name for name in names}
    return published_hash({names[name]: tensor.info.shape for name, tensor in weight_file.tensors.items()})
