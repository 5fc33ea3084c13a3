"""What a family of weight files looks like: names, sizes and the parts that an adapter must hold.

A `WeightLayout` is data about one network. Readers, recognition, conversion and loading take it as
an argument, so that a new family needs a layout of its own and no new reader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from avatarctl.weights.key_map import KeyMap

__all__ = ["Bases", "OffsetRule", "Sizes", "WeightLayout"]


@dataclass(frozen=True)
class Sizes:
    """Dimensions read from tensor shapes; 0 where a file does not tell (an adapter knows little).

    layers: blocks; image_dim: width of the CLIP features of image-to-video models;
    audio_input_dim: width of one audio feature frame; vocal_dim: of one audio token; vocal_hidden_dim:
    between the two layers that project it, 0 for one layer; vocal_layers, vocal_heads, vocal_ffn: of what
    follows them.
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
    vocal_heads: int = 0
    vocal_ffn: int = 0


@dataclass(frozen=True)
class OffsetRule:
    """The audio offset of a file that does not state one; holds where all conditions hold that are given.

    offset, why: frames, and the reason for people; assumed: nothing speaks for it. channels: input channels;
    config: a field of the config or of the header and its value, None for any; file: pattern of the name of
    a weight file.
    """

    offset: int
    why: str
    assumed: bool = False
    channels: tuple[int, ...] = ()
    config: tuple[str, Any] | None = None
    file: str = ""

    def holds(self, channels: int, config: Mapping[str, Any], files: Iterable[str]) -> bool:
        """Whether every condition is met by a file of these input channels, config and file names."""
        if self.channels and channels not in self.channels:
            return False
        if self.config is not None:
            name, wanted = self.config
            if name not in config or (wanted is not None and config[name] != wanted):
                return False
        return not self.file or any(re.fullmatch(self.file, name) for name in files)


@dataclass(frozen=True)
class Bases:
    """Plain models that an adapter of a family is made for.

    title: for people; channels: input channels; sees: whether they have an image encoder; others:
    `model_type` in config.json of what has the same shapes and is something else.
    """

    title: str
    channels: tuple[int, ...]
    sees: bool
    others: tuple[str, ...]

    def allow(self, sizes: Sizes, config: Mapping[str, Any]) -> bool:
        """Whether a plain model of these sizes and config is one of them."""
        fits = sizes.in_channels in self.channels and bool(sizes.image_dim) == self.sees
        return fits and config.get("model_type") not in self.others


@dataclass(frozen=True)
class WeightLayout:
    """One network's files.

    family:   registry word of the family, or "wan" for plain base models.
    title:    for people.
    key_map:  original names <-> names of diffusers, for every tensor of the network.
    own:      patterns (of whole original names) that only this network has: they decide what a file is.
    replaced: prefixes of tensors that an adapter of this family carries whole.
    channels: input channels that this network may have.
    shapes:   sizes -> every tensor of a complete model, by original name.
    arguments: of the network's constructor -> field of `Sizes`; left out where that is 0.
    assumed:  of these arguments those that no tensor tells for sure -> their value in every published file;
              a config or our metadata may state another, by the argument's name.
    float32:  parts of original names, whole segments, that stay float32 under any dtype.
    float8:   pattern of whole original names: the matrices that `memory.base_precision fp8` stores in eight
              bits. The network's class says the same, for whoever may import it.
    supported: whether this version loads and converts such files, or only names them.
    class_name: of the network in diffusers or in avatarctl/models.
    conventions: what the published weights were made with (`avatarctl.family.Conventions`), the audio offset
                excepted, which differs from file to file. The family object says the same; asking it imports
                torch.
    offsets:  how the audio offset of a file is told, first match; none for networks without audio.
    bases:    what an adapter of this family changes, None where there are no such adapters.
    configured: whether its published scripts need config.json beside a full model too.
    repository: of the published code.
    """

    family: str
    title: str
    key_map: KeyMap
    own: tuple[str, ...]
    replaced: tuple[str, ...]
    channels: tuple[int, ...]
    shapes: Callable[[Sizes], Mapping[str, tuple[int, ...]]]
    arguments: Mapping[str, str] = field(default_factory=dict)
    assumed: Mapping[str, int] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    float8: str = r"(?!)"
    supported: bool = True
    class_name: str = "WanTransformer3DModel"
    conventions: Mapping[str, float] = field(default_factory=dict)
    offsets: tuple[OffsetRule, ...] = ()
    bases: Bases | None = None
    configured: bool = False
    repository: str = "https://github.com/Wan-Video/Wan2.1"

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
