"""A weight file or folder -> `WeightFile`: which network, which names, what is missing, what has no place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from avatarctl.errors import UnusableWeights
from avatarctl.files.source import RawWeights, open_weights
from avatarctl.files.strict_json import listed, reading
from avatarctl.files.tensors import DTYPES, StoredTensor
from avatarctl.weights.adapter import read_pairs
from avatarctl.weights.layout import Sizes, WeightLayout
from avatarctl.weights.layouts import COMPONENTS, LAYOUTS, PATCHED_ADAPTERS, WAN
from avatarctl.weights.metadata import read_own
from avatarctl.weights.naming import Names, Placed, nearest_form, place_names, plain_name
from avatarctl.weights.sizes import MOST_LAYERS, read_sizes, variant_of
from avatarctl.weights.weight_file import Kind, LoraPair, WeightFile

__all__ = ["heads_of", "open_model", "read_weight_file", "recognise", "require_complete", "require_whole"]

HEAD_WIDTH: Final = 128
"""Width of an attention head in every published Wan transformer."""

Shape = tuple[int, ...]


def read_weight_file(path: Path) -> WeightFile:
    """What a file or folder holds; no tensor is read, except alphas.

    Raises PathNotFound, and UnusableWeights for files that cannot be read as any network that we know.
    Missing and unknown tensors are listed, not raised: see `require_complete`.
    """
    return recognise(open_weights(path))


def open_model(path: Path) -> WeightFile:
    """The complete weight file at `path`.

    Raises what `read_weight_file` and `require_whole` raise.
    """
    held = read_weight_file(path)
    require_whole(held)
    return held


def require_whole(held: WeightFile) -> None:
    """Raise what `require_complete` raises, and UnusableWeights for the second file of an adapter that is
    written as two: half of it would run and be wrong."""
    if first := read_own(held.metadata).companion_of:
        raise UnusableWeights(
            f"is the second half of an adapter; its first file is {first[:100]}",
            where=held.path,
            fix=f"name {first[:100]}, which reads both",
        )
    require_complete(held)


def require_complete(weight_file: WeightFile) -> None:
    """Raise UnusableWeights where tensors are missing or have no place; the first few are named."""
    if count := len(weight_file.missing):
        raise UnusableWeights(
            f"incomplete for {weight_file.variant}: {count} tensor{'s are' if count > 1 else ' is'} missing, "
            f"{listed(weight_file.missing, most=3)}",
            where=weight_file.path,
            fix="an interrupted or partial save; use the complete file",
        )
    if count := len(weight_file.unknown):
        raise UnusableWeights(
            f"{count} unknown tensor{'s have' if count > 1 else ' has'} no place in {weight_file.variant}, "
            f"{listed(weight_file.unknown, most=3)}",
            where=weight_file.path,
            fix=_nearest(weight_file.unknown[0], weight_file.layout),
        )


def _nearest(name: str, layout: WeightLayout) -> str | None:
    form = nearest_form(name, layout)
    return f"the nearest name that is read: {form}" if form else None


def recognise(raw: RawWeights) -> WeightFile:
    """`read_weight_file` for a file that is open."""
    with reading(raw.path):
        return _recognise(raw)


def _recognise(raw: RawWeights) -> WeightFile:
    if not raw.tensors:
        raise UnusableWeights("the file is empty: no tensors")
    layout = _layout_of(raw)
    _refuse_placeholders(raw.tensors)
    held = WeightFile(
        path=raw.path,
        kind="component",
        naming="original",
        layout=layout,
        variant=layout.title,
        sizes=Sizes(),
        tensors=raw.tensors,
        files=raw.files,
        format=raw.format,
        names=tuple(raw.tensors),
        config=raw.config,
        metadata=raw.metadata,
        wrappers=raw.wrappers,
        notes=raw.notes,
    )
    if layout in COMPONENTS:
        return held
    names = place_names(raw.tensors, layout)
    _refuse_integers(raw.tensors, names)
    pairs = read_pairs(names, layout, raw.tensors, raw.config, raw.metadata)
    whole, added = names.of("tensor"), names.of("diff")
    shapes = {name: raw.tensors[key].info.shape for name, key in whole.items()}
    shapes |= {f"{module}.weight": pair.shape for module, pair in pairs.lora_pairs.items()}
    sizes = _with_assumed(raw, layout, read_sizes(shapes, [*shapes, *added]))
    in_blocks = any(name.startswith("blocks.") for name in shapes)
    changes = pairs.lora_pairs or added or names.replaces
    kind: Kind = "adapter" if changes or not in_blocks else "model"
    expected = layout.shapes(sizes)
    strange, missing = set(names.unknown), []
    if layout.supported:
        _check_channels(layout, sizes)
        _check_shapes(shapes, expected)
        strange |= {key for key, placed in names.placed.items() if placed.weight not in expected}
        if len(strange) == len(raw.tensors):
            raise _of_nobody(raw)
        missing = _missing(kind, layout, expected, shapes, pairs.lora_pairs, raw.config)
    _check_config(raw.config, sizes, kind, pairs.lora_pairs)
    offset, offset_rule, assumed = _audio_offset(raw, layout, sizes)
    heads, stated = heads_of(raw, sizes)
    return replace(
        held,
        kind=kind,
        naming=names.naming,
        variant=variant_of(kind, layout, sizes),
        sizes=sizes,
        tensors={name: raw.tensors[key] for name, key in whole.items() if key not in strange},
        lora_pairs=pairs.lora_pairs,
        differences={name: raw.tensors[key] for name, key in added.items() if key not in strange},
        scale=pairs.scale,
        scale_rule=pairs.scale_rule,
        heads=heads,
        heads_stated=stated,
        audio_offset=offset,
        audio_offset_rule=offset_rule,
        audio_offset_assumed=assumed,
        unknown=tuple(key for key in raw.tensors if key in strange),
        missing=tuple(missing),
        notes=(*raw.notes, *names.notes, *pairs.notes),
    )


def _layout_of(raw: RawWeights) -> WeightLayout:
    """Whose tensors these are. Raises UnusableWeights for nobody's."""
    names = [plain_name(name) for name in raw.tensors]
    # Plain Wan owns none: the text encoder's blocks.N.norm2 is a name of diffusers' Wan as well.
    for layout in (*LAYOUTS, *COMPONENTS):
        if any(layout.owns(name) for name in names):
            return layout
    if known := place_names(raw.tensors, WAN).placed:
        roles = {placed.role for placed in known.values()}
        patch = Placed("tensor", "patch_embedding.weight")
        shapes = [raw.tensors[key].info.shape for key, placed in known.items() if placed == patch]
        patched = any(len(shape) > 1 and shape[1] in PATCHED_ADAPTERS.channels for shape in shapes)
        return PATCHED_ADAPTERS if patched and "down" in roles else WAN
    raise _of_nobody(raw)


