"""LoRA pairs and the factor they are merged with.

W' = W + alpha / rank * up @ down (Hu et al. 2021, "LoRA"). A file states alpha by a tensor of its own
(`.alpha`), in its metadata, or in a config beside it. Where nothing does, the rule of its naming holds:
OmniAvatar names (`blocks.N….lora_A[.default].weight`, no prefix) take the published ratio 64 / 128, all
others 1, as ComfyUI, kohya's scripts and diffusers do (spec/field.md 4a).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from avatarctl.errors import UnusableWeights
from avatarctl.weights.checkpoint import LowRank, Naming
from avatarctl.weights.naming import Names
from avatarctl.weights.tensors import DTYPES, Tensor, read_whole, to_float32

__all__ = ["Pairs", "read_pairs"]

Value = TypeVar("Value")

PUBLISHED_RATIO: Final = 0.5


@dataclass(frozen=True)
class Pairs:
    """low_rank: by original module; scale and scale_rule: see `Checkpoint`."""

    low_rank: Mapping[str, LowRank]
    scale: float
    scale_rule: str


@dataclass(frozen=True)
class _Stated:
    """What a config or metadata says of alpha. Patterns are by module name as in the file."""

    source: str
    alpha: float
    rank: int | None = None
    by_root_of_rank: bool = False
    alphas: Mapping[str, float] | None = None
    ranks: Mapping[str, int] | None = None

    def alpha_of(self, module: str, pair: LowRank) -> float:
        """Alpha of one module. Raises UnusableWeights where the stated rank is not that of the tensors."""
        rank = _pattern(self.ranks, module, self.rank)
        if rank is not None and rank != pair.rank:
            raise UnusableWeights(f"{module[:100]} has rank {pair.rank}, and {self.source} says {rank}")
        alpha = _pattern(self.alphas, module, self.alpha)
        assert alpha is not None
        # Rank-stabilised LoRA divides by the root of the rank (Kalajdzievski 2023).
        return alpha * math.sqrt(pair.rank) if self.by_root_of_rank else alpha


def _pattern(values: Mapping[str, Value] | None, module: str, default: Value | None) -> Value | None:
    """The value of the key that a module's name ends with. PEFT reads keys as regular expressions;
    a stranger's are not run here."""
    for key, value in (values or {}).items():
        if module == key or module.endswith(f".{key}"):
            return value
    return default


