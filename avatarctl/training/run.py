"""A training run from its configuration to its folder: what is checked before anything is loaded, the start
or the checkpoint to go on from, the loop, and what a person is told at the end."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from avatarctl.atomic import remove_left_behind
from avatarctl.conditioning.masking import mask_name
from avatarctl.config import RunConfig, value_of
from avatarctl.data.checking import run_mask
from avatarctl.data.holdout import trained_on
from avatarctl.data.training_set import TrainingData, TrainingSet, require_going
from avatarctl.errors import ConfigError, PartlyFailed, UnusableFile, UnusableWeights, UsageError, under_name
from avatarctl.events import Emit, Notice
from avatarctl.family import TrainableFamily
from avatarctl.loading.judges import Judges, find_judges, judges_missing, load_judges
from avatarctl.loading.sources import Sources, find_sources, weights_missing
from avatarctl.loading.trained import checkpoints
from avatarctl.parallel.world import World, waiting_within
from avatarctl.registry import Row
from avatarctl.training.memory import check_memory
from avatarctl.training.run_folder import CUT, RunFolder, length_so_far, require_same
from avatarctl.weights.layouts import LAYOUTS

if TYPE_CHECKING:
    import torch

    from avatarctl.training.aux_step import AuxStep
    from avatarctl.training.checkpoints import Checkpoint
    from avatarctl.training.network import Network
    from avatarctl.training.start import StartPlan
    from avatarctl.training.trainer import Trainer
    from avatarctl.training.validation import Validation
    from avatarctl.training.validation_sets import ValidationSets

__all__ = ["WITH_SEQUENCE", "TrainingResult", "TrainingRun"]

WITH_SEQUENCE: Final = 65
"""Input channels of a model that is given a video and a reference sequence."""


@dataclass(frozen=True)
class TrainingResult:
    """steps: done in all; checkpoint: the last one, None where there was nothing to do; partly: what there is
    to say where samples could not be used, to be raised when the result was told."""

    folder: Path
    steps: int
    checkpoint: Path | None
    partly: PartlyFailed | None = None


class TrainingRun:
    """One command. folder: of the run, made when it begins; from_step: of the checkpoint to go on from, None
    for the newest; world: the processes that train together, of which `runtime.gpus` is the number; watch: is
    given the trainer before its first step.

    Raises UsageError and ConfigError for settings that make no sense together or are not those of the run
    that is resumed, PathNotFound and UnusableFile for the data set.
    """

    def __init__(
        self,
        command: str,
        cfg: RunConfig,
        row: Row,
        family: TrainableFamily,
        folder: Path,
        emit: Emit,
        *,
        resume: bool = False,
        from_step: int | None = None,
        world: World | None = None,
        watch: Callable[[Trainer], None] | None = None,
    ) -> None:
        self.command, self.cfg, self.row, self.family, self._emit = command, cfg, row, family, emit
        self.folder = RunFolder(folder)
        self._from_step, self._watch = from_step, watch
        self._world = world or World()
        _check(command, cfg, family)
        if self.folder.is_begun and not resume:
            raise UsageError(
                "holds a run already", where=folder, fix="add --resume auto, or choose another --out"
            )
        if self.folder.is_begun:
            require_same(folder, cfg, command)
            self._check_length(folder)
        _check_aux(cfg, row)
        check_memory(cfg)
        _check_trackers(cfg)
        assert cfg.data.width is not None and cfg.data.height is not None
        self.sources: Sources = find_sources(row, cfg.model, (cfg.data.width, cfg.data.height))
        if cfg.train.init != "random" and not self.sources.dit and not self.sources.missing:
            fix = "--init random --mode full, or --model RUN of one that was trained"
            raise UsageError("has no weights that training could start from", where=row.name, fix=fix)
        self._start: StartPlan | None = None
        self._validation: ValidationSets | None = None
        self._should_stop: Callable[[], bool] = lambda: False
        if cfg.train.init == "random" or (self.sources.dit and not self.sources.missing):
            from avatarctl.training.start import plan_start

            self._start = plan_start(row, self.sources, cfg, emit)

    def open_data(self, *, complete: bool = True) -> TrainingSet:
        """The data set, looked at. complete: whether what encodes has to be here.

        Raises UnusableFile, WeightsMissing, UsageError, Interrupted.
        """
        needs = _judged(self.cfg)
        with_audio = "sync" in needs.names
        with_faces = with_audio and self._whole_frames
        data = TrainingSet(
            self.cfg, self.row, self.family, self._emit, with_audio, with_faces, needs.shortest,
            choose=functools.partial(trained_on, share=self.cfg.validation.holdout),
            should_stop=self._should_stop,
        )  # fmt: skip
        data.check()
        from avatarctl.training.order import samples_per_step

        slots, gpus = samples_per_step(self.cfg), self.cfg.runtime.gpus
        # A run goes on whatever became of its samples: others take their turns.
        usable = len(data.names) - (0 if self.folder.is_begun else len(data.bad))
        if slots > usable:
            whose = f", {slots // gpus} in each of {gpus} processes" if gpus > 1 else ""
            raise UsageError(
                f"a step takes {slots} samples{whose}, and the data set has {usable}",
                where="runtime.gpus" if slots == gpus else "train.batch_size",
                fix=f"{'fewer processes' if slots == gpus else 'a smaller --batch-size'}, or more samples",
            )
        if self.cfg.validation.every:
            self._validation = self._open_validation(data)
        if complete:
            self.require_encoders(data)
        return data

    def require_encoders(self, data: TrainingSet) -> None:
        """Raises WeightsMissing where samples or clips of validations have to be encoded and cannot be."""
        data.require_encoders()
        if self._validation is not None:  # clips are made with them
            assert data.encoders is not None
            data.encoders.require()

    def _open_validation(self, data: TrainingSet) -> ValidationSets:
        """What validations look at. Raises UsageError, PathNotFound, UnusableFile."""
        from avatarctl.training.validation_sets import open_sets

        with_faces = self._whole_frames and "sync" in self.cfg.validation.metrics
        return open_sets(
            self.cfg, self.row, self.family, data.encoders, self._emit, with_faces=with_faces,
            should_stop=self._should_stop,
        )  # fmt: skip

    @property
    def _whole_frames(self) -> bool:
        """Whether samples show more than an aligned face, as those that start from an image do."""
        return self.family.takes(self.cfg) == "image" and self.cfg.data.faces not in (None, "none")

    def run(
        self,
        run_text: str,
        should_stop: Callable[[], bool],
        draw: Callable[[], None] | None = None,
        data: TrainingData | None = None,
    ) -> TrainingResult:
        """Trains. run_text: of the run file; draw: makes the data set where none was given, in a folder that
        is this run's alone; data: to learn from, in place of the data set of the settings.

        Raises Interrupted (a step that was made is saved), and what a start, a checkpoint or the disk raises.
        """
        if self._start is None:  # before a folder is made
            raise weights_missing(self.row, self.sources)
        world = self._world
        self._should_stop = world.stops(should_stop)
        with ExitStack() as held:
            with world.together():
                if world.is_main:
                    held.enter_context(self.folder.held())
                    for line in remove_left_behind(self.folder.path):
                        self._emit(Notice(line))
                    if draw is not None:
                        draw()
            with world.together():
                data = data or self.open_data()
            self._require_one_data_set(data)
            trainer = self._trainer(data)
            if self._watch is not None:
                self._watch(trainer)
            with world.together():
                require_going(self._should_stop)
                if world.is_main:
                    self.folder.begin(run_text)  # not before everything is there: what is refused is no run
            begun = trainer.step
            if begun == self.cfg.train.max_steps:
                self._emit(Notice(f"nothing to do: all {begun} steps are done (--max-steps for more)"))
            self._train(trainer, should_stop)
            last = checkpoints(self.folder.path)[-1][1] if trainer.step > begun else None
            return TrainingResult(self.folder.path, trainer.step, last, _partly(data, trainer))

    def _train(self, trainer: Trainer, should_stop: Callable[[], bool]) -> None:
        """With trackers at the run's logs while it lasts."""
        from avatarctl.training.trackers import Trackers

        names = self.cfg.runtime.trackers if self._world.is_main else ()
        trackers = Trackers(names, self.folder, trainer.step, self._emit)
        try:
            with waiting_within() if trainer.network.is_sharded else nullcontext():
                trainer.train(should_stop)
        finally:
            trackers.finish()

    @property
    def weights(self) -> int | None:
        """Bytes of the weights on the device of each process; None where they are not here."""
        return None if self._start is None else self._start.weights(self.cfg)

    def summary(self, samples: int, bad: int, lacking: Mapping[str, int]) -> dict[str, Any]:
        """What `--dry-run` shows, of a data set with that many samples, unusable ones beside them, and what
        it lacks (`TrainingSet.lacking`)."""
        from avatarctl.training.order import samples_per_step

        train = self.cfg.train
        slots = samples_per_step(self.cfg)
        return {
            "model": self.row.name,
            "channels": self.cfg.model.channels,
            "mode": train.mode,
            "start": train.init,
            "audio_offset": self.cfg.model.audio_offset,
            "trained_numbers": None if self._start is None else self._start.trained(train),
            "samples": samples,
            "unusable": bad,
            "samples_per_step": slots,
            "steps": train.max_steps,
            "epochs": round(train.max_steps * slots / samples, 2),
            "encoded_while_training": dict(lacking),
            "losses": list(self.cfg.aux.losses),
            "folder": str(self.folder.path),
            "missing_weights": [f"{item.folder}/{item.file}" for item in self.sources.missing],
        }

    def _require_one_data_set(self, data: TrainingData) -> None:
        """Raises UnusableFile where processes, perhaps of two machines, see different samples."""
        with self._world.together():
            if self._world.from_main(data.names) != data.names:
                raise UnusableFile("is not the same for all processes of this run", where=data.base)

    def _trainer(self, data: TrainingData) -> Trainer:
        from avatarctl.models.device import resolve_device

        device = resolve_device(self.cfg.runtime.device)
        with self._world.together():
            validation = self._validates(data, device)
            data.prepare()
            require_going(self._should_stop)
        # Apart: those that share a network wait for each other while it is built.
        with self._world.together():
            trainer = self._made(data, device)
        if validation is not None:
            held = Judges() if trainer.aux is None else trainer.aux.losses.judges
            trainer.validation = validation(trainer.network, held)
        self._go_on(trainer, data)
        return trainer

    def _made(self, data: TrainingData, device: torch.device) -> Trainer:
        from avatarctl.training.building import build_network
        from avatarctl.training.trainer import Trainer

        cfg = self.cfg
        assert self._start is not None
        network, begun = build_network(self._start, cfg, device, self._mask_facts(), self._emit, self._world)
        require_going(self._should_stop)
        aux = self._aux(data, device)
        return Trainer(self.folder, cfg, self.family, network, data, self._emit, aux, begun, self._world)

    def _validates(
        self, data: TrainingData, device: torch.device
    ) -> Callable[[Network, Judges], Validation] | None:
        """What makes validations of a network; None where none is asked for."""
        if self._validation is None:
            return None
        from avatarctl.training.validation import make_validation

        assert isinstance(data, TrainingSet)
        made = (self.row, self.family, self.sources, data.modules, device, self._emit, self._world)
        return make_validation(self.folder, self._validation, *made)

    def _aux(self, data: TrainingData, device: torch.device) -> AuxStep | None:
        """The auxiliary losses; None where none is asked for, or all have no weight."""
        from avatarctl.training.aux_losses import AuxLosses, active_losses, aux_settings
        from avatarctl.training.aux_step import AuxStep
        from avatarctl.training.sync_loss import SYNC_HINTS

        cfg, names = self.cfg, active_losses(self.cfg)
        if not names:
            return None
        assert cfg.data.num_frames is not None
        found = find_judges(self.row, cfg.model, names, cfg.aux.lpips_backend)
        judges = load_judges(self.row, found, names, device, self._emit, cfg.aux.lpips_backend)
        if "sync" in names:
            self._emit(Notice(f"sync loss, {cfg.aux.sync_mode}: {SYNC_HINTS[cfg.aux.sync_mode]}"))
        losses = AuxLosses(names, judges, aux_settings(cfg, cfg.data.num_frames))
        return AuxStep(losses, data.exact_vae())

    def _mask_facts(self) -> dict[str, str]:
        """What whoever runs the weights has to know of the mask."""
        if self.family.takes(self.cfg) == "image":
            return {}
        mask = run_mask(self.cfg)
        return {"mask_rule": self.cfg.data.mask_rule, "mask": mask_name(mask)}

    def _go_on(self, trainer: Trainer, data: TrainingData) -> None:
        """The checkpoint to go on from; what lies behind it is set aside, and forgotten by the log."""
        from avatarctl.training.checkpoints import find_checkpoint, set_aside

        world, found = self._world, None
        with world.together():
            if world.is_main:
                found, notes = find_checkpoint(self.folder.path, self._from_step)
                for note in notes:
                    self._emit(Notice(note, "warning"))
        found = world.from_main(found)
        with world.together():
            if found is not None:
                # It may have been put there from another run.
                require_same(found.path, self.cfg, self.command)
                self._require_start(found, trainer.start)
                self._require_samples(found, data)
                if trainer.network.is_sharded:  # the host has no room for the whole of each at once
                    world.in_turns(functools.partial(trainer.resume, found))
                else:
                    trainer.resume(found)
                self._emit(Notice(f"resumed behind step {found.step}"))
        with world.together():
            if world.is_main:
                for path in set_aside(self.folder.path, trainer.step):
                    self._emit(Notice(f"set aside: {path}"))
                self.folder.cut_log(trainer.step)

    def _require_start(self, checkpoint: Checkpoint, start: Mapping[str, str]) -> None:
        """Raises UnusableWeights where the file that the run started from has other bytes now."""
        if checkpoint.state.get("start", start) != start:
            raise UnusableWeights(
                "is not what this run started from: its SHA-256 is another one",
                where=self.row.path or self.row.name,
                fix="bring that file back, or start anew in another --out",
            )

    def _require_samples(self, checkpoint: Checkpoint, data: TrainingData) -> None:
        """Which sample has which turn depends on all of them. Raises UnusableFile for another data set."""
        before, now = checkpoint.state.get("samples", []), data.names
        if before != now:
            gone = [name for name in before if name not in set(now)]
            new = [name for name in now if name not in set(before)]
            which = f"{gone[0]} is gone" if gone else f"{new[0]} is new" if new else "their order changed"
            raise UnusableFile(
                f"is not the data set of this run: {len(before)} samples then, {len(now)} now; {which}",
                where=data.base,
                fix="bring the samples back, or start anew in another --out",
            )
        import torch

        threads = checkpoint.state.get("threads")
        if threads != torch.get_num_threads():
            line = f"this run had {threads} threads and has {torch.get_num_threads()}: last digits differ"
            self._emit(Notice(line, "warning"))
        cut, cut_before = [value_of(self.cfg, dotted) for dotted in CUT], checkpoint.state.get("cut")
        if cut_before not in (None, cut):
            is_now, was = (" x ".join(map(str, each)) for each in (cut, cut_before))
            line = f"a step was {was} (batch, passes, processes) and is {is_now}: last digits may differ"
            self._emit(Notice(line, "warning"))

    def _check_length(self, folder: Path) -> None:
        """Of a run that goes on: never shorter than it is, and a cosine only as long as it was."""
        from avatarctl.training.optimizer import learning_rate

        train = self.cfg.train
        step = self._from_step
        if step is None:
            step = max((number for number, _ in checkpoints(folder)), default=0)
        if train.max_steps < step:
            raise UsageError(
                f"{train.max_steps} steps were asked for, and {step} are done", where="train.max_steps"
            )
        before = length_so_far(folder, self._from_step)
        if (
            train.max_steps != before
            and train.schedule == "cosine"
            and not self.cfg.checkpoint.accept_schedule
        ):
            rates = [learning_rate(_with_steps(train, steps), step) for steps in (before, train.max_steps)]
            raise ConfigError(
                f"the cosine was made for {before} steps: at step {step} the learning rate would jump from "
                f"{rates[0]:.3g} to {rates[1]:.3g}",
                where="train.max_steps",
                fix="--accept-schedule goes on all the same",
            )


