"""A network that learns by numbered steps, and goes on where it was stopped, bit for bit.

Whatever a step draws is keyed by its number, so no state of a generator has to be kept. What is kept is one
file, replaced as a whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from avatarctl.atomic import atomic_write_bytes, atomic_write_text
from avatarctl.errors import Interrupted, UnusableWeights
from avatarctl.events import Emit, Notice, TrainingStepFinished
from avatarctl.rng import stable_hash

__all__ = ["Learner", "Moved", "learn", "seeded"]

STATE: Final = "state.safetensors"
SCORES: Final = "scores.jsonl"
_SAVE_SECONDS: Final = 60.0


class Learner(Protocol):
    """title: for people; steps: when it is done at the latest; score_every: steps between two scores."""

    title: str
    steps: int
    score_every: int

    def step(self, number: int) -> float:
        """The step of this number, from 0 on; returns its loss."""

    def score(self) -> dict[str, float]:
        """How good it is now, on seeds that it does not learn from. Changes nothing."""

    def good_enough(self, score: Mapping[str, float]) -> bool:
        """Whether it may stop early."""

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """What `tensors` gave."""


class Moved:
    """Weights and the optimizers that move them, as tensors by name."""

    def __init__(self, modules: Mapping[str, nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.modules, self.optimizers = dict(modules), list(optimizers)
        self._rates = [[group["lr"] for group in each.param_groups] for each in self.optimizers]

    def move(self, loss: Tensor, rate: float, clip: Iterable[nn.Parameter]) -> None:
        """One step downhill, at this share of each optimizer's learning rate."""
        for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * rate
        loss.backward()
        nn.utils.clip_grad_norm_(clip, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        found = {
            f"weights.{name}.{key}": tensor
            for name, module in self.modules.items()
            for key, tensor in module.state_dict().items()
        }
        for number, optimizer in enumerate(self.optimizers):
            for place, values in optimizer.state_dict()["state"].items():
                found |= {f"optimizer.{number}.{place}.{key}": tensor for key, tensor in values.items()}
        return {name: tensor.detach().contiguous() for name, tensor in found.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, module in self.modules.items():
            prefix = f"weights.{name}."
            held = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            module.load_state_dict(held)
        for number, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith(f"optimizer.{number}."):
                    place, name = key.removeprefix(f"optimizer.{number}.").split(".", 1)
                    state.setdefault(int(place), {})[name] = tensor
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})


@contextmanager
def seeded(*key: str | int) -> Iterator[None]:
    """Networks initialise themselves from the global generator: inside, it belongs to this key alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stable_hash(*key))
        yield


def learn(
    learner: Learner, folder: Path, emit: Emit, should_stop: Callable[[], bool], made_by: str
) -> dict[str, Any]:
    """Takes the steps that are left; what it became is in `learner`. Returns steps, seconds and last score.

    folder: its own; made_by: what the state depends on, so that no other recipe goes on with it.
    Raises Interrupted, behind a saved step; UnusableWeights for a state that cannot be read or is of another
    making.
    """
    folder.mkdir(parents=True, exist_ok=True)
    step, spent, score = _load(learner, folder, made_by)
    if step:
        emit(Notice(f"{learner.title}: goes on behind step {step}"))
    log = [line for line in _scores(folder) if line["step"] <= step]
    clock = saved = time.monotonic()
    done = bool(score) and learner.good_enough(score)
    while step < learner.steps and not done:
        loss = learner.step(step)
        step += 1
        now = time.monotonic()
        if step % learner.score_every == 0 or step == learner.steps:
            score = learner.score()
            log.append({"step": step, "minutes": round(spent / 60, 2), "loss": loss, **score})
            done = learner.good_enough(score)
        took, clock = now - clock, now
        spent += took
        left = spent / step * (learner.steps - step)
        emit(TrainingStepFinished(step, learner.steps, {"loss": loss, **score}, took, left))
        stop = should_stop()
        if stop or done or step == learner.steps or now - saved > _SAVE_SECONDS:
            facts = {"step": step, "seconds": spent, "score": score, "made_by": made_by}
            _save(learner, folder, facts, log)
            saved = time.monotonic()
        if stop and step < learner.steps and not done:
            fix = "the same command goes on"
            raise Interrupted(f"{learner.title}: stopped after step {step}, which is saved", fix=fix)
    return {"steps": step, "minutes": round(spent / 60, 1), **score}


def _save(learner: Learner, folder: Path, facts: Mapping[str, Any], log: Iterable[Any]) -> None:
    atomic_write_text(folder / SCORES, "".join(f"{json.dumps(line)}\n" for line in log))
    atomic_write_bytes(folder / STATE, save(learner.tensors(), {"facts": json.dumps(facts)}))


def _load(learner: Learner, folder: Path, made_by: str) -> tuple[int, float, dict[str, float]]:
    path = folder / STATE
    if not path.is_file():
        return 0, 0.0, {}
    fix = f"delete {folder.name}/ and it is made again"
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            if facts["made_by"] != made_by:
                raise UnusableWeights("was made by another recipe, seed or version", where=path, fix=fix)
            learner.load({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UnusableWeights("is damaged", where=path, fix=fix) from error
    return facts["step"], facts["seconds"], facts["score"]


def _scores(folder: Path) -> list[dict[str, Any]]:
    path = folder / SCORES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
