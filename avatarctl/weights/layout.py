"""What a family of weight files looks like: names, sizes and the parts that an adapter must hold.

A `WeightLayout` is data about one network. Readers, recognition, conversion and loading take it as
an argument, so that a new family needs a layout of its own and no new reader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from avatarctl.weights.key_map import KeyMap

__all__ = ["Sizes", "WeightLayout"]


@dataclass(frozen=True)
class Sizes:
    """Dimensions read from tensor shapes; 0 where a file does not tell (an adapter knows little).

    layers: blocks; image_dim: width of the CLIP features of image-to-video models;
    audio_input_dim: width of one audio feature frame; vocal_dim: of one sound token; vocal_hidden_dim:
    between the two layers that project it, 0 for one layer; vocal_layers, vocal_ffn: of what follows them.
    """

    width: int = 0
    ffn: int = 0
    layers: int = 0
    in_channels: int = 0
    out_channels: int = 0
    text_dim: int = 0
    freq_dim: int = 0
    image_dim: int = 0
    audio_hidden_size: int = 0
    audio_input_dim: int = 0
    vocal_dim: int = 0
    vocal_hidden_dim: int = 0
    vocal_layers: int = 0
    vocal_ffn: int = 0


@dataclass(frozen=True)
class WeightLayout:
    """One network's files.

    family:   registry word of the family ("omniavatar"), or "wan" for plain base models.
    title:    for people.
    key_map:  original names <-> names of diffusers, for every tensor of the network.
    own:      patterns (of whole original names) that only this network has: they decide what a file is.
    replaced: prefixes of tensors that an adapter of this family carries whole.
    channels: input channels that this network may have.
    shapes:   sizes -> every tensor of a complete model, by original name.
    arguments: of the network's constructor -> field of `Sizes`; left out where that is 0.
    float32:  parts of original names, whole segments, that stay float32 under any dtype.
    supported: whether this version loads and converts such files, or only names them.
    """

    family: str
    title: str
    key_map: KeyMap
    own: tuple[str, ...]
    replaced: tuple[str, ...]
    channels: tuple[int, ...]
    shapes: Callable[[Sizes], Mapping[str, tuple[int, ...]]]
    arguments: Mapping[str, str] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    supported: bool = True

    @cached_property
    def _own(self) -> re.Pattern[str]:
        return re.compile("|".join(f"(?:{pattern})" for pattern in self.own) or r"(?!)")

    def owns(self, name: str) -> bool:
        """Whether only this family has a tensor of this original name."""
        return self._own.fullmatch(name) is not None

    def is_replaced(self, name: str) -> bool:
        """Whether an adapter carries this tensor whole."""
        return name.startswith(self.replaced) if self.replaced else False

    def constructor(self, sizes: Sizes) -> dict[str, int]:
        """Arguments of the network's constructor, as far as sizes tell them."""
        return {name: size for name, field in self.arguments.items() if (size := getattr(sizes, field))}

    def stays_float32(self, name: str) -> bool:
        """Whether a float32 tensor of this original name keeps its precision under any `--dtype`."""
        return any(f".{part}." in f".{name}." for part in self.float32)
