"""The loop: samples in, a step of the optimizer, a line in the log, now and then a checkpoint."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from torch import Tensor

from avatarctl.config import value_of
from avatarctl.data.training_set import TrainingData, TrainingSample
from avatarctl.errors import AvatarctlError, Interrupted, UnusableFile, under_name
from avatarctl.events import Emit, Notice, TrainingStepFinished
from avatarctl.loading.trained import checkpoints
from avatarctl.models.device import peak_memory
from avatarctl.parallel.world import World
from avatarctl.training.aux_step import AuxBatch, AuxStep
from avatarctl.training.checkpoints import Checkpoint, rotate, write_checkpoint
from avatarctl.training.curves import draw_curves
from avatarctl.training.network import Network
from avatarctl.training.objective import FlowStep, flow_step, training_noise
from avatarctl.training.optimizer import Optimizer, moments_place
from avatarctl.training.order import Order, own_slots, samples_per_step
from avatarctl.training.run_folder import CUT, LOG, TIMING, RunFolder

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.family import Condition, Draw, Timesteps, TrainableFamily
    from avatarctl.training.validation import Validation

__all__ = ["Trainer"]

_Pass: TypeAlias = "list[tuple[TrainingSample, Draw]]"
"""Samples that go through the network together, each with the key of its random numbers."""

_PATIENCE: Final = 5
"""Steps in a row with numbers that are not finite before a run ends."""


@dataclass
class _Sums:
    """Numbers of a step, each averaged over the samples that have it: however the step is cut into passes and
    processes. They stay on the device until all passes are done: to read one is to wait for it.

    sums: for each pass the sum and the number of samples, in their order; totals: of each pass the names of
    its samples and what was minimised, [B].
    """

    sums: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)
    totals: list[tuple[list[str], Tensor]] = field(default_factory=list)

    def add(self, name: str, values: Tensor) -> None:
        """values: one for each sample that has it."""
        self.sums.setdefault(name, []).append((values.detach().double().sum(), len(values)))

    def read(self) -> tuple[dict[str, list[tuple[float, int]]], list[str]]:
        """The sums as numbers, by one copy, and the names of samples whose total is not finite."""
        entries = [(name, count) for name, values in self.sums.items() for _, count in values]
        held = [value.reshape(1) for values in self.sums.values() for value, _ in values]
        names = [name for own, _ in self.totals for name in own]
        numbers = torch.cat([*held, *(total.detach().double() for _, total in self.totals)]).tolist()
        parts: dict[str, list[tuple[float, int]]] = {}
        for (name, count), value in zip(entries, numbers, strict=False):
            parts.setdefault(name, []).append((value, count))
        of_samples = zip(names, numbers[len(entries) :], strict=True)
        return parts, [name for name, total in of_samples if not math.isfinite(total)]

    @staticmethod
    def means(of_processes: Sequence[Mapping[str, list[tuple[float, int]]]]) -> dict[str, float]:
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for parts in of_processes:
            for name, values in parts.items():
                for value, count in values:  # in order: how `sum` adds depends on the version of Python
                    sums[name] = sums.get(name, 0.0) + value
                    counts[name] = counts.get(name, 0) + count
        return {name: total / counts[name] for name, total in sums.items()}


def _unwatched(name: str) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass
class Trainer:
    """One run. `network` holds what is trained; `start` the SHA-256 of the files that it began with, by name;
    `step` counts the optimizer steps that are done; `world` the processes that share its samples; `phase` is
    entered, by its name as `vram-profile` has it, for each part of the work."""

    folder: RunFolder
    cfg: RunConfig
    family: TrainableFamily
    network: Network
    data: TrainingData
    emit: Emit
    aux: AuxStep | None = None
    start: Mapping[str, str] = field(default_factory=dict)
    world: World = field(default_factory=World)
    validation: Validation | None = None
    phase: Callable[[str], AbstractContextManager[Any]] = _unwatched
    step: int = 0
    failed: dict[str, AvatarctlError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        train = self.cfg.train
        assert self.cfg.runtime.gpus == self.world.size
        self._slots = samples_per_step(self.cfg)
        own = own_slots(self.cfg, self.world.rank)
        self._order = Order(self.cfg.runtime.seed, len(self.data.names), self._slots, own)
        self._optimizer = Optimizer(self.network.trainables.parameters, train, moments_place(self.cfg.memory))
        self._in_a_row = 0
        self._odd: list[str] = []
        self._news: dict[str, AvatarctlError] = {}
        self.failed.update(self.data.bad)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Goes on behind a checkpoint. Raises UnusableWeights for one of another model."""
        self.network.load(checkpoint.trained(), checkpoint.averaged())
        self._optimizer.load(checkpoint.optimizer())
        self.step = checkpoint.step

    def tensors(self) -> list[Any]:
        """Networks, and tensors beside them, that a run holds between its steps."""
        aux = [] if self.aux is None else self.aux.held
        return [self.network.dit, *self.network.averages(), *self._optimizer.tensors(), *aux]

    def train(self, should_stop: Callable[[], bool]) -> None:
        """Trains up to `train.max_steps`. Saves before it raises Interrupted; raises UnusableFile where
        losses stay without a finite value, the last checkpoint untouched."""
        # First the validation that was due when the run stopped.
        self._end_if(self.world.any(should_stop()) or not self._validate(should_stop))
        train, started, begun = self.cfg.train, time.monotonic(), self.step
        asked = self.world.stops(should_stop)
        samples = self.data.read(self._order.from_step(self.step, train.max_steps))
        while self.step < train.max_steps:
            clock = time.monotonic()
            with self.world.together():
                batch = self._next(samples, asked if self.step == begun else None)
            waited = time.monotonic() - clock
            self._one_step(batch, waited, clock)
            now = time.monotonic()
            left = (now - started) / (self.step - begun) * (train.max_steps - self.step)
            self._tell(now - clock, left)
            stop = self.world.any(should_stop())
            save = self.step % self.cfg.checkpoint.every == 0 or self.step == train.max_steps
            if stop or save:
                self.save()
            if not stop and not self._validate(should_stop):
                stop = True
                if not save:
                    self.save()
            self._end_if(stop)

    def _end_if(self, stop: bool) -> None:
        """Raises Interrupted where that leaves something to be made. All have to call it."""
        if stop and (self.step < self.cfg.train.max_steps or self._validation_is_due):
            with self.world.together():
                raise self._stopped()

    def _validate(self, should_stop: Callable[[], bool]) -> bool:
        """Validates where that is due; whether it came to its end."""
        if not self._validation_is_due:
            return True
        assert self.validation is not None
        try:
            with self.phase("validation"):
                self.validation.run(self.step, should_stop)
        except Interrupted:
            self.emit(Notice(f"the validation of step {self.step} was stopped; resuming makes it"))
            return False
        return True

    @property
    def _validation_is_due(self) -> bool:
        """All have to ask."""
        return self.validation is not None and self.validation.is_due(self.step)

    def _stopped(self) -> Interrupted:
        fix = "the same command with --resume auto"
        if self.step < self.cfg.train.max_steps:
            what = f"stopped after step {self.step}, which is saved" if self.step else "stopped before a step"
            return Interrupted(what, fix=f"{fix} goes on")
        what = f"all {self.step} steps are made and saved, but not the last validation"
        return Interrupted(what, fix=f"{fix} makes it")

    def save(self) -> Path:
        """A checkpoint of the step that was last made, which the main process writes. All have to call it:
        of a sharded network each has a part."""
        spread = self.network.is_sharded
        with self.phase("checkpoint"):
            states = self.network.states() if spread else None
            moments = self._optimizer.state() if spread else None
            with self.world.together():
                if self.world.is_main:
                    self._write(states, moments)
        return self.folder.path / f"checkpoint-{self.step}"

    def _write(
        self, states: Sequence[Mapping[str, Tensor]] | None, moments: Mapping[str, Tensor] | None
    ) -> None:
        """Older checkpoints are removed when the new one is whole."""
        weights, averaged = self.network.files(self.step, states)
        state = {
            "samples": self.data.names,
            "slots": self._slots,
            "seed": self.cfg.runtime.seed,
            "threads": torch.get_num_threads(),
            "cut": [value_of(self.cfg, dotted) for dotted in CUT],
            "torch": torch.__version__,
            "start": dict(self.start),
            "max_steps": self.cfg.train.max_steps,
        }
        optimizer = self._optimizer.state() if moments is None else moments
        self.folder.flush()
        write_checkpoint(self.folder.path, self.step, weights, averaged, optimizer, state)
        for gone in rotate(self.folder.path, self.cfg.checkpoint.keep_last):
            self.emit(Notice(f"removed {gone.name}", "info"))
        draw_curves(self.folder.path / "curves.png", self.folder.entries())

    def _next(
        self,
        samples: Iterator[TrainingSample | AvatarctlError],
        should_stop: Callable[[], bool] | None = None,
    ) -> list[TrainingSample]:
        """The samples of a step. The turn of one that turns out to be unusable goes to the next good one.

        should_stop: of a step before which there is nothing to save; Interrupted is raised between samples.
        """
        batch = []
        for place in self._order.places(self.step):
            if should_stop is not None and should_stop():
                raise self._stopped()
            found = next(samples)
            tried = place
            while not isinstance(found, TrainingSample):
                name = self.data.names[tried]
                if name not in self.failed:
                    self._tell_failed(name, found)
                    self._news[name] = found
                self.failed[name] = found
                if len(self.failed) == len(self.data.names):
                    raise UnusableFile(f"no sample can be used any more; the last: {under_name(name, found)}")
                tried = (tried + 1) % len(self.data.names)
                found = next(self.data.read([tried]))
            batch.append(found)
        return batch

    def _tell_failed(self, name: str, problem: AvatarctlError) -> None:
        self.emit(Notice(f"{under_name(name, problem)}; another sample takes its turns", "warning"))

    def accumulate(self, batch: list[TrainingSample]) -> dict[str, float]:
        """Gradients of one optimizer step, in as many forward passes as the run asks for; the numbers of the
        step, each averaged over the samples that have it. batch: what this process takes of it.

        Gradients are added when all passes are done, not by a wrapper of the network as they come: no pass
        has to be told that it is not the last, no parameter is searched for that had no part, and what
        waits for the network is small beside the step.
        """
        sums = _Sums()
        passes = self._passes(batch)
        if self.network.is_sharded:
            # Outside of `together`: who fails alone within a pass has left the others waiting for its part.
            most = max(self.world.gather(len(passes)))
            for each in passes:
                self._backward(each, sums)
            for _ in range(most - len(passes)):
                self._backward(passes[-1], _Sums(), 0.0)
        else:
            with self.world.together():
                for each in passes:
                    self._backward(each, sums)
            self.world.add_gradients(list(self.network.trainables.parameters.values()))
        parts, self._odd = sums.read()
        told = self.world.gather((parts, self._news))
        for _, failed in told:
            self._learnt_of(failed)
        self._news = {}
        return _Sums.means([own for own, _ in told])

    def _passes(self, batch: list[TrainingSample]) -> list[_Pass]:
        """What goes through the network at once."""
        draws, size = self._order.draws(self.step), self.cfg.train.batch_size
        pairs = list(zip(batch, draws, strict=True))
        groups = (pairs[first : first + size] for first in range(0, len(pairs), size))
        return [part for group in groups for part in _of_one_length(group)]

    def _learnt_of(self, failed: Mapping[str, AvatarctlError]) -> None:
        """What other processes could not use."""
        for name, problem in failed.items():
            if name not in self.failed:
                self._tell_failed(name, problem)
                self.failed[name] = problem

    def _one_step(self, batch: list[TrainingSample], waited: float, clock: float) -> None:
        totals = self.accumulate(batch)
        with self.phase("optimizer"):
            norm = float(self._optimizer.clip())
        entry: dict[str, Any] = {"step": self.step + 1, **totals, "gradient_norm": norm}
        if all(math.isfinite(value) for value in (norm, *totals.values())):
            with self.phase("optimizer"):
                entry["learning_rate"] = self._optimizer.step(self.step)
                self.network.average()
            self._in_a_row = 0
        else:
            self._optimizer.drop_gradients()
            self._skip(batch, entry)
        self.step += 1
        self.last = entry
        if not self.world.is_main:
            return
        self.folder.write(LOG, entry)
        seconds = time.monotonic() - clock
        self.folder.write(TIMING, {"step": self.step, "seconds": seconds, "waited": waited})

    def _skip(self, batch: Sequence[TrainingSample], entry: dict[str, Any]) -> None:
        """A step without finite numbers moves nothing. Named are samples whose own loss is not finite, all
        where it is the gradient. Raises UnusableFile after five in a row."""
        told = self.world.gather((self._odd, [sample.name for sample in batch]))
        odd, all_names = ([name for each in told for name in each[place]] for place in (0, 1))
        names = ", ".join(dict.fromkeys(odd or all_names))
        self._in_a_row += 1
        line = f"step {entry['step']} is skipped: its numbers are not finite ({names})"
        self.emit(Notice(line, "warning"))
        entry.update({name: None for name, value in entry.items() if isinstance(value, float)})
        entry["skipped"] = names
        if self._in_a_row == _PATIENCE:
            with self.world.together():
                raise UnusableFile(
                    f"{_PATIENCE} steps in a row were not finite; the last: {names}",
                    fix=f"look at these samples, or begin anew with {self._slower()}",
                )

    def _slower(self) -> str:
        """A command that goes on at a smaller learning rate, as another run: this one keeps its own."""
        held = checkpoints(self.folder.path)
        start = f"--model {shlex.quote(str(held[-1][1]))} " if held else ""
        return f"{start}--learning-rate {self.cfg.train.learning_rate / 10:g} and another --out"

    def _backward(self, part: _Pass, sums: _Sums, share: float = 1.0) -> None:
        """Gradients of some samples of a step, all of one length. share: 0 where the pass is made only
        because other processes make one more."""
        samples, draws = [sample for sample, _ in part], [draw for _, draw in part]
        with self.phase("condition"):
            condition, timesteps, noise = self._prepared(samples, draws)
            there = _moved(timesteps, self.network.device)
        with self.phase("forward"), self.network.autocast():
            step = flow_step(self.family, self.network.dit, condition, there, noise, self.cfg)
        loss = self._total(step, samples, draws, condition, timesteps, sums)
        with self.phase("backward" if self.aux is None else "aux backward"):
            (loss.sum() * share / self._slots).backward()

    def _prepared(
        self, samples: list[TrainingSample], draws: list[Draw]
    ) -> tuple[Condition, Timesteps, Tensor]:
        """The timesteps stay on the host."""
        device = self.network.device
        tensors = [{name: tensor.to(device) for name, tensor in sample.tensors.items()} for sample in samples]
        constants = {name: tensor.to(device) for name, tensor in self.data.constants.items()}
        condition = self.family.training_condition(tensors, constants, draws, self.cfg)
        assert condition.clean is not None
        timesteps = self.family.sample_timesteps(draws, condition.clean.shape[2], self.cfg)
        noise = training_noise(draws, condition.clean.shape)
        return condition, timesteps, noise.to(device)

    def _total(
        self,
        step: FlowStep,
        samples: list[TrainingSample],
        draws: list[Draw],
        condition: Condition,
        timesteps: Timesteps,
        sums: _Sums,
    ) -> Tensor:
        """[B]: what is minimised. Its parts are logged as they are before their coefficients."""
        for name, values in step.parts.items():
            sums.add(name, values)
        total = step.loss * self.cfg.aux.recon_weight
        if self.aux is not None:
            sums.add("flow", step.loss)
            batch = _aux_batch(step, samples, draws, condition, timesteps, self.network.device)
            with self.phase("aux"):
                result = self.aux(batch)
            for name, values in (result.seen | result.numbers).items():
                sums.add(name, values)
            total = total + result.total
        sums.add("loss", total)
        sums.totals.append(([sample.name for sample in samples], total))
        return total

    def _tell(self, seconds: float, seconds_left: float) -> None:
        numbers = {name: value for name, value in self.last.items() if isinstance(value, float)}
        numbers.pop("learning_rate", None)
        shown = {"loss": numbers.pop("loss"), **numbers} if "loss" in numbers else numbers
        memory = peak_memory(self.network.device)
        steps = self.cfg.train.max_steps
        self.emit(TrainingStepFinished(self.step, steps, shown, seconds, seconds_left, memory))


