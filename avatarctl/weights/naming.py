"""Names of tensors as people write them -> original name and role.

Five conventions are read (spec/field.md 4a, spec/building-blocks.md 1):

    original    blocks.0.self_attn.q.weight         the release, also with `pipe.dit.` and the like
    diffusers   blocks.0.attn1.to_q.weight
    peft        base_model.model.<either>.lora_A.weight
    comfyui     diffusion_model.<original>.lora_A.weight, .lora_down.weight, .alpha, .diff, .diff_b, .diff_m
    kohya       lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha; also lora_transformer_, and either
                with a second underscore

A name that no rule places is returned as unknown, never dropped.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal

from avatarctl.errors import UnusableWeights
from avatarctl.weights.layout import WeightLayout
from avatarctl.weights.weight_file import Naming

__all__ = ["Names", "Placed", "Role", "nearest_form", "place_names", "plain_name"]

Role = Literal["tensor", "down", "up", "alpha", "diff"]

_PREFIXES: Final = (
    "pipe.dit.", "model.diffusion_model.", "diffusion_model.", "base_model.model.", "transformer.", "module.",
    "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.", "model.",
    "dit.",
)  # fmt: skip
_INNER: Final = re.compile(
    r"(?<=([._]))(_orig_mod|module|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\1"
)
"""What wrappers (torch.compile, DDP, FSDP, activation checkpointing) put in front of a part of a network."""
_FLAT: Final = re.compile(r"lora_(unet|transformer)__?")
"""In front of names whose dots are underscores. A second underscore joins the network's own empty name."""

_ENDINGS: Final[tuple[tuple[re.Pattern[str], Role, str], ...]] = tuple(
    (re.compile(rf"(?P<module>.+)\.(?:{pattern})"), role, leaf)  # type: ignore[misc]
    for pattern, role, leaf in (
        (r"lora_A(\.\w+)?\.weight", "down", ""),
        (r"lora_B(\.\w+)?\.weight", "up", ""),
        (r"lora[_.]down\.weight", "down", ""),
        (r"lora[_.]up\.weight", "up", ""),
        (r"alpha", "alpha", ""),
        (r"diff_b|b_norm", "diff", "bias"),
        (r"diff_m", "diff", "modulation"),
        (r"diff|w_norm", "diff", "weight"),
        (r"set_weight", "tensor", "weight"),
        (r"modules_to_save\.\w+\.weight", "tensor", "weight"),
        (r"modules_to_save\.\w+\.bias", "tensor", "bias"),
        (r"base_layer\.bias", "tensor", "bias"),
    )
)
"""How names end, of what, and which tensor of the module that is. A "tensor" replaces the base's;
`base_layer.bias` is PEFT's `bias="lora_only"`."""
_OTHER_ADAPTERS: Final = re.compile(
    r".*\.(dora_scale|lora_magnitude_vector.*|hada_\w+|lokr_\w+|oft_\w+|reshape_weight)"
)
_SCALED_FLOAT8: Final = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|scale_input)")


@dataclass(frozen=True)
class Placed:
    """role "tensor": a whole tensor called `name`; "diff": added to tensor `name`; the others: part of the
    LoRA pair of module `name`. All names are original ones."""

    role: Role
    name: str

    @property
    def weight(self) -> str:
        """Name of the tensor that this is or changes."""
        return self.name if self.role in ("tensor", "diff") else f"{self.name}.weight"


@dataclass
class Names:
    """placed: name in the file -> its place; unknown: names in the file without one, in order; replaces:
    whether a name says that its tensor replaces one of the base (`.set_weight` and the like)."""

    naming: Naming
    placed: dict[str, Placed] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    prefixes: Counter[str] = field(default_factory=Counter)
    replaces: bool = False

    def of(self, role: Role) -> dict[str, str]:
        """Original name -> name in the file, of one role."""
        return {placed.name: key for key, placed in self.placed.items() if placed.role == role}

    def module_in_file(self, name: str) -> str:
        """The module that a LoRA tensor of the file changes, under the file's own naming, wrappers off."""
        return _weight_of(_strip(name)[1]).removesuffix(".weight")

    @property
    def notes(self) -> tuple[str, ...]:
        """What was taken off, one line for each prefix."""
        return tuple(
            f"the prefix {prefix!r} of {count} names was taken off" for prefix, count in self.prefixes.items()
        )


def plain_name(name: str) -> str:
    """A name without wrappers; for a LoRA tensor, the weight that it changes."""
    return _weight_of(_strip(name)[1])


def place_names(names: Iterable[str], layout: WeightLayout) -> Names:
    """Where each name of a file belongs in a layout.

    Raises UnusableWeights for two names with one place, and for kinds of adapters and of quantisation that
    cannot be read as what they are.
    """
    names = list(names)
    _refuse_foreign(names)
    stripped = {name: _strip(name) for name in names}
    translate = _Translator(layout, [rest for _, rest in stripped.values()])
    found = Names(translate.naming)
    taken: dict[Placed, str] = {}
    for name, (prefix, rest) in stripped.items():
        placed = _place(rest, _FLAT.search(prefix) is not None, translate)
        if placed is None:
            found.unknown.append(name)
            continue
        if placed in taken:
            raise UnusableWeights(f"{taken[placed][:100]} and {name[:100]} are two names of one tensor")
        taken[placed] = name
        found.placed[name] = placed
        ended = _ended(rest)
        found.replaces |= ended is not None and ended[1] == "tensor"
        if prefix:
            found.prefixes[prefix] += 1
    found.naming = _naming(found, translate.naming)
    return found


