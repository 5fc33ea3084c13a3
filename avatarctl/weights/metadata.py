"""The header metadata of every weight file that we write, and what it says when we read it back.

All values are strings, as safetensors demands. Three vocabularies stand side by side (spec/field.md 4a):
`format`, without which transformers and diffusers refuse a file; `modelspec.*`, ModelSpec 1.0.1;
`avatarctl.*`, what only this program knows: conventions that do silent damage when two files disagree,
dimensions that no shape tells, the configuration of the source, and what was done to it. Whatever a source
said is kept unless we say it better. There is no date: the same conversion gives the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import avatarctl
from avatarctl.errors import UnusableWeights, printable
from avatarctl.files.strict_json import parse_json
from avatarctl.weights.weight_file import WeightFile

__all__ = [
    "OwnMetadata",
    "config_of",
    "conventions_of",
    "data_of",
    "file_metadata",
    "mismatch",
    "network_of",
    "read_own",
    "stated_network",
    "without_history",
]

MODELSPEC_VERSION: Final = "1.0.1"
_CONVENTIONS: Final = ("audio_offset", "mask_keep", "hole", "fps", "sigma_shift")
_DATA: Final = {"mask_rule": r"all|first_keep|legacy_two_step", "mask": r"mouth|[0-9a-f]{64}"}
"""What the training data of a video-to-video model fixed for whoever runs it, and what it may be: the rule by
which frames were masked; the mask, drawn by us or known by its hash (`conditioning.masking.mask_name`)."""
_STALE: Final = ("lora_adapter_metadata", "modelspec.hash_sha256")
"""Keys of a source that describe its own bytes or names, not the ones that we write."""
_HASHES: Final = "sshs_"
"""kohya's digests of the tensors, `sshs_model_hash` and `sshs_legacy_hash`: untrue after any change."""
_LORA_TRAINED: Final = "ss_network_"
"""What LoRA a trainer made (module, rank, alpha, arguments): untrue of anything but that LoRA."""


@dataclass(frozen=True)
class OwnMetadata:
    """What `avatarctl.*` of a header says, as far as it is read again; empty where it says nothing.

    channels: input channels, 0 unknown; conventions: `Conventions` by field name, as far as known; data: the
    `mask_rule` and the `mask` that a model of video was trained with; network: see `stated_network`; config:
    the source's configuration; operations: one entry for each conversion step, oldest first; sources: hashes
    of the files that the last one read; companion_of: plain file name.
    """

    channels: int = 0
    conventions: Mapping[str, float] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    network: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    operations: tuple[Mapping[str, Any], ...] = ()
    sources: tuple[str, ...] = ()
    companion_of: str = ""


def read_own(metadata: Mapping[str, str]) -> OwnMetadata:
    """The typed `avatarctl.*` part of a header.

    Raises UnusableWeights for values that are not what we write: somebody edited them, and a guess at a
    convention would do silent damage.
    """
    operations = _json(metadata, "avatarctl.operations", list)
    channels = metadata.get("avatarctl.channels", "0")
    if not (channels.isascii() and channels.isdigit() and len(channels) < 10):
        raise UnusableWeights(f"the metadata avatarctl.channels is no number: {printable(channels)[:60]}")
    if not all(isinstance(entry, dict) for entry in operations):
        raise UnusableWeights("the metadata avatarctl.operations is no list of objects")
    sources = _json(metadata, "avatarctl.sources", list)
    if not all(isinstance(entry, dict) and _hashes(entry) for entry in sources):
        raise UnusableWeights("the metadata avatarctl.sources is no list of files with their hashes")
    return OwnMetadata(
        channels=int(channels),
        conventions=_numbers(metadata, "avatarctl.conventions"),
        data=_data(metadata),
        network=_numbers(metadata, "avatarctl.network"),
        config=_json(metadata, "avatarctl.config", dict),
        operations=tuple(operations),
        sources=tuple(digest for entry in sources for digest in _hashes(entry)),
        companion_of=metadata.get("avatarctl.companion_of", ""),
    )


def _hashes(entry: Mapping[str, Any]) -> list[str]:
    """Of a file as `files.hashes` names it; empty where none is stated."""
    stated = (entry.get("sha256"), entry.get("sampled_sha256"))
    return [digest for digest in stated if isinstance(digest, str)]


def _json(metadata: Mapping[str, str], key: str, kind: type[Any]) -> Any:
    if key not in metadata:
        return kind()
    value = parse_json(metadata[key], None, f"the metadata {key} is")
    if not isinstance(value, kind):
        raise UnusableWeights(f"the metadata {key} is no JSON {'object' if kind is dict else 'list'}")
    return value


def _numbers(metadata: Mapping[str, str], key: str) -> Mapping[str, float]:
    values = _json(metadata, key, dict)
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UnusableWeights(f"the metadata {key} has no number for {printable(name)[:60]}")
    return dict(values)


def _data(metadata: Mapping[str, str]) -> Mapping[str, str]:
    values = _json(metadata, "avatarctl.data", dict)
    for name, pattern in _DATA.items():
        value = values.get(name, "")
        if value and not (isinstance(value, str) and re.fullmatch(pattern, value)):
            raise UnusableWeights(f"the metadata avatarctl.data has no {name} that is one")
    return {name: values[name] for name in _DATA if values.get(name)}


def data_of(weight_file: WeightFile) -> Mapping[str, str]:
    """What a file states of the data that it was trained on: `mask_rule`, `mask`; empty where it does not."""
    return read_own(weight_file.metadata).data