def _of_one_length(group: _Pass) -> Iterator[_Pass]:
    """Samples whose clips are equally long, in the order of their first; the loss of each is its own, so a
    forward pass more changes no gradient."""
    by_length: dict[int, list[tuple[TrainingSample, Draw]]] = {}
    for sample, draw in group:
        by_length.setdefault(sample.frames, []).append((sample, draw))
    yield from by_length.values()


def _aux_batch(
    step: FlowStep,
    samples: list[TrainingSample],
    draws: list[Draw],
    condition: Condition,
    timesteps: Timesteps,
    device: torch.device,
) -> AuxBatch:
    assert condition.clean is not None
    waveforms = [sample.waveform for sample in samples if sample.waveform is not None]
    align = [sample.to_face for sample in samples if sample.to_face is not None]
    return AuxBatch(
        noisy=step.noisy,
        velocity=step.velocity,
        sigma=timesteps.sigma,
        clean=condition.clean,
        waveform=torch.stack(waveforms).to(device) if len(waveforms) == len(samples) else None,
        keys=[(draw.seed, (draw.step, draw.slot)) for draw in draws],
        align=align if len(align) == len(samples) else None,
        given=condition.fixed_mask,
    )


def _moved(timesteps: Timesteps, device: torch.device) -> Timesteps:
    return type(timesteps)(*(getattr(timesteps, name).to(device) for name in ("id", "t", "sigma", "weight")))
