"""Which weights are trained, under the names that published files have.

LoRA pairs come from PEFT; tensors that an adapter carries whole are data of the layout of a family's files
(`WeightLayout.replaced`). Whatever is trained is float32: in bfloat16 a weight of 0.05 does not move at a
learning rate of 1e-4 (spec/omniavatar.md j 6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from avatarctl.errors import UnusableWeights, UsageError
from avatarctl.parallel.sharded import part_like
from avatarctl.rng import stable_hash

if TYPE_CHECKING:
    from avatarctl.config.sections import Train
    from avatarctl.weights.layout import WeightLayout

__all__ = ["Trainables", "make_trainable"]

_PAIR: Final = {"lora_A": "lora_A.default", "lora_B": "lora_B.default"}
"""A matrix of a pair as it is written -> as PEFT names it."""


@dataclass(frozen=True)
class Trainables:
    """parameters: by original name ("blocks.0.self_attn.q.lora_A.weight"), in a fixed order; modules: the
    original names of the layers that have adapters."""

    parameters: Mapping[str, nn.Parameter]
    modules: tuple[str, ...]

    @property
    def count(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave. Raises UnusableWeights for other names or shapes."""
        if state.keys() != self.parameters.keys():
            odd = sorted(state.keys() ^ self.parameters.keys())
            raise UnusableWeights(f"{len(odd)} tensors are on one side only; the first: {odd[0][:100]}")
        for name, parameter in self.parameters.items():
            if state[name].shape != parameter.shape:
                stored, own = list(state[name].shape), list(parameter.shape)
                raise UnusableWeights(f"{name} is {stored}, and this run trains {own}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(part_like(state[name], parameter))

    def places(self, dit: nn.Module) -> dict[str, str]:
        """Where in the network each is: its original name -> its own."""
        own = {id(parameter): internal for internal, parameter in dit.named_parameters()}
        return {name: own[id(parameter)] for name, parameter in self.parameters.items()}

    def found_again(self, dit: nn.Module, places: Mapping[str, str]) -> Trainables:
        """The same at their places, in a network whose parameter objects were replaced."""
        held = dict(dit.named_parameters())
        return Trainables({name: held[own] for name, own in places.items()}, self.modules)


def make_trainable(dit: nn.Module, layout: WeightLayout, train: Train, seed: int) -> Trainables:
    """Freezes a network but for what `train.mode` trains, which becomes float32.

    Adapters start as the identity: A as PEFT draws it, from `seed`, B zero. Raises UsageError for a target
    that no layer of the network is named by.
    """
    dit.requires_grad_(False)
    modules: tuple[str, ...] = ()
    if train.mode == "lora":
        modules = _inject(dit, layout, train, seed)
    found: dict[str, nn.Parameter] = {}
    for internal, parameter in dit.named_parameters():
        name = _original(internal, layout, modules)
        if name is not None and (train.mode == "full" or _is_trained(name, layout)):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            found[name] = parameter
    return Trainables(dict(sorted(found.items())), modules)


def _is_trained(name: str, layout: WeightLayout) -> bool:
    """Whether an adapter's training moves the tensor."""
    return layout.is_replaced(name) or name.endswith(tuple(f".{part}.weight" for part in _PAIR))


def _inject(dit: nn.Module, layout: WeightLayout, train: Train, seed: int) -> tuple[str, ...]:
    """Gives every target its pair; the original names of the targets."""
    names: dict[str, str] = {}
    for internal, module in dit.named_modules():
        original = layout.key_map.to_original(f"{internal}.weight")
        if isinstance(module, nn.Linear) and original is not None:
            names[original.removesuffix(".weight")] = internal
    chosen: dict[str, str] = {}
    for target in train.lora_targets:
        ends = {name: own for name, own in names.items() if f".{name}".endswith(f".{target}")}
        if not ends:
            known = ", ".join(sorted({_suffix(name) for name in names if name.startswith("blocks.")}))
            raise UsageError(
                f"no layer is named {target[:60]!r}", where="train.lora_targets", fix=f"there are {known}"
            )
        chosen |= ends
    config = LoraConfig(r=train.lora_rank, lora_alpha=train.lora_alpha, target_modules=list(chosen.values()))
    # PEFT draws from the global generator; it is borrowed and given back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stable_hash("adapters", seed))
        inject_adapter_in_model(config, dit)
    return tuple(sorted(chosen))


def _suffix(name: str) -> str:
    words = name.split(".")
    return ".".join(words[-2:]) if words[-1].isdigit() else words[-1]


def _original(internal: str, layout: WeightLayout, modules: tuple[str, ...]) -> str | None:
    """The published name of a parameter, None for the weight below an adapter."""
    for written, own in _PAIR.items():
        if internal.endswith(f".{own}.weight"):
            module = internal.removesuffix(f".{own}.weight")
            original = layout.key_map.to_original(f"{module}.weight")
            assert original is not None
            return f"{original.removesuffix('.weight')}.{written}.weight"
    return layout.key_map.to_original(internal.replace(".base_layer.", "."))