def conventions_of(weight_file: WeightFile) -> Mapping[str, float]:
    """What the file was made with: what its metadata states, else what its family is published with.

    `weight_file.audio_offset` is already the outcome of everything that can tell it; one that is only assumed
    is left out, or a conversion would make a fact of a guess.
    """
    stated = read_own(weight_file.metadata).conventions
    found = {**weight_file.layout.conventions, **stated}
    if weight_file.audio_offset is not None and not weight_file.audio_offset_assumed:
        found["audio_offset"] = weight_file.audio_offset
    return {name: found[name] for name in _CONVENTIONS if name in found}


def config_of(weight_file: WeightFile) -> Mapping[str, Any]:
    """The configuration that came with a file: the first source's, which conversions carry along."""
    return read_own(weight_file.metadata).config or weight_file.config


def mismatch(one: WeightFile, other: WeightFile) -> str:
    """The first convention on which two files disagree ("audio_offset 1 and 0"), empty if there is none."""
    first, second = conventions_of(one), conventions_of(other)
    for name in _CONVENTIONS:
        if name in first and name in second and first[name] != second[name]:
            return f"{name} {first[name]:g} and {second[name]:g}"
    return ""


def without_history(metadata: Mapping[str, str]) -> dict[str, str]:
    """A model's metadata for the adapter that is extracted from it, without the model's title, what it was
    merged from, and the LoRA that a trainer made for it."""
    return {
        key: value
        for key, value in metadata.items()
        if key not in ("modelspec.title", "modelspec.merged_from") and not key.startswith(_LORA_TRAINED)
    }


def file_metadata(
    weight_file: WeightFile, operations: Sequence[Mapping[str, Any]], extra: Mapping[str, str]
) -> dict[str, str]:
    """The metadata of a file that holds `weight_file`, whose config goes with it.

    operations: all steps, earlier ones included; extra: what the naming of the file adds (see `export`).
    """
    untrue = ("avatarctl.", _HASHES, *([_LORA_TRAINED] if weight_file.kind == "model" else []))
    kept = {
        key: value
        for key, value in weight_file.metadata.items()
        if not key.startswith(untrue) and key not in _STALE
    }
    own = {
        "format": "pt",
        "modelspec.sai_model_spec": MODELSPEC_VERSION,
        "modelspec.architecture": _architecture(weight_file),
        "modelspec.implementation": weight_file.layout.repository,
        "avatarctl.version": avatarctl.__version__,
        "avatarctl.family": weight_file.layout.family,
        "avatarctl.kind": weight_file.kind,
        "avatarctl.operations": _text(list(operations)),
    }
    if weight_file.sizes.in_channels:
        own["avatarctl.channels"] = str(weight_file.sizes.in_channels)
    parts = {
        "avatarctl.conventions": conventions_of(weight_file),
        "avatarctl.data": data_of(weight_file),
        "avatarctl.network": stated_network(weight_file),
        "avatarctl.config": weight_file.config,
    }
    own |= {key: _text(value) for key, value in parts.items() if value}
    title = {"modelspec.title": weight_file.variant}
    strangers = "avatarctl.version" not in weight_file.metadata  # whose title is kept
    return {**title, **kept, **own, **extra} if strangers else {**kept, **title, **own, **extra}


def _text(value: Any) -> str:
    """JSON on one line, ASCII: a header may be read by anybody's parser."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _architecture(weight_file: WeightFile) -> str:
    """ModelSpec's architecture id, such as "wan2.1-t2v-14b/FAMILY/lora"."""
    sizes = weight_file.sizes
    base = "wan2.1-t2v"
    if sizes.in_channels == 36 or (sizes.image_dim and not sizes.in_channels):  # a LoRA has no channels
        base = "wan2.1-i2v" if sizes.image_dim else "wan2.2-i2v"
    elif sizes.in_channels == 48:
        base = "wan2.2-ti2v"
    size = {(1536, 30): "-1.3b", (5120, 40): "-14b", (3072, 30): "-5b"}.get((sizes.width, sizes.layers), "")
    words = [base + size]
    if weight_file.layout.family != "wan":
        words.append(weight_file.layout.family)
    if weight_file.kind == "adapter":
        words.append("lora")
    return "/".join(words)


def stated_network(weight_file: WeightFile) -> dict[str, float]:
    """What shapes do not tell, as far as the file or its configuration states it: num_attention_heads,
    attention_head_dim, eps, and what a layout assumes. A guess would outrank, once written, what another file
    states.

    Raises UnusableWeights for an eps that is none.
    """
    found: dict[str, float] = {}
    if weight_file.heads and weight_file.heads_stated:
        found["num_attention_heads"] = weight_file.heads
        if weight_file.sizes.width:
            found["attention_head_dim"] = weight_file.sizes.width // weight_file.heads
    for fields in (weight_file.config, read_own(weight_file.metadata).network):  # the metadata's word counts
        for argument in weight_file.layout.assumed:
            held = getattr(weight_file.sizes, weight_file.layout.arguments[argument])
            found |= {argument: held} if fields.get(argument) == held else {}
        if "eps" not in fields:
            continue
        eps = fields["eps"]
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
            raise UnusableWeights(f"eps is {printable(eps)[:60]}, not a small number", where=weight_file.path)
        found["eps"] = float(eps)
    return found


def network_of(weight_file: WeightFile) -> Mapping[str, float]:
    """num_attention_heads, attention_head_dim and eps of a full model whose heads are known; unless stated,
    eps is 1e-6 as in every published network."""
    guessed = {
        "num_attention_heads": weight_file.heads,
        "attention_head_dim": weight_file.sizes.width // weight_file.heads,
        "eps": 1e-6,
    }
    return guessed | stated_network(weight_file)