@dataclass(frozen=True)
class _Judged:
    """Auxiliary losses of a run, and the pixel frames that a clip needs for them."""

    names: tuple[str, ...]
    shortest: int


def _judged(cfg: RunConfig) -> _Judged:
    from avatarctl.training.aux_losses import SHORTEST, active_losses

    names = active_losses(cfg)
    needed = cfg.aux.frames if names else 0
    if set(names) - {"lpips"}:
        needed = max(needed, SHORTEST, cfg.aux.window if "sync" in names else 0)
    return _Judged(names, needed)


def _partly(data: TrainingData, trainer: Trainer) -> PartlyFailed | None:
    failed = {**data.bad, **trainer.failed}
    if not failed:
        return None
    first = under_name(*next(iter(failed.items())))
    return PartlyFailed(
        f"trained to step {trainer.step}; {len(failed)} of {len(data.names)} samples could not be used; the "
        f"first: {first}"
    )


def _channels(cfg: RunConfig, family: TrainableFamily, wants: str) -> list[int]:
    """The numbers of input channels with which a model of the family learns from what a command gives it."""
    layout = next(each for each in LAYOUTS if each.family == family.name)
    others = {each: replace(cfg, model=replace(cfg.model, channels=each)) for each in layout.channels}  # type: ignore[arg-type]
    return [each for each, other in others.items() if family.takes(other) == wants]


