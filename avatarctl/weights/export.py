"""A `WeightFile` under the names that another program expects, with the small files that go beside it.

    target      model                                adapter
    original    release names                        blocks.N.self_attn.q.lora_A.default.weight, config.json
    diffusers   names of WanTransformer3DModel       transformer.<module>.lora_A.weight, alpha in metadata
    peft        -                                    base_model.model.<module>.lora_A.weight
    comfyui     model.diffusion_model.<release>      diffusion_model.<module>.lora_A.weight, .alpha

The factor of a LoRA pair travels as alpha = scale * rank, stated in every format: a reader that finds
none takes 1 where the release takes 0.5 (spec/field.md 4a). Whole tensors of an adapter (patch embedding,
audio) cannot ride in the LoRA files of ComfyUI and diffusers; they go to a second file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np

from avatarctl.errors import UnusableWeights, UsageError
from avatarctl.files.tensors import ArrayTensor, StoredTensor
from avatarctl.weights.layouts import LAYOUTS, WAN
from avatarctl.weights.metadata import network_of, stated_network
from avatarctl.weights.transforms import padded_pair
from avatarctl.weights.weight_file import LoraPair, WeightFile

__all__ = ["TARGETS", "Export", "Target", "export", "require_place", "with_release_config"]

Target = Literal["original", "diffusers", "peft", "comfyui"]
TARGETS: Final[tuple[Target, ...]] = get_args(Target)

PATCH_SIZE: Final = [1, 2, 2]
ROPE_MAX_SEQ_LEN: Final = 1024  # default of WanTransformer3DModel

_LORA_FIELDS: Final = (
    "train_architecture", "lora_rank", "lora_alpha", "lora_target_modules", "init_lora_weights",
)  # fmt: skip
_DIFFUSERS_CLASSES: Final = {layout.class_name for layout in LAYOUTS}
_MODEL_FILE: Final = "diffusion_pytorch_model.safetensors"
_RELEASE_FILE: Final = "pytorch_model.safetensors"


@dataclass(frozen=True)
class Export:
    """Files to write, tensors still on the disk.

    name:      of the main file in a folder.
    tensors:   of the main file, by the names it will have.
    companion: whole tensors that need a second file, else empty.
    metadata:  what this naming adds to the main file's header.
    documents: file name -> JSON, beside the main file where the output is a folder.
    notes:     one line each, for people.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    companion: Mapping[str, StoredTensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def export(weight_file: WeightFile, target: Target) -> Export:
    """`weight_file` as `target` names it; its config is the release's, see `with_release_config`.

    Raises UsageError for a target that cannot hold this kind of file, UnusableWeights for contents that
    the target has no name for.
    """
    if weight_file.kind == "model":
        return _MODELS[target](weight_file)
    require_place(
        list(weight_file.differences), target, weight_file.path, fix="use --to comfyui, or --merge-lora"
    )
    return _ADAPTERS[target](weight_file)


def require_place(differences: Sequence[str], target: Target, where: Path, *, fix: str) -> None:
    """Raise UnusableWeights where there are differences (tensor names) that `target` cannot hold."""
    if not differences or target == "comfyui":
        return
    count = f"{len(differences)} difference{'s' if len(differences) > 1 else ''} (.diff)"
    raise UnusableWeights(
        f"has {count}, which {target} adapters have no place for; the first: {differences[0][:100]}",
        where=where,
        fix=fix,
    )


# Models


def _original_model(weight_file: WeightFile) -> Export:
    """A full model of an avatar, read from a release, keeps the name that the release has."""
    documents = {"config.json": weight_file.config} if weight_file.config else {}
    # The last file is the base's where an adapter was merged.
    released = weight_file.layout.family != "wan" and weight_file.files[-1].name.startswith("pytorch_model")
    name = _RELEASE_FILE if released else _MODEL_FILE
    return Export(name, dict(weight_file.tensors), documents=documents)


def _comfyui_model(weight_file: WeightFile) -> Export:
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in weight_file.tensors.items()}
    return Export("model.safetensors", tensors)


def _diffusers_model(weight_file: WeightFile) -> Export:
    tensors = {_internal(weight_file, name): tensor for name, tensor in weight_file.tensors.items()}
    return Export(_MODEL_FILE, tensors, documents={"config.json": _diffusers_config(weight_file)})


def _peft_model(weight_file: WeightFile) -> Export:
    raise UsageError(
        "a full model is no adapter",
        where="--to peft",
        fix="add --extract lora --base BASE, or choose another --to",
    )


_MODELS: Final = {
    "original": _original_model,
    "diffusers": _diffusers_model,
    "peft": _peft_model,
    "comfyui": _comfyui_model,
}


