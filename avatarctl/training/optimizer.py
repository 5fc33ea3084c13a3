"""AdamW on the weights that are trained, where its moments are, and the learning rate of a step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from avatarctl.errors import ExtraMissing, UnusableWeights
from avatarctl.host import HOST, to_device, to_host
from avatarctl.parallel.sharded import part_like, whole

if TYPE_CHECKING:
    from avatarctl.config.sections import Memory, Train

__all__ = ["MOMENTS", "Optimizer", "learning_rate", "moments_place", "require_optimizer"]

MOMENTS: Final = "moments"
"""What they are, for whoever counts."""

_AT_ONCE: Final = 1 << 25
"""Numbers whose moments come to the device together, where they wait on the host: 256 MiB of them."""


def learning_rate(train: Train, step: int) -> float:
    """Of the optimizer step with `step` steps before it: a function of the configuration and that number
    alone, so a resumed run cannot go astray."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    after = train.max_steps - train.warmup_steps
    held = train.hold * after
    falling = max(after - held, 1.0)
    progress = min(max(step - train.warmup_steps - held, 0.0) / falling, 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return train.final_learning_rate + (train.learning_rate - train.final_learning_rate) * share


def moments_place(memory: Memory, host: torch.device = HOST) -> torch.device | None:
    """Where moments wait between steps, None for where the weights are."""
    return host if memory.optimizer_device == "cpu" else None


def require_optimizer(name: str) -> None:
    """Raises ExtraMissing where the package of an optimizer does not import."""
    if name == "adamw8bit":
        _bitsandbytes()


def _bitsandbytes() -> Any:
    try:
        found = importlib.import_module("bitsandbytes.optim")
    except (ImportError, OSError, RuntimeError) as problem:
        raise ExtraMissing(
            f"adamw8bit needs bitsandbytes, which does not import: {problem}",
            where="train.optimizer",
            fix="pip install 'avatarctl[adamw8bit]', or train.optimizer adamw",
        ) from None
    return found


class Optimizer:
    """AdamW by the names of what it trains; moments are float32 as the weights are, or 8 bits.

    host: where they wait between steps, None for the device. Then they come for their part of a step and go
    back, so the arithmetic is that of the device, bit for bit.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], train: Train, host: torch.device | None = None
    ) -> None:
        self._train, self._parameters, self._host = train, parameters, host
        groups = [list(parameters.values())] if host is None else list(_groups(list(parameters.values())))
        self._parts = [_made(group, train) for group in groups]

    def clip(self) -> Tensor:
        """Scales gradients down to `train.clip_norm`; the norm before, a scalar."""
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self._train.clip_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self, step: int) -> float:
        """One step at the rate of `step`, which is returned; gradients are dropped."""
        rate = learning_rate(self._train, step)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            if self._host is None:
                part.step()
                continue
            waiting = self._bring(part)
            part.step()
            self._put_away(part, waiting, self._host)
        self.drop_gradients()
        return rate

    def _bring(self, part: torch.optim.Optimizer) -> dict[tuple[Tensor, str], Tensor]:
        """Moments to the device; those on the host, by parameter and name."""
        waiting = {}
        for parameter, held in part.state.items():
            for name in _moments(held):
                waiting[parameter, name] = held[name]
                held[name] = to_device(held[name], parameter.device)
        return waiting

    @staticmethod
    def _put_away(
        part: torch.optim.Optimizer, waiting: Mapping[tuple[Tensor, str], Tensor], host: torch.device
    ) -> None:
        """Back to where they waited; a place is made for those of the first step."""
        for parameter, held in part.state.items():
            for name in _moments(held):
                place = waiting.get((parameter, name))
                if place is None:
                    held[name] = to_host(held[name], host, MOMENTS)
                else:
                    held[name] = place.copy_(held[name], non_blocking=True)

    def drop_gradients(self) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> list[Tensor]:
        """The moments that exist, where they are."""
        held = [own for part in self._parts for own in part.state.values()]
        return [own[name] for own in held for name in _moments(own)]

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name; empty before the first step. Of a sharded network all
        processes call it, and the main one gets them."""
        if self._host is not None and torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to the host may be under way
        held = {parameter: own for part in self._parts for parameter, own in part.state.items()}
        return {
            f"{name}.{key}": whole(value) if isinstance(value, Tensor) else torch.tensor(value)
            for name, parameter in self._parameters.items()
            for key, value in held.get(parameter, {}).items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave. Raises UnusableWeights for the moments of other weights."""
        held: dict[Tensor, dict[str, Any]] = {}
        for name, tensor in state.items():
            parameter_name, _, key = name.rpartition(".")
            parameter = self._parameters.get(parameter_name)
            if parameter is None or (key.startswith("exp_avg") and tensor.shape != parameter.shape):
                raise UnusableWeights(f"holds the moments of other weights: {parameter_name[:100]}")
            held.setdefault(parameter, {})[key] = self._placed(key, tensor, parameter)
        if state and len(held) != len(self._parameters):
            raise UnusableWeights(f"holds moments of {len(held)} of {len(self._parameters)} weights")
        for part in self._parts:
            part.state.clear()
            part.state.update({
                parameter: held[parameter]
                for group in part.param_groups
                for parameter in group["params"]
                if parameter in held
            })  # fmt: skip

    def _placed(self, key: str, tensor: Tensor, parameter: Tensor) -> Any:
        if key == "step":
            return int(tensor) if self._train.optimizer == "adamw8bit" else tensor.to("cpu")
        return part_like(tensor, parameter) if self._host is None else to_host(tensor, self._host, MOMENTS)


def _made(parameters: Sequence[nn.Parameter], train: Train) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": train.learning_rate, "betas": train.betas, "weight_decay": train.weight_decay,
    }  # fmt: skip
    if train.optimizer == "adamw8bit":
        made: torch.optim.Optimizer = _bitsandbytes().AdamW8bit(parameters, **settings)
        return made
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    # On a CPU the default is a dozen operations for each tensor.
    return torch.optim.AdamW(parameters, fused=on_cpu or None, **settings)


def _groups(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In their order, `_AT_ONCE` numbers together or one parameter."""
    group: list[nn.Parameter] = []
    for parameter in parameters:
        if group and sum(each.numel() for each in group) + parameter.numel() > _AT_ONCE:
            yield group
            group = []
        group.append(parameter)
    if group:
        yield group


def _moments(held: Mapping[str, Any]) -> list[str]:
    """What is as large as a weight; the number of steps is not."""
    return [name for name, value in held.items() if isinstance(value, Tensor) and name != "step"]