def _with_steps(train: Any, steps: int) -> Any:
    return replace(train, max_steps=steps)


def _check_trackers(cfg: RunConfig) -> None:
    """Raises ExtraMissing for one whose package is not here."""
    if set(cfg.runtime.trackers) - {"jsonl"}:
        from avatarctl.training.trackers import require_trackers

        require_trackers(cfg.runtime.trackers)


def _check_aux(cfg: RunConfig, row: Row) -> None:
    """Raises ConfigError for windows that are too short, WeightsMissing for judges that are not here."""
    from avatarctl.training.aux_losses import active_losses, aux_settings

    if names := active_losses(cfg):
        assert cfg.data.num_frames is not None
        aux_settings(cfg, cfg.data.num_frames)
        found = find_judges(row, cfg.model, names, cfg.aux.lpips_backend)
        if found.missing:
            raise judges_missing(found)


def _check(command: str, cfg: RunConfig, family: TrainableFamily) -> None:
    """Settings that make no sense together."""
    wants = {"train i2v": "image", "train v2v": "video"}[command]
    if family.takes(cfg) != wants:
        other = "train v2v" if wants == "image" else "train i2v"
        fitting = " or ".join(map(str, _channels(cfg, family, wants)))
        raise UsageError(
            f"{cfg.model.name} with {cfg.model.channels} channels learns from "
            f"{'a video' if wants == 'image' else 'an image'}",
            where=command,
            fix=f"--channels {fitting}, or `avatarctl {other}`",
        )
    if cfg.data.reference_sequence and cfg.model.channels != WITH_SEQUENCE:
        alone = "leave it out: a model that starts from an image is given none"
        raise UsageError(
            f"a reference sequence needs {WITH_SEQUENCE} input channels, and there are {cfg.model.channels}",
            where="data.reference_sequence",
            fix=alone if wants == "image" else f"--channels {WITH_SEQUENCE}, or leave it out",
        )
    if wants == "image" and cfg.train.mouth_weight != 1 and cfg.data.mask is None:
        what = "where the mouth is, is known only with a mask"
        raise UsageError(what, where="train.mouth_weight", fix="--mask")
    if wants == "video" and cfg.model.audio_offset != 0:
        raise UsageError("a video's frames and audio belong together: 0", where="model.audio_offset")
    if cfg.model.compat == "reference":
        raise UsageError(
            "nothing was ever published about training", where="model.compat", fix="none or fork"
        )
