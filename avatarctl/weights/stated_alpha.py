"""What a header or a config says of alpha, and whether it describes an update that a merge can express.

Three vocabularies: fields of PEFT's `LoraConfig` (adapter_config.json, and diffusers' `lora_adapter_metadata`
in the header), a release's config.json, and kohya's `ss_network_alpha`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from avatarctl.errors import UnusableWeights
from avatarctl.files.strict_json import parse_object
from avatarctl.weights.naming import Names, plain_name

__all__ = ["CHANGES_THE_UPDATE", "HARMLESS", "StatedAlpha", "finite_number", "stated_alpha"]

HEADER: Final = "the file's metadata"

PLAIN_STARTS: Final = (None, True, False, "gaussian", "kaiming", "eva", "orthogonal", "mica")
"""`init_lora_weights` that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract something
from it first (Meng et al. 2024, Büyükakyüz 2024, Yang et al. 2024, Li et al. 2023, Wang et al. 2024)."""

CHANGES_THE_UPDATE: Final = (
    "use_dora", "use_qalora", "layer_replication", "alora_invocation_tokens", "lora_bias",
    "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "trainable_token_indices",
)  # fmt: skip
"""Fields of PEFT's LoraConfig with which W + alpha / rank * up @ down is not the whole update."""

HARMLESS: Final = frozenset((
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias",
    "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "qalora_group_size", "megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying",
    "fan_in_fan_out",
))  # fmt: skip
"""Fields that are read here, or say which modules, how they started or how they were trained. PEFT turns
`fan_in_fan_out` off for linear layers, the only ones in these networks."""


Patterns = Mapping[str, tuple[int, float]]
"""Values by module name or its end, "^" before a whole name. With their positions: the first one counts."""


@dataclass(frozen=True)
class StatedAlpha:
    """source: where it is stated, for people; rank: the usual one, None where not stated; by_root_of_rank:
    alpha is divided by the root of the rank (Kalajdzievski 2023); alphas, ranks: exceptions; notes: what was
    not obeyed, one line each."""

    source: str
    alpha: float
    rank: int | None = None
    by_root_of_rank: bool = False
    alphas: Patterns = field(default_factory=dict)
    ranks: Patterns = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, module: str, rank: int) -> float:
        """Alpha of a module by its name in the file, as stated.

        Raises UnusableWeights where the stated rank is not `rank`, that of its tensors.
        """
        stated = _value(self.ranks, module, self.rank)
        if stated is not None and stated != rank:
            raise UnusableWeights(f"{module[:100]} has rank {rank}, and {self.source} says {stated:g}")
        alpha = _value(self.alphas, module, self.alpha)
        assert alpha is not None
        return alpha

    def is_exception(self, module: str) -> bool:
        """Whether a pattern names the module."""
        return any(each in self.alphas or each in self.ranks for each in _ways_to_name(module))

    def idle(self, modules: Iterable[str]) -> list[str]:
        """Patterns that name none of the modules."""
        named = {way for module in modules for way in _ways_to_name(module)}
        return [pattern for pattern in dict.fromkeys((*self.alphas, *self.ranks)) if pattern not in named]

    def __str__(self) -> str:
        rank = "rank" if self.rank is None else f"rank {self.rank}"
        below = "" if self.rank is None else f" / {rank}"
        if self.by_root_of_rank:
            below = f" / sqrt({rank})"
        return f"alpha {self.alpha:g}{below} from {self.source}"


def _value(patterns: Patterns, module: str, default: float | None) -> float | None:
    found = [patterns[way] for way in _ways_to_name(module) if way in patterns]
    return min(found)[1] if found else default


def _ways_to_name(module: str) -> list[str]:
    """The patterns that name a module: the whole name, and each of its ends ("attn1.to_q")."""
    words = module.split(".")
    return [f"^{module}", *(".".join(words[i:]) for i in range(len(words)))]


def _patterns(fields: Mapping[str, Any], name: str) -> dict[str, tuple[int, float]]:
    """alpha_pattern or rank_pattern."""
    value = fields.get(name) or {}
    if not isinstance(value, Mapping):
        raise UnusableWeights(f"{name} is no JSON object")
    read: dict[str, tuple[int, float]] = {}
    for i, (pattern, each) in enumerate(value.items()):
        read.setdefault(_plain(pattern, name), (i, finite_number(each, f"{name} of {pattern}")))
    return read


def _plain(pattern: str, what: str) -> str:
    """A pattern without wrappers of the name. PEFT runs it as a regular expression; a stranger's are not run
    here: escaped dots and the anchors are understood, and all others refused."""
    anchor = "^" if pattern.startswith("^") else ""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not name or any(sign in "\\[](){}*+?|^$" for sign in name):
        raise UnusableWeights(
            f"{what} has the regular expression {pattern[:100]}: only module names are read",
            fix="write out the names of the modules in its place",
        )
    return anchor + plain_name(name)


