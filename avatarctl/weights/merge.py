"""An adapter merged into a full model, tensor by tensor and without reading any.

W' = W + strength * scale * up @ down in float32, then in the dtype of W; differences are added with the same
strength; whole tensors (patch embedding, audio) replace those of the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from avatarctl.errors import UnusableWeights, printable
from avatarctl.files.source import MAX_CONFIG
from avatarctl.files.strict_json import parse_json, read_object, reading
from avatarctl.files.tensors import StoredTensor
from avatarctl.files.writer import SOURCES_KEY
from avatarctl.weights.layout import Sizes, WeightLayout
from avatarctl.weights.metadata import config_of, mismatch, stated_network
from avatarctl.weights.recognise import heads_of
from avatarctl.weights.sizes import variant_of
from avatarctl.weights.transforms import cast, plus_difference, plus_lora
from avatarctl.weights.weight_file import WeightFile

__all__ = ["merge_adapter", "refuse_other_conventions", "with_base_config"]

PATCH: Final = "patch_embedding.weight"
_NARROW: Final = ("BF16", "F16")
_STALE: Final = (
    "ss_network_dim", "ss_network_alpha", "lora_adapter_metadata", "modelspec.title", "avatarctl.config",
)  # fmt: skip
"""Metadata of the two that is untrue of the sum."""


def merge_adapter(
    base: WeightFile, adapter: WeightFile, strength: float = 1.0, dtype: str | None = None
) -> WeightFile:
    """The full model that `adapter` makes of `base`; it has the adapter's input channels.

    strength: factor of everything that is added. dtype: of the sums, "F32" for who casts them further; None
    is the dtype that each tensor of the base has.

    Raises UnusableWeights, naming both sides, where the two do not belong together.
    """
    _check_kinds(base, adapter)
    layout = _common_layout(base, adapter)
    refuse_other_conventions(adapter, base)
    tensors = dict(base.tensors)
    for name, tensor in adapter.tensors.items():
        _check_replaced(base, adapter, name, tensor)
        tensors[name] = tensor
    for name, added in _sums(base, adapter, tensors, strength, dtype).items():
        target = dtype or tensors[name].info.dtype
        tensors[name] = added if added.info.dtype == target else cast(added, target)
    sizes = replace(
        base.sizes,
        in_channels=tensors[PATCH].info.shape[1],
        audio_hidden_size=adapter.sizes.audio_hidden_size or base.sizes.audio_hidden_size,
        audio_input_dim=adapter.sizes.audio_input_dim or base.sizes.audio_input_dim,
    )
    _check_complete(base, adapter, layout, sizes, tensors)
    own = adapter.layout is layout
    network = _network(base, adapter)
    stated = {layout.arguments[name]: int(network[name]) for name in layout.assumed if name in network}
    return replace(
        base,
        path=adapter.path,
        naming="original",
        layout=layout,
        variant=variant_of("model", layout, sizes),
        sizes=replace(sizes, **stated),
        tensors=tensors,
        heads=int(network.get("num_attention_heads", base.heads or adapter.heads)),
        heads_stated="num_attention_heads" in network,
        audio_offset=adapter.audio_offset if own else base.audio_offset,
        audio_offset_rule=adapter.audio_offset_rule if own else base.audio_offset_rule,
        audio_offset_assumed=adapter.audio_offset_assumed if own else base.audio_offset_assumed,
        files=(*adapter.files, *base.files),
        config=_config(base, adapter),
        metadata=_metadata(base, adapter, network),
        notes=(*base.notes, *adapter.notes),
    )


def with_base_config(held: WeightFile, path: Path) -> WeightFile:
    """A full model with the heads and eps that the config.json of its base states.

    A config of another width, or of no transformer, is another model's. Raises UnusableWeights, naming both,
    where the file states something else.
    """
    config = read_object(path, MAX_CONFIG)
    heads, of_head = (config.get(name) for name in ("num_attention_heads", "attention_head_dim"))
    of_diffusers = heads * of_head if isinstance(heads, int) and isinstance(of_head, int) else 0
    if config.get("dim", of_diffusers) != held.sizes.width:
        return held
    base = replace(held, path=path, config=config, metadata={})
    with reading(path):
        heads, stated = heads_of(base, held.sizes)
    network = _network(replace(base, heads=heads, heads_stated=stated), held)
    metadata = {**held.metadata, "avatarctl.network": json.dumps(network, allow_nan=False)}
    heads = int(network.get("num_attention_heads", held.heads))
    return replace(held, heads=heads, heads_stated="num_attention_heads" in network, metadata=metadata)


def _sums(
    base: WeightFile,
    adapter: WeightFile,
    tensors: Mapping[str, StoredTensor],
    strength: float,
    dtype: str | None,
) -> dict[str, StoredTensor]:
    """The weights that change, float32 where they still have to be rounded."""
    sums: dict[str, StoredTensor] = {}
    for module, pair in adapter.lora_pairs.items():
        name = f"{module}.weight"
        _check_shape(base, adapter, name, pair.shape)
        held = tensors[name]
        if held.info.dtype.startswith("F8") and dtype is None:
            raise UnusableWeights(
                f"{name[:100]} is float8, which would round a small change away",
                where=base.path,
                fix="--dtype bfloat16 writes the sum as bfloat16",
            )
        if dtype or (name in adapter.differences and held.info.dtype in _NARROW):
            held = cast(held, "F32")
        sums[name] = plus_lora(held, pair, strength * adapter.scale_of(pair))
    for name, difference in adapter.differences.items():
        _check_shape(base, adapter, name, difference.info.shape)
        held = tensors[name] if dtype is None else cast(tensors[name], "F32")
        sums[name] = plus_difference(sums.get(name, held), difference, strength)
    return sums


def refuse_other_conventions(one: WeightFile, base: WeightFile) -> None:
    """Raise UnusableWeights where two files were made with different conventions: their sum would be silent
    damage."""
    if different := mismatch(one, base):
        raise UnusableWeights(
            f"was made with another convention than the base {base.path}: {different}", where=one.path
        )


def _check_kinds(base: WeightFile, adapter: WeightFile) -> None:
    if adapter.kind != "adapter":
        raise UnusableWeights(f"is no adapter but {adapter.variant}: nothing to merge", where=adapter.path)
    if base.kind != "model":
        raise UnusableWeights(f"is no full model but {base.variant}", where=base.path)


def _common_layout(base: WeightFile, adapter: WeightFile) -> WeightLayout:
    """The layout of the result: of two, the one that is not plain Wan."""
    if adapter.layout is base.layout or adapter.layout.family == "wan":
        return base.layout
    if base.layout.family == "wan":
        _check_plain_base(base, adapter)
        return adapter.layout
    raise UnusableWeights(
        f"is {adapter.variant}, and the base {base.path} is {base.variant}", where=adapter.path
    )


def _check_plain_base(base: WeightFile, adapter: WeightFile) -> None:
    """Every plain model has the same blocks, so that the sum with another would be complete and wrong."""
    bases = adapter.layout.bases
    if bases is not None and bases.allow(base.sizes, base.config):
        return
    stated = base.config.get("model_type")
    says = f', and its config says model_type "{stated}"' if bases and stated in bases.others else ""
    made_for = f"made for a {bases.title} model" if bases else "which is an adapter of a full model alone"
    raise UnusableWeights(
        f"is {adapter.variant}, {made_for}; the base {base.path} is {base.variant}{says}",
        where=adapter.path,
    )


def _check_shape(base: WeightFile, adapter: WeightFile, name: str, shape: tuple[int, ...]) -> None:
    held = base.tensors.get(name)
    if held is None:
        raise UnusableWeights(
            f"changes {name[:100]}, which the base {base.path} lacks: {adapter.variant}, {base.variant}",
            where=adapter.path,
        )
    if held.info.shape != shape:
        raise UnusableWeights(
            f"changes {name[:100]} as {list(shape)}, and in the base {base.path} it is "
            f"{list(held.info.shape)}: {adapter.variant}, {base.variant}",
            where=adapter.path,
        )


def _check_replaced(base: WeightFile, adapter: WeightFile, name: str, tensor: StoredTensor) -> None:
    """Audio modules are new to a plain base, and a patch embedding may have other channels."""
    held = base.tensors.get(name)
    if held is None:
        return
    ours, theirs = tensor.info.shape, held.info.shape
    if name == PATCH and len(ours) == len(theirs):
        if ours[1] < theirs[1]:
            raise UnusableWeights(
                f"has {ours[1]} input channels, and the base {base.path} has {theirs[1]}: some would be lost "
                f"({adapter.variant}, {base.variant})",
                where=adapter.path,
                fix=f"widen the adapter first: convert-ckpt --channels {theirs[1]}",
            )
        ours, theirs = (ours[0], *ours[2:]), (theirs[0], *theirs[2:])
    if ours != theirs:
        _check_shape(base, adapter, name, tensor.info.shape)


def _check_complete(
    base: WeightFile,
    adapter: WeightFile,
    layout: WeightLayout,
    sizes: Sizes,
    tensors: Mapping[str, StoredTensor],
) -> None:
    """The sum is a complete network of its layout: neither side has tensors for another number of layers."""
    expected = layout.shapes(sizes)
    wrong = [name for name in expected if name not in tensors or tensors[name].info.shape != expected[name]]
    wrong += [name for name in tensors if name not in expected]
    if wrong:
        raise UnusableWeights(
            f"{adapter.variant} does not make a complete network of the base {base.path} ({base.variant}): "
            f"{len(wrong)} tensors do not fit, first {wrong[0][:100]}",
            where=adapter.path,
        )


def _config(base: WeightFile, adapter: WeightFile) -> Mapping[str, Any]:
    """An avatar's configuration is that of its adapter, which was trained last; on an avatar, what this one
    leaves open is the base's word. peft's says nothing of an avatar."""
    ours, theirs = config_of(adapter), config_of(base)
    if adapter.layout.family == "wan":
        return theirs
    if adapter.layout is not base.layout:
        return ours
    return theirs if "peft_type" in ours else {**theirs, **ours}


def _network(base: WeightFile, adapter: WeightFile) -> dict[str, float]:
    """What either side states that no shape tells. Raises UnusableWeights where they differ."""
    ours, theirs = stated_network(adapter), stated_network(base)
    for name in ours:
        if name in theirs and ours[name] != theirs[name] and name != "attention_head_dim":  # said by heads
            raise UnusableWeights(
                f"was made for {name} {ours[name]:g}, and the base {base.path} has {theirs[name]:g}",
                where=adapter.path,
                fix="take both from one release, or correct the one that is wrong",
            )
    heads = ours.get("num_attention_heads")
    if heads and base.sizes.width % heads:
        raise UnusableWeights(
            f"was made for {heads:g} heads, which do not divide the width {base.sizes.width} of the base "
            f"{base.path}",
            where=adapter.path,
        )
    return {**theirs, **ours}


def _metadata(base: WeightFile, adapter: WeightFile, network: Mapping[str, float]) -> dict[str, str]:
    """What both files say, the adapter's word first, with the names and the history of both."""
    both = {**base.metadata, **adapter.metadata}
    names = ", ".join(printable(file.name) for file in (*base.files[:1], *adapter.files[:1]))
    kept = {key: value for key, value in both.items() if key not in _STALE}
    for key in ("avatarctl.operations", SOURCES_KEY):
        if key in kept:
            lists = (
                parse_json(side.metadata.get(key, "[]"), side.path, f"the metadata {key} is")
                for side in (base, adapter)
            )
            kept[key] = json.dumps([entry for entries in lists for entry in entries], allow_nan=False)
    if network:
        kept["avatarctl.network"] = json.dumps(network, allow_nan=False)
    return kept | {"modelspec.merged_from": names} if names else kept