def _diffusers_config(weight_file: WeightFile) -> dict[str, Any]:
    """Constructor arguments of the network, as diffusers' `from_config` reads them."""
    sizes, heads = weight_file.sizes, weight_file.heads
    if not heads or sizes.width % heads:
        raise UnusableWeights(
            f"the number of attention heads is unknown for a width of {sizes.width}", where=weight_file.path
        )
    config: dict[str, Any] = {
        "patch_size": PATCH_SIZE,
        "num_attention_heads": heads,
        "attention_head_dim": sizes.width // heads,
        **weight_file.layout.constructor(sizes),
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": network_of(weight_file)["eps"],
    }
    named = {"_class_name": weight_file.layout.class_name, **config}
    if weight_file.layout is not WAN:
        return named
    return {
        **named,
        "image_dim": sizes.image_dim or None,
        "added_kv_proj_dim": sizes.width if sizes.image_dim else None,
        "rope_max_seq_len": ROPE_MAX_SEQ_LEN,
        "pos_embed_seq_len": None,
    }


def _internal(weight_file: WeightFile, name: str) -> str:
    """The diffusers name of an original one."""
    internal = weight_file.layout.key_map.to_internal(name)
    if internal is None:
        raise UnusableWeights(f"{name[:100]} has no name in diffusers", where=weight_file.path)
    return internal


def _internal_module(weight_file: WeightFile, module: str) -> str:
    return _internal(weight_file, f"{module}.weight").removesuffix(".weight")


# Adapters


def _original_adapter(weight_file: WeightFile) -> Export:
    """One rank and one alpha, as the release's config has them; pairs of lower rank are filled with zeros."""
    scales = {weight_file.scale_of(pair) for pair in weight_file.lora_pairs.values()}
    if len(scales) > 1:
        raise UnusableWeights(
            f"{len(scales)} different scales; the release's format holds one",
            where=weight_file.path,
            fix="use --to comfyui, peft or diffusers",
        )
    ranks = sorted({pair.rank for pair in weight_file.lora_pairs.values()})
    tensors: dict[str, StoredTensor] = {}
    for module, pair in weight_file.lora_pairs.items():
        full = padded_pair(pair, ranks[-1])
        tensors[f"{module}.lora_A.default.weight"] = full.down
        tensors[f"{module}.lora_B.default.weight"] = full.up
    tensors |= weight_file.tensors
    metadata = {}
    if ranks:
        fields = {
            "r": ranks[-1],
            "lora_alpha": weight_file.config["lora_alpha"],
            "target_modules": list(weight_file.lora_pairs),
        }
        metadata = {"lora_adapter_metadata": _document(fields)}
    notes: tuple[str, ...] = ()
    if len(ranks) > 1:
        notes = (
            f"ranks {ranks[0]} to {ranks[-1]} are filled with zeros to {ranks[-1]}: this format holds one",
        )
    return Export(
        _RELEASE_FILE,
        tensors,
        metadata=metadata,
        documents={"config.json": weight_file.config},
        notes=notes,
    )


def _diffusers_adapter(weight_file: WeightFile) -> Export:
    prefix = "transformer."
    tensors = _lora_tensors(weight_file, prefix)
    fields = {f"{prefix}{key}": value for key, value in _lora_config(weight_file).items()}
    return Export(
        "pytorch_lora_weights.safetensors",
        tensors,
        # Bare names: they load into the transformer with load_state_dict(..., strict=False).
        companion={_internal(weight_file, name): tensor for name, tensor in weight_file.tensors.items()},
        metadata={"lora_adapter_metadata": _document(fields)} if tensors else {},
    )


def _peft_adapter(weight_file: WeightFile) -> Export:
    prefix = "base_model.model."
    tensors = _lora_tensors(weight_file, prefix)
    if not tensors:
        raise UnusableWeights(
            "no LoRA pairs: peft has no place for whole tensors alone", where=weight_file.path
        )
    saved: dict[str, None] = {}
    for name, tensor in weight_file.tensors.items():
        internal = _internal(weight_file, name)
        module, _, kind = internal.rpartition(".")
        if kind not in ("weight", "bias"):
            raise UnusableWeights(
                f"{name[:100]} belongs to no module that peft could save", where=weight_file.path
            )
        saved[module] = None
        tensors[f"{prefix}{internal}"] = tensor
    document = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        **_lora_config(weight_file),
        "modules_to_save": list(saved) or None,
    }
    return Export("adapter_model.safetensors", tensors, documents={"adapter_config.json": document})