def _of_nobody(raw: RawWeights) -> UnusableWeights:
    names = list(raw.tensors)
    return UnusableWeights(
        f"unknown tensors: none of the {len(names)} names belongs to a network that we know: "
        f"{listed(names, most=3)}",
        fix=_nearest(names[0], WAN),
    )


def _refuse_placeholders(tensors: Mapping[str, StoredTensor]) -> None:
    if empty := [name for name, tensor in tensors.items() if tensor.info.shape == (0,)]:
        raise UnusableWeights(
            f"{len(empty)} of {len(tensors)} tensors have shape [0], first {empty[0][:100]}: placeholders of "
            "DeepSpeed ZeRO-3, for weights that other processes hold",
            fix="gather them when saving (stage3_gather_16bit_weights_on_model_save), or run zero_to_fp32.py",
        )


def _refuse_integers(tensors: Mapping[str, StoredTensor], names: Names) -> None:
    for key, placed in names.placed.items():
        info = tensors[key].info
        if placed.role != "alpha" and not DTYPES[info.dtype].floating:
            raise UnusableWeights(
                f"{key[:100]} has dtype {info.dtype}; weights are floating point",
                fix="quantised files are not read; use the bfloat16 file they were made from",
            )
        if 0 in info.shape:
            raise UnusableWeights(f"{key[:100]} has shape {list(info.shape)}: it is empty")


def _check_channels(layout: WeightLayout, sizes: Sizes) -> None:
    if sizes.in_channels and sizes.in_channels not in layout.channels:
        allowed = ", ".join(map(str, layout.channels))
        raise UnusableWeights(
            f"patch_embedding has {sizes.in_channels} input channels; {layout.title} has {allowed}"
        )