def read_pairs(
    names: Names, tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> Pairs:
    """The LoRA pairs of a file, with the alpha of each as far as anything states it.

    Raises UnusableWeights for half a pair, for ranks that disagree, for an alpha that is no finite number,
    and for a config that says LoRA and lacks alpha.
    """
    parts: dict[str, dict[str, str]] = {}
    for name, placed in names.placed.items():
        if placed.role in ("down", "up", "alpha"):
            parts.setdefault(placed.name, {})[placed.role] = name
    stated = _stated(config, metadata)
    if not parts:
        return Pairs({}, 1.0, "")
    low_rank = {module: _pair(module, part, tensors) for module, part in parts.items()}
    own = sum(pair.alpha is not None for pair in low_rank.values())
    if stated is not None:
        for module, pair in low_rank.items():
            if pair.alpha is None:
                in_file = names.module_in_file(parts[module]["down"])
                low_rank[module] = replace(pair, alpha=stated.alpha_of(in_file, pair))
    scale, rule = _rule(names.naming, own, len(low_rank), stated)
    return Pairs(low_rank, scale, rule)


def _rule(naming: Naming, own: int, pairs: int, stated: _Stated | None) -> tuple[float, str]:
    if own == pairs:
        return 1.0, "alpha of each target, in the file"
    some = f"alpha in the file for {own} of {pairs} targets, else " if own else ""
    if stated is not None:
        ranks = "" if stated.rank is None else f" / rank {stated.rank}"
        return 1.0, f"{some}alpha {stated.alpha:g}{ranks} from {stated.source}"
    if naming == "original":
        return PUBLISHED_RATIO, f"{some}no alpha is stated: 0.5, the published ratio, by OmniAvatar's names"
    return 1.0, f"{some}no alpha is stated: 1, by {naming} names"


def _pair(module: str, part: Mapping[str, str], tensors: Mapping[str, Tensor]) -> LowRank:
    for role, name in (("down", "lora_A"), ("up", "lora_B")):
        if role not in part:
            raise UnusableWeights(f"{module} lacks its {name}: half of a LoRA pair is missing")
    down, up = tensors[part["down"]], tensors[part["up"]]
    for tensor, name in ((down, part["down"]), (up, part["up"])):
        if len(tensor.info.shape) != 2 or 0 in tensor.info.shape:
            raise UnusableWeights(f"{name[:100]}: a LoRA matrix with shape {list(tensor.info.shape)}")
    if down.info.shape[0] != up.info.shape[1]:
        raise UnusableWeights(
            f"{module}: LoRA ranks disagree, lora_A has shape {list(down.info.shape)} and lora_B "
            f"{list(up.info.shape)}"
        )
    return LowRank(down, up, _alpha(part["alpha"], tensors) if "alpha" in part else None)


def _alpha(name: str, tensors: Mapping[str, Tensor]) -> float:
    tensor = tensors[name]
    if tensor.info.numel != 1:
        raise UnusableWeights(f"{name[:100]}: an alpha of shape {list(tensor.info.shape)}, not one number")
    array = read_whole(tensor).reshape(-1)
    dtype = tensor.info.dtype
    return _number(float((to_float32(array, dtype) if DTYPES[dtype].floating else array)[0]), name)


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UnusableWeights(f"{what[:100]} is {str(value)[:40]}, not a finite number")
    return float(value)


def _stated(config: Mapping[str, Any], metadata: Mapping[str, str]) -> _Stated | None:
    if config.get("peft_type") is not None:
        return _of_peft(config, "adapter_config.json")
    if config.get("train_architecture") == "lora":
        if "lora_alpha" not in config:
            raise UnusableWeights("config.json says LoRA and lacks lora_alpha: the merge scale is unknown")
        return _Stated(
            "config.json",
            _number(config["lora_alpha"], "lora_alpha"),
            _rank(config.get("lora_rank"), "lora_rank"),
        )
    if "lora_adapter_metadata" in metadata:
        try:
            # diffusers writes one dictionary with the names of PEFT's config, each after the model's part.
            stated = json.loads(metadata["lora_adapter_metadata"])
            fields = {key.rpartition(".")[2]: value for key, value in stated.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise UnusableWeights("the metadata lora_adapter_metadata is no JSON object") from error
        return _of_peft(fields, "the file's metadata")
    if "ss_network_alpha" in metadata:
        try:
            return _Stated(
                "the file's metadata", _number(float(metadata["ss_network_alpha"]), "ss_network_alpha")
            )
        except ValueError as error:
            raise UnusableWeights("the metadata ss_network_alpha is no number") from error
    return None


def _of_peft(fields: Mapping[str, Any], source: str) -> _Stated:
    if fields.get("peft_type", "LORA") != "LORA" or fields.get("use_dora"):
        raise UnusableWeights(f"{source}: only plain LoRA is read, not DoRA or other kinds")
    if "lora_alpha" not in fields:
        raise UnusableWeights(f"{source} lacks lora_alpha: the merge scale is unknown")
    return _Stated(
        source,
        _number(fields["lora_alpha"], "lora_alpha"),
        _rank(fields.get("r"), "r"),
        bool(fields.get("use_rslora")),
        {key: _number(value, f"alpha of {key}") for key, value in _object(fields, "alpha_pattern").items()},
        {
            key: int(_number(value, f"rank of {key}"))
            for key, value in _object(fields, "rank_pattern").items()
        },
    )


def _object(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = fields.get(name) or {}
    if not isinstance(value, Mapping):
        raise UnusableWeights(f"{name} is no JSON object")
    return value


def _rank(value: object, what: str) -> int | None:
    return None if value is None else int(_number(value, what))