def nearest_form(name: str, layout: WeightLayout) -> str:
    """The name that is read and most like one that is not; N is a block's number. Empty for strangers."""
    prefix, rest = _strip(name[:200])
    asked = re.sub(r"(?<=blocks[._])\d+", "N", rest)
    templates = [each.replace("{n}", "N") for rule in layout.key_map.rules for each in rule]
    modules = [each.removesuffix(".{rest}") for each in templates]
    module, _, ending = asked.partition(".lora")
    if "." not in module:
        modules = [each.replace(".", "_") for each in modules]
        if _FLAT.search(prefix) is None:
            prefix, module, asked = "", prefix + module, prefix + asked
            modules = ["lora_unet_" + each for each in modules]
    if ended := _ended(asked):
        module = ended[0]
    elif not ending:
        module = asked.rpartition(".")[0]
    found = next(iter(difflib.get_close_matches(module, modules, n=1, cutoff=0.75)), "")
    return found and prefix + found + (asked[len(module) :] if ended or not ending else ".lora_A.weight")


def _refuse_foreign(names: list[str]) -> None:
    for name in names:
        if _OTHER_ADAPTERS.fullmatch(name):
            raise UnusableWeights(f"{name[:100]}: only plain LoRA is read, not DoRA, LoHa, LoKr or OFT")
        if _SCALED_FLOAT8.fullmatch(name):
            raise UnusableWeights(
                f"{name[:100]}: float8 with scales of its own is not read",
                fix="use the bfloat16 file it was made from",
            )


def _strip(name: str) -> tuple[str, str]:
    """What stands in front of a name (wrappers, what says that it is flat, wrappers inside it); the rest."""
    taken = inside = ""
    while prefix := next((each for each in _PREFIXES if name.startswith(each)), ""):
        taken, name = taken + prefix, name[len(prefix) :]
    for inner in dict.fromkeys(match[0] for match in _INNER.finditer(name)):
        inside += "" if inner in taken else inner
    name = _INNER.sub("", name)
    flat = match[0] if (match := _FLAT.match(name)) else ""
    return taken + flat + inside, name[len(flat) :]


class _Translator:
    """Names of one file to original ones, whichever of the two namings the file uses."""

    def __init__(self, layout: WeightLayout, names: list[str]) -> None:
        self.layout = layout
        weights = [_weight_of(name) for name in names]
        original = sum(layout.key_map.to_internal(name) is not None for name in weights)
        internal = sum(layout.key_map.to_original(name) is not None for name in weights)
        # Some names are the same in both; what only one of them knows decides.
        self.naming: Naming = "diffusers" if internal > original else "original"

    def tensor(self, name: str) -> str | None:
        """Original name of a whole tensor."""
        if self.layout.owns(name):
            return name
        if self.naming == "diffusers":
            return self.layout.key_map.to_original(name)
        return name if self.layout.key_map.to_internal(name) is not None else None

    def module(self, name: str, flat: bool) -> str | None:
        """Original name of a module that has a weight."""
        if flat:
            return next(
                (
                    target.replace("{n}", "".join(match.groups()))
                    for pattern, target in self._flat_modules
                    if (match := pattern.fullmatch(name))
                ),
                None,
            )
        weight = self.tensor(f"{name}.weight")
        return None if weight is None else weight.removesuffix(".weight")

    @cached_property
    def _flat_modules(self) -> list[tuple[re.Pattern[str], str]]:
        """Module names whose dots were written as underscores, in either naming, and the original ones."""
        patterns = []
        for original, internal in self.layout.key_map.rules:
            if original.endswith(".{rest}"):
                for source in (original, internal):
                    flat = re.escape(source.removesuffix(".{rest}").replace(".", "_"))
                    pattern = re.compile(flat.replace(r"\{n\}", r"(\d+)"))
                    patterns.append((pattern, original.removesuffix(".{rest}")))
        return patterns


def _weight_of(name: str) -> str:
    """The name of the weight that a LoRA tensor changes; other names as they are."""
    ended = _ended(name)
    return name if ended is None or ended[1] == "tensor" else f"{ended[0]}.weight"


def _ended(name: str) -> tuple[str, Role, str] | None:
    """The module in front of one of `_ENDINGS`, and what this says; None for other names."""
    found = ((match, role, leaf) for pattern, role, leaf in _ENDINGS if (match := pattern.fullmatch(name)))
    return next(((match["module"], role, leaf) for match, role, leaf in found), None)


def _place(name: str, flat: bool, translate: _Translator) -> Placed | None:
    if ended := _ended(name):
        target, role, leaf = ended
        named = role == "tensor" and target.endswith((".weight", ".bias"))
        if not named and (module := translate.module(target, flat)):
            return Placed(role, f"{module}.{leaf}" if leaf else module)
        if (leaf == "modulation" or name.endswith((".diff", ".set_weight"))) and not flat:
            # ComfyUI names what is no module's weight in full: blocks.0.modulation.diff.
            parameter = translate.tensor(f"{target}.{leaf}" if leaf == "modulation" else target)
            return None if parameter is None else Placed(role, parameter)
        if role == "tensor":
            return None
    if flat:
        return None
    whole = translate.tensor(name)
    return None if whole is None else Placed("tensor", whole)


def _naming(found: Names, base: Naming) -> Naming:
    """The convention as people call it."""
    prefixes = "".join(found.prefixes)
    if _FLAT.search(prefixes):
        return "kohya"
    if "base_model.model." in prefixes:
        return "peft"
    if "diffusion_model." in prefixes:
        return "comfyui"
    return "diffusers" if "transformer." in prefixes else base