def _check_shapes(shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """A 0 in an expected shape is a dimension that the file does not tell."""
    for name, shape in shapes.items():
        wanted = expected.get(name)
        if wanted is None:
            continue
        fits = len(shape) == len(wanted) and all(b in (0, a) for a, b in zip(shape, wanted, strict=True))
        if not fits:
            raise UnusableWeights(
                f"{name} has shape {list(shape)}; the rest of the file needs {list(wanted)}"
            )


def _missing(
    kind: Kind,
    layout: WeightLayout,
    expected: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
    lora_pairs: Mapping[str, LoraPair],
    config: Mapping[str, Any],
) -> list[str]:
    """What a complete file would hold. A plain LoRA may change as little as it likes; an avatar's adapter
    holds its whole tensors, and a pair for each of its targets in every block."""
    if kind == "model":
        return [name for name in expected if name not in shapes]
    if not any(layout.is_replaced(name) for name in shapes):
        return []
    missing = [name for name in expected if layout.is_replaced(name) and name not in shapes]
    targets = _stated_targets(config) if lora_pairs else []
    inside = {module.split(".", 2)[2] for module in lora_pairs if module.startswith("blocks.")}
    for name in expected:
        module = name.removesuffix(".weight")
        if (
            not name.startswith("blocks.")
            or module == name
            or module in lora_pairs
            or len(expected[name]) != 2
        ):
            continue
        if module.split(".", 2)[2] in inside or any(f".{module}".endswith(f".{each}") for each in targets):
            missing.append(f"{module}.lora")
    return missing


def _stated_targets(config: Mapping[str, Any]) -> list[str]:
    """Ends of module names that have a pair: "q,k,v" in the release, a list in other trainers' configs."""
    stated = config.get("lora_target_modules", "")
    parts = stated.split(",") if isinstance(stated, str) else stated if isinstance(stated, list) else []
    return [part.strip() for part in parts if isinstance(part, str) and part.strip()]


_STATED_SIZES: Final = {
    "num_layers": "layers", "dim": "width", "ffn_dim": "ffn", "in_dim": "in_channels",
    "in_channels": "in_channels", "out_dim": "out_channels", "out_channels": "out_channels",
    "freq_dim": "freq_dim", "text_dim": "text_dim",
}  # fmt: skip
"""Fields of Wan's and diffusers' config.json -> `Sizes`."""


def _check_config(
    config: Mapping[str, Any], sizes: Sizes, kind: Kind, lora_pairs: Mapping[str, LoraPair]
) -> None:
    """Refuse a config that describes another file, or a whole of which the file is a part."""
    of_model = config.get("model_config")
    fields = {**config, **(of_model if isinstance(of_model, Mapping) else {})}
    for name, size in _STATED_SIZES.items():
        stated, held = fields.get(name), getattr(sizes, size)
        # An adapter may leave blocks out, and then their number is that of the last one it changes.
        if isinstance(stated, int) and held and stated != held and (kind == "model" or size != "layers"):
            raise UnusableWeights(
                f"config.json says {name} {stated}, and the file has {held}",
                fix="a part of a model, or the config of another",
            )
    if config.get("train_architecture") == "lora" and not lora_pairs:
        raise UnusableWeights(
            "config.json says LoRA, and the file has no LoRA tensors",
            fix="a part of an adapter, or the wrong file",
        )


def heads_of(raw: RawWeights | WeightFile, sizes: Sizes) -> tuple[int, bool]:
    """Attention heads, and whether they are stated: no tensor tells them, as queries and keys are normalised
    over the full width."""
    name, heads = _stated(raw, "num_attention_heads", "num_heads")
    if heads:
        _require_divisor(name, heads, sizes.width)
        return heads, True
    return (sizes.width // HEAD_WIDTH if sizes.width % HEAD_WIDTH == 0 else 0), False


def _require_divisor(name: str, heads: int, width: int) -> None:
    if width % heads:
        raise UnusableWeights(f"{name} {heads} does not divide the width {width}")


def _with_assumed(raw: RawWeights, layout: WeightLayout, sizes: Sizes) -> Sizes:
    """`sizes` with what no tensor tells for sure: as it is stated, else as published, or as many as there are
    if that is more."""
    found: dict[str, int] = {}
    for argument, published in layout.assumed.items():
        size = layout.arguments[argument]
        _, stated = _stated(raw, argument)
        if stated > MOST_LAYERS:
            raise UnusableWeights(f"{argument} is stated as {stated}; no model has that many")
        found[size] = stated or max(getattr(sizes, size), published)
        if argument.endswith("_heads"):
            _require_divisor(argument, found[size], sizes.width)
    return replace(sizes, **found)


def _stated(raw: RawWeights | WeightFile, *names: str) -> tuple[str, int]:
    """The first of these numbers that our metadata or the config states, with its name; 0 for none."""
    for fields in (read_own(raw.metadata).network, raw.config, raw.config.get("model_config")):
        for name in names:
            value = fields.get(name) if isinstance(fields, Mapping) else None
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return name, value
    return "", 0


def _audio_offset(raw: RawWeights, layout: WeightLayout, sizes: Sizes) -> tuple[int | None, str, bool]:
    """(frames, why, whether that is an assumption)."""
    if not layout.offsets:
        return None, "", False
    stated = read_own(raw.metadata).conventions.get("audio_offset")
    if stated in (0, 1):
        return int(stated), "the file's metadata", False
    names = [file.name for file in raw.files]
    fields = {**raw.metadata, **raw.config}
    rule = next(each for each in layout.offsets if each.holds(sizes.in_channels, fields, names))
    return rule.offset, rule.why, rule.assumed