def _comfyui_adapter(weight_file: WeightFile) -> Export:
    """ComfyUI takes a missing `.alpha` as a scale of 1, so that every target states its own."""
    prefix = "diffusion_model."
    tensors: dict[str, StoredTensor] = {}
    for module, pair in weight_file.lora_pairs.items():
        alpha = np.array(_alpha(weight_file, pair), "<f4")
        tensors[f"{prefix}{module}.lora_A.weight"] = pair.down
        tensors[f"{prefix}{module}.lora_B.weight"] = pair.up
        tensors[f"{prefix}{module}.alpha"] = ArrayTensor(alpha, "F32")
    for name, tensor in weight_file.differences.items():
        tensors[f"{prefix}{_difference(name)}"] = tensor
    companion = {f"{prefix}{name}": tensor for name, tensor in weight_file.tensors.items()}
    return Export("pytorch_lora_weights.safetensors", tensors, companion=companion)


def _difference(name: str) -> str:
    """ComfyUI adds `.diff` to a module's weight and to tensors of other names, `.diff_b` to its bias."""
    if name.endswith(".bias"):
        return f"{name.removesuffix('.bias')}.diff_b"
    return f"{name.removesuffix('.weight')}.diff"


_ADAPTERS: Final = {
    "original": _original_adapter,
    "diffusers": _diffusers_adapter,
    "peft": _peft_adapter,
    "comfyui": _comfyui_adapter,
}


def _alpha(weight_file: WeightFile, pair: LoraPair) -> float:
    return weight_file.scale * pair.rank if pair.alpha is None else pair.alpha


def _lora_tensors(weight_file: WeightFile, prefix: str) -> dict[str, StoredTensor]:
    tensors = {}
    for module, pair in weight_file.lora_pairs.items():
        internal = _internal_module(weight_file, module)
        tensors[f"{prefix}{internal}.lora_A.weight"] = pair.down
        tensors[f"{prefix}{internal}.lora_B.weight"] = pair.up
    return tensors


def _lora_config(weight_file: WeightFile) -> dict[str, Any]:
    """Fields of peft's `LoraConfig`: the most frequent rank and alpha, exceptions by full module name."""
    ranks = {_internal_module(weight_file, name): pair.rank for name, pair in weight_file.lora_pairs.items()}
    alphas = {
        _internal_module(weight_file, name): _alpha(weight_file, pair)
        for name, pair in weight_file.lora_pairs.items()
    }
    rank, alpha = _most_frequent(ranks.values()), _most_frequent(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(ranks),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "lora_dropout": 0.0,
    }


def _most_frequent(values: Iterable[Any]) -> Any:
    return max(Counter(values).most_common(1), default=(0, 0))[0]


def _document(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":"))


# The release's config.json


def with_release_config(weight_file: WeightFile) -> WeightFile:
    """`weight_file` with a config.json in the release's terms (`train_architecture`, `lora_rank`, ...).

    Fields that the source has beside those are kept; a config of diffusers or peft is replaced as a whole.
    Full models whose published scripts read no such config have the one that they came with, or none. What
    the source's config says of the network that no shape tells goes on in the metadata.
    """
    source = weight_file.config
    if untold := stated_network(weight_file):
        metadata = {**weight_file.metadata, "avatarctl.network": _document(untold)}
        weight_file = replace(weight_file, metadata=metadata)
    foreign = "peft_type" in source or source.get("_class_name") in _DIFFUSERS_CLASSES
    config = {} if foreign else dict(source)
    known = {
        "in_dim": weight_file.sizes.in_channels,
        "audio_hidden_size": weight_file.sizes.audio_hidden_size,
    }
    if weight_file.kind == "model" and not weight_file.layout.configured:
        config |= {"in_dim": known["in_dim"]} if "in_dim" in config else {}
        return replace(weight_file, config=config)
    stated = config.get("model_config")
    network = dict(stated) if isinstance(stated, Mapping) else {}
    network |= {name: value for name, value in known.items() if value}
    if network:
        config["model_config"] = network
    if weight_file.kind == "adapter" and weight_file.lora_pairs:
        config |= _lora_fields(weight_file, config)
    else:
        config = {name: value for name, value in config.items() if name not in _LORA_FIELDS}
    if weight_file.kind == "model":
        config["train_architecture"] = "full"
    return replace(weight_file, config=config)


def _lora_fields(weight_file: WeightFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Rank and alpha of the largest pair: others are filled up to it."""
    largest = max(weight_file.lora_pairs.values(), key=lambda pair: pair.rank)
    alpha, targets = _alpha(weight_file, largest), _suffixes(weight_file.lora_pairs)
    listed = config.get("lora_target_modules")
    return {
        "train_architecture": "lora",
        "lora_rank": largest.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_target_modules": listed if listed in (targets, ",".join(targets)) else ",".join(targets),
    }


def _suffixes(modules: Iterable[str]) -> list[str]:
    """Module names as the release lists them: "blocks.0.self_attn.q" is "q", "blocks.0.ffn.0" is "ffn.0"."""
    found: dict[str, None] = {}
    for module in modules:
        words = module.split(".")
        found[".".join(words[-2:]) if words[-1].isdigit() else words[-1]] = None
    return list(found)