def finite_number(value: object, what: str) -> float:
    """`value` as a float. Raises UnusableWeights, naming `what`, for anything but a finite number."""
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond every float
        pass
    raise UnusableWeights(f"{what[:100]} is {repr(value)[:40]}, not a finite number")


def stated_alpha(names: Names, config: Mapping[str, Any], metadata: Mapping[str, str]) -> StatedAlpha | None:
    """What is stated for the LoRA pairs of a file, None for nothing; the file's own header comes first.

    Raises UnusableWeights for a LoRA without alpha, and for what is no plain LoRA.
    """
    if "lora_adapter_metadata" in metadata:
        return _of_peft(_of_diffusers(metadata["lora_adapter_metadata"], names), HEADER)
    if config.get("peft_type") is not None:
        return _of_peft(config, "adapter_config.json")
    architecture = config.get("train_architecture")
    if architecture == "full":
        raise UnusableWeights("config.json says a full model, and the file has LoRA tensors")
    if "lora_alpha" in config:
        _refuse_changed_base(config, "config.json")
        rank = _rank(config.get("lora_rank"), "lora_rank")
        return StatedAlpha("config.json", finite_number(config["lora_alpha"], "lora_alpha"), rank)
    if isinstance(architecture, str) and architecture.lower() == "lora":
        raise UnusableWeights(
            "config.json says LoRA and lacks lora_alpha: the merge scale is unknown",
            fix='add "lora_alpha" to config.json, as it was trained; the published one is 64, rank 128',
        )
    if "ss_network_alpha" in metadata and names.naming == "kohya":
        try:
            alpha = float(metadata["ss_network_alpha"])
        except ValueError as error:
            raise UnusableWeights("the metadata ss_network_alpha is no number") from error
        return StatedAlpha(HEADER, finite_number(alpha, "ss_network_alpha"))
    return None


def _of_diffusers(text: str, names: Names) -> Mapping[str, Any]:
    """The fields for the network's part of the pipeline. diffusers writes one dictionary, each field behind
    the part that it is for ("transformer.lora_alpha"), or bare for a network saved alone."""
    stated = parse_object(text, None, "the metadata lora_adapter_metadata is")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in stated.items():
        part, _, name = key.rpartition(".")
        parts.setdefault(part, {})[name] = value
    # "transformer" is what diffusers calls names with other prefixes.
    for part in (*(prefix.rstrip(".") for prefix in names.prefixes), "transformer", ""):
        if part in parts:
            return parts[part]
    of = f" for these tensors, only for {min(parts)[:100]}" if parts else ""
    raise UnusableWeights(f"{HEADER} lacks lora_alpha{of}: the merge scale is unknown")


def _of_peft(fields: Mapping[str, Any], source: str) -> StatedAlpha:
    if fields.get("peft_type", "LORA") != "LORA" or fields.get("use_dora"):
        raise UnusableWeights(f"{source}: only plain LoRA is read, not DoRA or other kinds")
    for name in CHANGES_THE_UPDATE:
        if fields.get(name):
            raise UnusableWeights(
                f"{source} says {name}: its update is not alpha / rank * lora_B @ lora_A",
                fix="merge it with peft, and give the merged model",
            )
    _refuse_changed_base(fields, source)
    if "lora_alpha" not in fields:
        raise UnusableWeights(
            f"{source} lacks lora_alpha: the merge scale is unknown",
            fix='add "lora_alpha", as it was trained',
        )
    strange = [name for name in fields if name not in (*HARMLESS, *CHANGES_THE_UPDATE) and fields[name]]
    return StatedAlpha(
        source,
        finite_number(fields["lora_alpha"], "lora_alpha"),
        _rank(fields.get("r"), "r"),
        bool(fields.get("use_rslora")),
        _patterns(fields, "alpha_pattern"),
        _patterns(fields, "rank_pattern"),
        tuple(f"{source} says {name[:100]}, which is not known here and is ignored" for name in strange),
    )


def _refuse_changed_base(fields: Mapping[str, Any], source: str) -> None:
    start = fields.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in PLAIN_STARTS:
        raise UnusableWeights(
            f"{source} says init_lora_weights {str(start)[:40]!r}, which changes the base as well",
            fix="let peft convert it: save_pretrained with path_initial_model_for_weight_conversion",
        )


def _rank(value: object, what: str) -> int | None:
    return None if value is None else int(finite_number(value, what))
