"""A weight file as what it means: tensors under original names, LoRA pairs, what its config says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from avatarctl.files.state_dict import Wrapper
from avatarctl.files.tensors import StoredTensor
from avatarctl.weights.layout import Sizes, WeightLayout

__all__ = ["LoraPair", "WeightFile"]

Kind = Literal["model", "adapter", "component"]
Naming = Literal["original", "diffusers", "peft", "comfyui", "kohya"]


@dataclass(frozen=True)
class LoraPair:
    """One target of a LoRA: the weight gains `scale * up @ down`.

    down: [rank, inputs, ...] (lora_A, lora_down), the kernel of a convolution behind; up: [outputs, rank]
    (lora_B, lora_up), ones behind or not;
    alpha: what the file or its config states, else None; over `rank` it is the scale.
    stated_alpha: what is stated, where `alpha` is that times the root of the rank (rank-stabilised).
    """

    down: StoredTensor
    up: StoredTensor
    alpha: float | None = None
    stated_alpha: float | None = None

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.down.info.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it changes: outputs, inputs and the kernel of a convolution."""
        return self.up.info.shape[0], *self.down.info.shape[1:]


@dataclass(frozen=True)
class WeightFile:
    """What one file or folder holds, under original names.

    path:       what the user named.
    kind:       "model": every tensor of a network; "adapter": changes to one; "component": text encoder,
                VAE and the like, recognised but not converted.
    naming:     how the names were written in the file.
    tensors:    whole tensors, by original name ("blocks.0.norm3.weight"); in an adapter those that
                replace the base's.
    lora_pairs: LoRA pairs by original module ("blocks.0.self_attn.q").
    differences: tensors to be added to the base's (`.diff`, `.diff_b`), by original tensor name.
    scale:      factor of every LoRA pair without an alpha of its own, already divided by rank:
                0.5 by published ratio, else 1.
    scale_rule: which rule gave `scale`, for people ("alpha 64 / rank 128 from config.json").
    heads:      attention heads (config, metadata, or width / 128), 0 where nothing tells;
    heads_stated: whether the config or the metadata says so.
    audio_offset: 0 or 1 (frames), None where the network has no audio or nothing tells;
    audio_offset_rule: where it comes from, for people; audio_offset_assumed: nothing states it, so that it
                is not written into other files as if something did.
    files:      the weight files that were read, in order.
    format:     of these files: "safetensors", "zip" or "legacy" (pickles); empty for what no file holds.
    names:      every name as in the files, in their order.
    config:     contents of config.json or adapter_config.json, else empty.
    metadata:   of the safetensors header.
    unknown:    names, as in the file, that have no place in the layout.
    missing:    original names that a complete file of its kind would hold and this one lacks.
    wrappers:   dictionaries around the tensors of a pickle, outermost first.
    notes:      what was done to read it, one line each (prefixes removed, wrappers opened).
    """

    path: Path
    kind: Kind
    naming: Naming
    layout: WeightLayout
    variant: str
    sizes: Sizes
    tensors: Mapping[str, StoredTensor]
    lora_pairs: Mapping[str, LoraPair] = field(default_factory=dict)
    differences: Mapping[str, StoredTensor] = field(default_factory=dict)
    scale: float = 1.0
    scale_rule: str = ""
    heads: int = 0
    heads_stated: bool = False
    audio_offset: int | None = None
    audio_offset_rule: str = ""
    audio_offset_assumed: bool = False
    files: tuple[Path, ...] = ()
    format: str = ""
    names: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    wrappers: tuple[Wrapper, ...] = ()
    notes: tuple[str, ...] = ()

    def scale_of(self, pair: LoraPair) -> float:
        """Factor of one pair: its own alpha over its rank, else the file's rule."""
        return self.scale if pair.alpha is None else pair.alpha / pair.rank
