"""What a weight file is, in words and as JSON: `convert-ckpt --inspect`. Only headers are read.

`describe` gives every fact under a stable key, None or empty where the file does not tell; `lines` leaves
those out. Names, notes and metadata are strangers' text and are escaped before a person sees them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from avatarctl.errors import UnusableWeights, printable
from avatarctl.files.tensors import StoredTensor, size_text
from avatarctl.weights.loaders import readers, verdicts
from avatarctl.weights.made_for import trained_shape
from avatarctl.weights.metadata import OwnMetadata, read_own
from avatarctl.weights.published import PUBLISHED, hash_of
from avatarctl.weights.weight_file import LoraPair, WeightFile

__all__ = ["NAMINGS", "describe", "lines", "size_text"]

_SHOWN: Final = 10
_WIDEST: Final = 100  # characters of a stranger's name or value

_FORMATS: Final = {
    "safetensors": "safetensors", "zip": "torch file (zip)", "legacy": "torch file (old pickle)",
}  # fmt: skip
NAMINGS: Final = {
    "original": "the release's names", "diffusers": "names of diffusers", "peft": "names of PEFT",
    "comfyui": "names of ComfyUI", "kohya": "names of kohya's scripts",
}  # fmt: skip
_KINDS: Final = {"model": " (full model)", "adapter": "", "component": ""}  # their variants say it
_CONVENTIONS: Final = {
    "mask_keep": "mask value that keeps", "hole": "value in the hole", "fps": "frames per second",
    "sigma_shift": "shift of the sigmas", "audio_offset": "audio offset",
}  # fmt: skip


def describe(weight_file: WeightFile) -> dict[str, Any]:
    """All facts about a file, ready for JSON.

    parameters, tensors, dtypes and bytes count what has a place in the network; alphas are not counted. bytes
    are those of the tensors. published_as: the published file with the same names and shapes, which a
    fine-tune shares. read_by: programs that read names like these, whatever they leave out; loaders: what
    avatarctl and diffusers do with the file.

    Raises UnusableWeights where our own metadata in the file is damaged.
    """
    try:
        own = read_own(weight_file.metadata)
    except UnusableWeights as error:
        error.where = weight_file.path
        raise
    fingerprint = hash_of(weight_file)
    return {
        "path": str(weight_file.path),
        "files": [file.name for file in weight_file.files],
        "format": weight_file.format or None,
        "naming": weight_file.naming,
        "kind": weight_file.kind,
        "family": weight_file.layout.family,
        "variant": weight_file.variant,
        "supported": weight_file.layout.supported,
        **_network(weight_file),
        **_updates(weight_file),
        **_training(weight_file, own),
        **_amounts(weight_file),
        "published_hash": fingerprint,
        "published_as": PUBLISHED.get(fingerprint or ""),
        "read_by": list(readers(weight_file)),
        "loaders": [asdict(verdict) for verdict in verdicts(weight_file)],
        "unknown": list(weight_file.unknown),
        "missing": list(weight_file.missing),
        "notes": list(weight_file.notes),
        "config": dict(weight_file.config),
        "metadata": dict(weight_file.metadata),
    }


def _network(weight_file: WeightFile) -> dict[str, Any]:
    sizes = weight_file.sizes
    facts = {
        "channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "layers": sizes.layers,
        "width": sizes.width,
        "ffn": sizes.ffn,
        "heads": weight_file.heads,
        "text_dim": sizes.text_dim,
        "image_dim": sizes.image_dim,
        "audio_hidden_size": sizes.audio_hidden_size,
        "audio_input_dim": sizes.audio_input_dim,
        "vocal_dim": sizes.vocal_dim,
        "vocal_hidden_dim": sizes.vocal_hidden_dim,
        "vocal_layers": sizes.vocal_layers,
        "vocal_heads": sizes.vocal_heads,
        "vocal_ffn": sizes.vocal_ffn,
    }
    return {name: value or None for name, value in facts.items()}


def _updates(weight_file: WeightFile) -> dict[str, Any]:
    pairs = weight_file.lora_pairs.values()
    return {
        "targets": len(pairs),
        "ranks": sorted({pair.rank for pair in pairs}),
        "alphas": sorted({alpha for pair in pairs if (alpha := _alpha(pair)) is not None}),
        "scales": sorted({weight_file.scale_of(pair) for pair in pairs}),
        "scale_rule": weight_file.scale_rule or None,
        "differences": len(weight_file.differences),
        "whole_tensors": len(weight_file.tensors) if weight_file.kind == "adapter" else None,
    }


def _alpha(pair: LoraPair) -> float | None:
    """As it is stated, before a factor for rank-stabilised LoRA."""
    return pair.alpha if pair.stated_alpha is None else pair.stated_alpha


def _training(weight_file: WeightFile, own: OwnMetadata) -> dict[str, Any]:
    """What configs and our own metadata say; the config beside the file first."""
    config = {**own.config, **weight_file.config}
    return {
        "train_architecture": config.get("train_architecture"),
        "random_prefix_frames": config.get("random_prefix_frames"),
        "made_for": trained_shape(weight_file),
        "audio_offset": weight_file.audio_offset,
        "audio_offset_rule": weight_file.audio_offset_rule or None,
        "conventions": dict(own.conventions),
        "data": dict(own.data),
        "operations": [dict(step) for step in own.operations],
    }


def _amounts(weight_file: WeightFile) -> dict[str, Any]:
    infos = [tensor.info for tensor in _tensors(weight_file)]
    return {
        "tensors": len(infos),
        "dtypes": dict(Counter(info.dtype for info in infos).most_common()),
        "parameters": sum(info.numel for info in infos),
        "bytes": sum(info.nbytes for info in infos),
    }


def _tensors(weight_file: WeightFile) -> Iterator[StoredTensor]:
    yield from weight_file.tensors.values()
    yield from weight_file.differences.values()
    for pair in weight_file.lora_pairs.values():
        yield pair.down
        yield pair.up


# For people


def lines(description: Mapping[str, Any]) -> list[str]:
    """A description as labelled lines, in the order in which a person asks; absent facts are left out."""
    rows = [(label, printable(text)) for label, text in _rows(description) if text]
    width = max(len(label) for label, _ in rows)
    shown, before = [], ""
    for label, text in rows:
        shown.append(f"{'' if label == before else label:<{width}}  {text}")
        before = label
    return shown


def _rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "path", facts["path"]
    yield "is", f"{facts['variant']}{_KINDS[facts['kind']]}"
    yield "published", _published(facts)
    yield "format", _format(facts)
    if facts["kind"] != "component":
        yield "network", _sizes(facts)
        yield "heads", str(facts["heads"] or ("not stated" if facts["kind"] == "model" else ""))
    yield from _update_rows(facts)
    yield "trained as", _text(facts["train_architecture"])
    if facts["made_for"]:
        yield "trained for", f"{facts['made_for']} videos (by its name, or that of its source)"
    yield "random prefix", _text(facts["random_prefix_frames"])
    if facts["audio_offset"] is not None:
        yield "audio offset", f"{_frames(facts['audio_offset'])} ({facts['audio_offset_rule']})"
    for name, value in facts["conventions"].items():
        if name != "audio_offset":
            yield "conventions", f"{_CONVENTIONS.get(name, name)}: {value:g}"
    for name, value in facts["data"].items():
        yield "trained with", f"{name.replace('_', ' ')} {value}"
    yield "holds", _holds(facts)
    yield from _loader_rows(facts["loaders"])
    if facts["read_by"]:
        programs = ", ".join(facts["read_by"])
        yield "names", f"read by {programs} (what these leave out: docs/weights.md)"
    yield from _names("missing", facts["missing"])
    yield from _names("no place for", facts["unknown"])
    for note in facts["notes"]:
        yield "note", _cut(note, 2 * _WIDEST)
    yield from _metadata_rows(facts["metadata"])


def _published(facts: Mapping[str, Any]) -> str:
    if not facts["published_hash"]:
        return ""
    known = facts["published_as"]
    told = f"names and shapes of {known}" if known else "names and shapes of no published file that we know"
    return f"{told} ({facts['published_hash']})"


def _format(facts: Mapping[str, Any]) -> str:
    files = facts["files"]
    count = f"{len(files)} files" if len(files) > 1 else ""
    form = _FORMATS.get(facts["format"] or "", "")
    naming = NAMINGS[facts["naming"]] if facts["kind"] != "component" else ""
    return ", ".join(part for part in (form, count, naming) if part)


def _sizes(facts: Mapping[str, Any]) -> str:
    told = (
        ("channels", "{} input channels"), ("layers", "layers {}"), ("width", "width {}"), ("ffn", "ffn {}"),
        ("audio_hidden_size", "audio {}"), ("image_dim", "CLIP {}"),
        ("vocal_dim", "audio tokens {}"), ("vocal_layers", "layers of their projector {}"),
        ("vocal_heads", "its heads {}"),
    )  # fmt: skip
    return ", ".join(form.format(facts[name]) for name, form in told if facts[name])


def _update_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if facts["targets"]:
        yield "LoRA", f"{facts['targets']} targets, rank {_span(facts['ranks'])}"
        yield "alpha", _span(facts["alphas"]) or "not stated"
        yield "scale", f"{_span(facts['scales'])} ({facts['scale_rule']})"
    if facts["differences"]:
        yield "adds", f"{facts['differences']} differences to biases, norms and the like"
    if facts["whole_tensors"]:
        yield "replaces", f"{facts['whole_tensors']} whole tensors"


def _holds(facts: Mapping[str, Any]) -> str:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in facts["dtypes"].items())
    amount = f"{facts['parameters']:,}".replace(",", " ")
    return f"{facts['tensors']} tensors ({dtypes}), {amount} parameters, {size_text(facts['bytes'])}"


def _loader_rows(loaders: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """Who takes it, who takes it wrongly, and why `infer` does not; other refusals are in the JSON."""
    takes = [entry for entry in loaders if entry["answer"] == "yes"]
    wrongly = [entry for entry in loaders if entry["answer"] == "wrong"]
    ours = [entry for entry in loaders if entry["loader"].startswith("avatarctl infer")]
    refuse = [] if any(entry in takes for entry in ours) else ours
    if not (takes or wrongly):
        yield "loads in", "neither avatarctl nor diffusers, as it is"
    for label, entries in (("loads in", takes), ("wrongly in", wrongly), ("not in", refuse)):
        for entry in entries:
            yield label, f"{entry['loader']}: {entry['reason']}" if entry["reason"] else entry["loader"]


def _names(label: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names[:_SHOWN]:
        yield label, _cut(name, _WIDEST)
    if len(names) > _SHOWN:
        yield label, f"and {len(names) - _SHOWN} more"


def _metadata_rows(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Strangers' metadata; ours is told above."""
    told = [(key, value) for key, value in metadata.items() if not key.startswith("avatarctl.")]
    for key, value in told[:_SHOWN]:
        yield "metadata", f"{_cut(key, _WIDEST)} = {_cut(value, _WIDEST)}"
    if len(told) > _SHOWN:
        yield "metadata", f"and {len(told) - _SHOWN} more"


def _span(values: Sequence[float]) -> str:
    return " to ".join(f"{value:g}" for value in sorted({*values[:1], *values[-1:]}))


def _frames(count: int) -> str:
    return f"{count} frame" + ("" if count == 1 else "s")


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else _cut(str(value), _WIDEST)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[:width]}..."
